"""Low-rank adapters beside the matrices that they change: W + scale · B A (LoRA, Hu et al. 2021).

A node of a parameter tree that has an adapter holds, beside its kernel,

    lora_a      [count…, r, in…]
    lora_b      [count…, out…, r], zero at first, so that an adapted model begins as what it adapts
    lora_scale  [count…] without those inside a layer (a scalar, or one number for each repeat of it)

in…, out… are the axes that the kernel [count…, in…, out…] sums over and makes; count… are those that number matrices
(repeats of a layer, key and value, gate and up), each of which has an adapter of its own. So a tree says by itself
what it computes: the layers apply the adapters they find (models.layers.Einsum), and `merged` gives the tree without.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sharding.rules import shard_params

LORA_A, LORA_B, LORA_SCALE = "lora_a", "lora_b", "lora_scale"
NAMES = (LORA_A, LORA_B, LORA_SCALE)
KERNEL = "kernel"
"""What an adapter changes."""


def adapted(params: Any) -> bool:
    """Whether a tree of parameters has adapters."""
    return next(_nodes(params), None) is not None


def merged(params: Any) -> Any:
    """The parameters with every adapter added to its kernel, laid out like it; the tree itself where it has none.

    Of shapes, shapes; of NumPy arrays, NumPy arrays.
    """
    return _merged(params) if adapted(params) else params


def without(params: Any) -> Any:
    """The tree without its adapters: what they change."""
    if not isinstance(params, Mapping):
        return params
    return {name: without(value) for name, value in params.items() if name not in NAMES}


def low_rank_change(a: Any, b: Any, scale: Any, kernel_axes: int) -> jax.Array:
    """scale · B A in the shape of a kernel of so many axes."""
    count = a.ndim + b.ndim - 2 - kernel_axes
    counting, rank, rest = string.ascii_letters[:count], "z", string.ascii_letters[count:]
    inputs, outputs = rest[: a.ndim - 1 - count], rest[a.ndim - 1 - count :][: b.ndim - 1 - count]
    scaled = b * jnp.reshape(scale, jnp.shape(scale) + (1,) * (b.ndim - jnp.ndim(scale)))
    equation = f"{counting}{rank}{inputs},{counting}{outputs}{rank}->{counting}{inputs}{outputs}"
    return jnp.einsum(equation, a, scaled, precision=jax.lax.Precision.HIGHEST)


def beside(abstract: Any, saved: Mapping[str, Any]) -> dict:
    """Shapes of the adapters that `saved` (path → shape) has for kernels in `abstract`, laid out on its mesh."""

    def found(tree: Any, prefix: str) -> dict:
        part: dict = {}
        for name, value in tree.items():
            if isinstance(value, Mapping) and (inner := found(value, f"{prefix}{name}/")):
                part[name] = inner
            if name == KERNEL and prefix + LORA_A in saved:
                part |= {own: jax.ShapeDtypeStruct(saved[prefix + own].shape, jnp.float32) for own in NAMES}
        return part

    shapes, layout = found(abstract, ""), jax.tree.leaves(abstract)[0].sharding
    if layout is None or not shapes:
        return shapes
    mesh = getattr(layout, "mesh", None)
    where = jax.tree.map(lambda _: layout, shapes) if mesh is None else shard_params(shapes, mesh)
    return jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, where)


def _nodes(tree: Any) -> Iterator[Mapping]:
    if isinstance(tree, Mapping):
        if LORA_A in tree:
            yield tree
        for value in tree.values():
            yield from _nodes(value)


def _merged(tree: Any) -> Any:
    if not isinstance(tree, Mapping):
        return tree
    new = {name: _merged(value) for name, value in tree.items() if name not in NAMES}
    if LORA_A in tree:
        new[KERNEL] = _changed(tree[KERNEL], *(tree[name] for name in NAMES))
    return new


def _changed(kernel: Any, *adapter: Any) -> Any:
    if isinstance(kernel, jax.ShapeDtypeStruct):
        return kernel
    # The other parameters are passed on as they are: only kernels need new memory.
    layout = kernel.sharding if isinstance(kernel, jax.Array) and not isinstance(kernel, Tracer) else None
    new = jax.jit(lambda w, a, b, s: w + low_rank_change(a, b, s, w.ndim), out_shardings=layout)(kernel, *adapter)
    return np.asarray(new) if isinstance(kernel, np.ndarray) else new
