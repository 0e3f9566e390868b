"""Matrices of which only the largest weights stay, after each step: small circuits (Gao et al. 2025).

Of each matrix of n weights the k = round(n · density) largest by magnitude stay and the others are 0, right after the
optimizer's step ("Weight-sparse transformers have interpretable circuits", section 2). Moments stay dense, so that a
weight may come back. The density falls linearly from 1 over the first part of the run.

The k-th largest magnitude is found bit by bit: magnitudes as integers have their order, and 31 counts of how many reach
a threshold settle it, on a mesh as well, where nothing but counts is exchanged. Of equal ones the first stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from espalier.errors import UserError
from espalier.training.config import SparsityConfig

Projection = Callable[[Any, jax.Array], tuple[Any, dict[str, jax.Array]]]
"""(parameters after a step, steps done) → (parameters that are kept, {"nonzero": part of the weights of matrices})."""


class _Matrices(NamedTuple):
    """The matrices of one leaf."""

    axes: tuple[int, ...]
    """Of a matrix; the others count matrices."""
    size: int
    """Weights of one matrix."""
    index: np.ndarray | jax.Array
    """The number of each weight within its matrix, int32, broadcasts to the leaf."""


def projection(config: SparsityConfig, shapes: Any, matrix_axes: Any, steps: int) -> Projection | None:
    """What keeps the largest weights, of parameters of these shapes; None = all stay.

    matrix_axes: a tree like the parameters with (reduction axes, output axes) of the leaves that are matrices, else
    None. steps: length of the schedule. UserError where there is no matrix.
    """
    if config.density == 1.0:
        return None
    leaves, structure = jax.tree.flatten(shapes)
    groups = structure.flatten_up_to(matrix_axes)
    if not any(groups):
        raise UserError("optimizer.sparsity: this run trains no matrices of layers; leave it out")
    found = [_matrices(leaf.shape, group) if group else None for leaf, group in zip(leaves, groups, strict=True)]
    sizes = [matrices.size for matrices in found if matrices]

    def kept(params: Any, done: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        all_leaves = structure.flatten_up_to(params)
        ours = [(leaf, matrices) for leaf, matrices in zip(all_leaves, found, strict=True) if matrices]
        density = density_at(config, steps, done)
        ended = done >= config.anneal * steps
        counts = [
            # float32 does not count beyond 2^24.
            jnp.where(ended, kept_of(config, size), jnp.clip(jnp.round(size * density), 1, size).astype(jnp.int32))
            for size in sizes
        ]
        masks = iter(_largest(ours, counts))
        new = [
            jnp.where(next(masks), leaf, 0) if matrices else leaf
            for leaf, matrices in zip(all_leaves, found, strict=True)
        ]
        sparse = [leaf for leaf, matrices in zip(new, found, strict=True) if matrices]
        nonzero = jnp.stack([jnp.sum(leaf != 0).astype(jnp.float32) for leaf in sparse])
        return structure.unflatten(new), {"nonzero": jnp.sum(nonzero) / sum(leaf.size for leaf in sparse)}

    return kept


def kept_of(config: SparsityConfig, size: int) -> int:
    """How many weights of a matrix of so many stay in the end."""
    return max(1, round(size * config.density))


def density_at(config: SparsityConfig, steps: int, done: Any) -> jax.Array:
    """The part of the weights that stays after so many of the steps of a run."""
    s = jnp.asarray(done, jnp.float32)
    through = jnp.clip(s / max(config.anneal * steps, 1.0), 0.0, 1.0)
    return 1.0 - (1.0 - config.density) * through


def _matrices(shape: tuple[int, ...], groups: tuple[Any, Any]) -> _Matrices:
    axes = tuple(axis for group in groups for axis in (group if isinstance(group, tuple) else (group,)))
    of_matrix = tuple(size if axis in axes else 1 for axis, size in enumerate(shape))
    size = math.prod(of_matrix)
    return _Matrices(axes, size, np.arange(size, dtype=np.int32).reshape(of_matrix))


def _largest(leaves: list[tuple[jax.Array, _Matrices]], counts: list[jax.Array]) -> list[jax.Array]:
    """True where a weight is among the largest of its matrix, exactly so many as `counts` says of each leaf."""
    bits = [jax.lax.bitcast_convert_type(jnp.abs(leaf), jnp.int32) for leaf, _ in leaves]
    places = [matrices for _, matrices in leaves]

    def number(chosen: jax.Array, matrices: _Matrices) -> jax.Array:
        return jnp.sum(chosen, axis=matrices.axes, keepdims=True, dtype=jnp.int32)

    def highest(start: int, holds: Callable[[int, jax.Array], jax.Array]) -> list[jax.Array]:
        """Of each matrix the largest number below 2^(start + 1) for which `holds` does, as it does for all below."""

        def step(at, values):
            tried = [value | (1 << (start - at)) for value in values]
            return [jnp.where(holds(i, t), t, v) for i, (t, v) in enumerate(zip(tried, values, strict=True))]

        zeros = [jnp.zeros_like(number(b > 0, m)) for b, m in zip(bits, places, strict=True)]
        return jax.lax.fori_loop(0, start + 1, step, zeros)

    least = highest(30, lambda i, value: number(bits[i] >= value, places[i]) >= counts[i])
    above = [number(b > value, m) for b, value, m in zip(bits, least, places, strict=True)]
    longest = max(matrices.size for matrices in places).bit_length()

    def few(i: int, end: jax.Array) -> jax.Array:
        equal = (bits[i] == least[i]) & (places[i].index < end)
        return number(equal, places[i]) + above[i] <= counts[i]

    ends = highest(longest, few)
    return [
        (b > value) | ((b == value) & (m.index < end))
        for b, value, m, end in zip(bits, least, places, ends, strict=True)
    ]
