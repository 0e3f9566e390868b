"""Optimizers and their schedules: directions from optax, rates and decay by parameter path.

    p ← p − rate · factor(step) · scale(path, layer) · (direction + decay(path) · p)

Which there are is `training.optimizers`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from espalier.errors import UserError
from espalier.training.config import OptimizerConfig
from espalier.training.optimizers import OPTIMIZERS
from sharding.rules import path_of


class Optimizer(NamedTuple):
    """Two pure functions."""

    init: Callable[[Any], Any]
    """params → opt_state"""
    update: Callable[..., tuple[Any, Any, dict[str, jax.Array]]]
    """(grads, opt_state, params, rates, factor) → (params, opt_state, {"gradient_norm": before clipping})"""


def build_optimizer(
    config: OptimizerConfig, params_shapes: Any, matrix_axes: Any, frozen: Any = None, depths: Any = None
) -> Optimizer:
    """The optimizer for parameters of these shapes; UserError for a pattern that is no regex or matches nothing.

    matrix_axes: a tree like the parameters with (reduction axes, output axes) where an optimizer may treat a leaf as
    matrices (its other axes count them) and None elsewhere. AdamW ignores it. frozen: parameters that are not trained;
    a pattern of no_decay may match them alone, and that of the class, which nobody gave, may match nothing. depths: a
    tree like the parameters with the layers between each and the head, for layer_decay: numbers, or arrays that
    broadcast.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params_shapes)
    paths = [path_of(key_path) for key_path, _ in leaves]
    shapes = [leaf.shape for _, leaf in leaves]
    kind = OPTIMIZERS[config.name]
    axes = structure.flatten_up_to(matrix_axes) if kind.matrices else [None] * len(paths)
    if kind.matrices and not any(axes):
        raise UserError(
            f"optimizer.name={config.name} needs matrices and this model has none; try --optimizer.name adamw"
        )

    others = [path_of(key_path) for key_path, _ in jax.tree_util.tree_leaves_with_path(frozen)]
    given = config.no_decay != OptimizerConfig.no_decay
    exempt = _matches(config.no_decay, paths, "no_decay", others, given) if config.no_decay else [False] * len(paths)
    scales = [1.0] * len(paths)
    for pattern, factor in reversed(config.rate_scales):
        hits = _matches(pattern, paths, "rate_scales")
        scales = [factor if hit else scale for hit, scale in zip(hits, scales, strict=True)]
    if config.layer_decay != 1.0:
        if depths is None:
            raise UserError("optimizer.layer_decay: it is not known which layers this model has; leave it out")
        falls = zip(scales, structure.flatten_up_to(depths), strict=True)
        scales = [np.asarray(scale * np.power(config.layer_decay, depth), np.float32) for scale, depth in falls]
    stretches = [kind.matrix_scale(*_fans(shape, a)) if a else 1.0 for shape, a in zip(shapes, axes, strict=True)]

    def at_matrices(value):
        return structure.unflatten([value(a) if a else optax.MaskedNode() for a in axes])

    directions = kind.direction(config)
    if kind.matrices:
        # These names are part of the paths in a checkpoint.
        labels = structure.unflatten([config.name if a else "adam" for a in axes])
        directions = optax.partition({config.name: kind.matrices(config, at_matrices), "adam": directions}, labels)

    def update(grads, opt_state, params, rates, factor):
        norm = optax.tree.norm(grads)
        if config.clip_norm:
            shrink = jnp.minimum(1.0, config.clip_norm / jnp.maximum(norm, 1e-30))
            grads = jax.tree.map(lambda g: g * shrink, grads)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes its step counter with floats
            directed, opt_state = directions.update(grads, opt_state, params)
        flat = zip(structure.flatten_up_to(params), structure.flatten_up_to(directed), axes, exempt, strict=True)
        new = []
        for (p, d, a, free), scale, stretch in zip(flat, scales, stretches, strict=True):
            rate = rates[kind.matrix_rate if a else "learning_rate"] * factor * scale
            new.append(p - rate * (d * stretch if free else d * stretch + rates["weight_decay"] * p))
        return structure.unflatten(new), opt_state, {"gradient_norm": norm}

    return Optimizer(directions.init, update)


def schedule(config: OptimizerConfig, steps: int) -> Callable[[Any], jax.Array]:
    """The factor in [0, 1] on the peak rate at step s = 0 … steps−1, in closed form.

    Warm-up of W steps: (s+1)/W. Then with progress x and the final fraction f: f + (1−f)·g(x), where
    linear g = 1−x and cosine g = (1+cos πx)/2 with x = (s−W)/(steps−W); wsd (Hu et al. 2024) g = 1−x with x growing
    from 0 to 1 over the last decay_fraction of the steps; constant g = 1.
    """
    warmup = warmup_steps(config, steps)
    if warmup > steps:
        raise UserError(
            f"optimizer.warmup={config.warmup:g} steps is longer than the run of {steps} steps; "
            "give fewer, or a fraction below 1"
        )
    begin = steps - config.decay_fraction * steps if config.schedule == "wsd" else warmup
    final = config.final_fraction

    def factor(step):
        s = jnp.asarray(step, jnp.float32)
        x = jnp.clip((s - begin) / max(steps - begin, 1.0), 0.0, 1.0)
        if config.schedule == "constant":
            falling = jnp.ones_like(s)
        elif config.schedule == "cosine":
            falling = final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * x))
        else:
            falling = final + (1 - final) * (1 - x)
        return jnp.minimum(falling, (s + 1) / warmup) if warmup else falling

    return factor


def warmup_steps(config: OptimizerConfig, steps: int) -> int:
    """How many steps the warm-up takes in a run of this length."""
    return round(config.warmup * steps if config.warmup < 1 else config.warmup)


def _matches(
    pattern: str, paths: list[str], setting: str, others: Sequence[str] = (), needed: bool = True
) -> list[bool]:
    """Which paths match; where a match is needed, UserError if neither these do nor others."""
    try:
        hits = [re.search(pattern, path) is not None for path in (*paths, *others)]
    except re.error as error:
        raise UserError(f"optimizer.{setting}: {pattern!r} is no regular expression ({error})") from None
    if needed and not any(hits):
        raise UserError(
            f"optimizer.{setting}: {pattern!r} matches no parameter; paths look like {paths[0]}, {paths[-1]}"
        )
    return hits[: len(paths)]


def _fans(shape: tuple[int, ...], axes: tuple[Any, Any]) -> tuple[int, int]:
    """How many inputs and outputs each matrix of a leaf has."""
    fan_in, fan_out = (math.prod(shape[a] for a in (group if isinstance(group, tuple) else (group,))) for group in axes)
    return fan_in, fan_out
