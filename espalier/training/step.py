"""One optimizer step and one evaluation step, as pure functions for `jax.jit`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from espalier.training.optimizer import Optimizer
from espalier.training.state import TrainState
from sharding.mesh import constrain

Sums = dict[str, tuple[jax.Array, jax.Array]]
"""Metrics as (sum, weight): they add up over micro-batches, hosts and batches, and are divided once at the end."""


class Objective(NamedTuple):
    """What is minimised, as two pure functions.

    prepare(batch, key, step) → (batch, norms) sees the global batch: it draws masks and counts the denominators.
    loss_fn(trainable, frozen, batch, key, norms) → (loss, Sums) sees a micro-batch of it and returns its sum over
    the global norms, so that losses and gradients of micro-batches add up to those of the whole. key=None: no dropout.
    """

    prepare: Callable[..., tuple[dict, Any]]
    loss_fn: Callable[..., tuple[jax.Array, Sums]]


def make_train_step(
    objective: Objective, optimizer: Optimizer, factor_fn: Callable[[Any], jax.Array], accumulation: int = 1
) -> Callable[[TrainState, dict], tuple[TrainState, dict[str, jax.Array]]]:
    """(state, batch) → (state, metrics): float32 scalars loss, learning_rate, gradient_norm and the objective's own.

    factor_fn: step → factor on the peak rates (`training.optimizer.schedule`).
    accumulation: micro-batches A, taken interleaved (row mod A); the batch has a multiple of A rows.
    """

    def train_step(state: TrainState, batch: dict):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        prepare_key, loss_key = jax.random.split(key)
        batch, norms = objective.prepare(batch, prepare_key, state.step)

        def gradient(index, micro_batch):
            micro_key = jax.random.fold_in(loss_key, index)
            grad = jax.value_and_grad(objective.loss_fn, has_aux=True)
            return grad(state.params, {}, micro_batch, micro_key, norms)

        if accumulation == 1:
            (loss, sums), grads = gradient(0, batch)
        else:
            (loss, sums), grads = _accumulate(gradient, batch, accumulation)

        factor = factor_fn(state.step)
        params, opt_state, measured = optimizer.update(grads, state.opt_state, state.params, state.rates, factor)
        rate = state.rates["learning_rate"] * factor
        metrics = means(sums) | {"loss": loss, "learning_rate": rate} | measured
        state = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state)
        return state, metrics

    return train_step


def jit_train_step(
    objective: Objective, optimizer: Optimizer, factor_fn: Callable[[Any], jax.Array], accumulation: int, state: Any
) -> Any:
    """The train step as the loop calls it: the old state's memory is taken for the new one, which lies like `state`."""
    layout = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = make_train_step(objective, optimizer, factor_fn, accumulation)
    return jax.jit(step, donate_argnums=0, out_shardings=(layout, None))


def make_eval_step(objective: Objective, accumulation: int = 1) -> Callable[[Any, dict, jax.Array], Sums]:
    """(params, batch, key) → Sums, without dropout; micro-batches as in training, for memory's sake."""

    def eval_step(params: Any, batch: dict, key: jax.Array) -> Sums:
        batch, norms = objective.prepare(batch, key, jnp.zeros((), jnp.int32))

        def measured(index, micro_batch):
            return objective.loss_fn(params, {}, micro_batch, None, norms)[1]

        return measured(0, batch) if accumulation == 1 else _accumulate(measured, batch, accumulation)

    return eval_step


def means(sums: Sums) -> dict[str, jax.Array]:
    """Each sum over its weight; 0 where the weight is 0."""
    return {name: total / jnp.where(weight == 0, 1, weight) for name, (total, weight) in sums.items()}


def _accumulate(function: Callable[..., Any], batch: dict, accumulation: int) -> Any:
    """Σ over micro-batches of function(index, micro_batch), one after the other.

    Micro-batch i is rows i, i+A, i+2A, …: every device finds its part of each among the rows it has already,
    whereas consecutive rows would have to be gathered from all devices.
    """

    def split(x):
        assert x.shape[0] % accumulation == 0, f"{x.shape[0]} rows do not split into {accumulation} micro-batches"
        x = x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:]).swapaxes(0, 1)
        return constrain(x, None, "batch", *("sequence", *(None,) * (x.ndim - 3))[: x.ndim - 2])

    def add(total, numbered):
        return jax.tree.map(jnp.add, total, function(*numbered)), None

    numbered = jnp.arange(accumulation), jax.tree.map(split, batch)
    shapes = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], numbered))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, numbered)[0]
