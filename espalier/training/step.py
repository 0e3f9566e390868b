"""One optimizer step and one evaluation step, as pure functions for `jax.jit`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from espalier.errors import UserError
from espalier.training.bad_steps import chosen, judged
from espalier.training.optimizer import Optimizer
from espalier.training.sparsity import Projection
from espalier.training.state import TrainState, combined
from sharding.mesh import constrain, token_axes

Sums = Mapping[str, tuple[jax.Array, jax.Array | None]]
"""Metrics as (sum, weight): they add up over micro-batches, hosts and batches, and are divided once at the end.

Without a weight, a sum of any shape is a count (true positives, a confusion matrix [C,C]): evaluations add it up over
the whole set and hand it undivided to their `finalize`, which makes of it what is no mean (F1); training drops it.
"""
LOSSES, COLLECTING = 2**32 - 1, 2**32 - 2
"""Folded into a batch's key: no row has these numbers, so what is drawn there is apart from what `prepare` draws."""


@dataclass(frozen=True)
class Objective:
    """What is minimised, as pure functions. The key is always there; whether the model trains (drops out) is `train`,
    a Python bool: an evaluation may have to sample."""

    prepare: Callable[[dict, jax.Array, jax.Array, bool], tuple[dict, Any]]
    """(batch, key, step, train) → (batch, norms). It sees the global batch: it draws masks, counts the denominators."""
    loss: Callable[[Any, dict, jax.Array, Any, bool], tuple[jax.Array, Sums]]
    """(params, batch, key, norms, train) → (loss, Sums). It sees complete parameters and a micro-batch, and returns
    the sum over the global norms, so that losses and gradients of micro-batches add up to those of the whole."""
    divisible: bool = True
    """Whether that holds: False for losses in which rows meet each other (in-batch negatives). Those refuse
    micro-batches, unless they bring a gradient of their own."""
    collect: Callable[[TrainState, dict, jax.Array], dict] | None = None
    """(state, batch, key) → the batch, already on the mesh, with arrays added that current or frozen parameters must
    compute first (reference log-probabilities, rollouts). Called outside the compiled step; see `training.collected`
    for what that asks of it and how it is logged and replayed."""
    collected_for: int = 1
    """Steps in a row that share what was collected before the first of them; their batches are the same."""
    ahead: Callable[[TrainState, int, jax.Array], dict[str, Any]] | None = None
    """(state, number of the batch for which `collect` is called next, its key) → NumPy arrays, none for nothing, that
    `collect` then finds in the batch as `ahead` and takes out of it. Called after `collect` and before the step; what
    it returns is on the disk before the step is made."""
    gradient: Callable[..., tuple[tuple[jax.Array, Sums], Any]] | None = None
    """(complete, params, batch, key, norms, accumulation) → ((loss, Sums), gradient of params): how a loss that is not
    divisible takes micro-batches, for instance by caching representations (Gao et al. 2021); `micro_batches` cuts.
    complete: trained parameters → those and the frozen ones."""
    after: Callable[[Any, Any, Sums, jax.Array], Any] | None = None
    """(params before the step, params that the optimizer gives, Sums, step) → params: rows that keep their length,
    statistics that are learnt without a gradient. It sees the counts, too."""


def make_train_step(
    objective: Objective,
    optimizer: Optimizer,
    factor_fn: Callable[[Any], jax.Array],
    accumulation: int = 1,
    project: Projection | None = None,
    deviations: float = 0.0,
) -> Callable[[TrainState, dict], tuple[TrainState, dict[str, jax.Array]]]:
    """(state, batch) → (state, metrics): float32 scalars loss, learning_rate, gradient_norm and the objective's own,
    and int32 bad_in_a_row, which is not 0 where the step was bad and left parameters and optimizer as they were.

    factor_fn: step → factor on the peak rates (`training.optimizer.schedule`).
    accumulation: micro-batches A, taken interleaved (row mod A); the batch has a multiple of A rows. UserError where
    the objective cannot be divided. project: what is kept of the parameters after each step (training.sparsity).
    deviations: of which steps are bad (training.bad_steps).
    """
    if accumulation > 1 and not objective.divisible and objective.gradient is None:
        raise UserError(
            f"accumulation={accumulation}: in this objective the rows of a batch meet each other, so that it cannot be "
            "cut; try --accumulation 1 with a smaller --batch-size, more devices, or --execution.remat full"
        )

    def train_step(state: TrainState, batch: dict):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        prepare_key, loss_key = jax.random.split(key)
        batch, norms = objective.prepare(batch, prepare_key, state.step, True)

        def complete(params):
            return combined(params, state.frozen)

        def gradient(index, micro_batch):
            def loss(params):
                micro_key = jax.random.fold_in(loss_key, index)
                return objective.loss(complete(params), micro_batch, micro_key, norms, True)

            return jax.value_and_grad(loss, has_aux=True)(state.params)

        if accumulation == 1:
            (loss, sums), grads = gradient(0, batch)
        elif not objective.divisible:
            assert objective.gradient is not None
            (loss, sums), grads = objective.gradient(complete, state.params, batch, loss_key, norms, accumulation)
        else:
            (loss, sums), grads = _accumulate(gradient, batch, accumulation)

        factor = factor_fn(state.step)
        params, opt_state, measured = optimizer.update(grads, state.opt_state, state.params, state.rates, factor)
        if project is not None:
            params, kept = project(params, state.step + 1)
            measured = measured | kept
        if objective.after is not None:
            params = objective.after(state.params, params, sums, state.step)
        good, health = judged(state.health, loss, measured["gradient_norm"], deviations)
        params, opt_state = chosen(good, (params, opt_state), (state.params, state.opt_state))
        rate = state.rates["learning_rate"] * factor
        metrics = means(sums) | {"loss": loss, "learning_rate": rate} | measured
        metrics["bad_in_a_row"] = health["bad_in_a_row"]
        state = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state, health=health)
        return state, metrics

    return train_step


def jit_train_step(
    objective: Objective,
    optimizer: Optimizer,
    factor_fn: Callable[[Any], jax.Array],
    accumulation: int,
    state: Any,
    project: Projection | None = None,
    deviations: float = 0.0,
) -> JittedStep:
    """The train step as the loop calls it: the old state's memory is taken for the new one, which lies like `state`.

    That of frozen parameters is not: others may hold them too.
    """
    step = make_train_step(objective, optimizer, factor_fn, accumulation, project, deviations)

    def apart(state: TrainState, frozen: Any, batch: dict):
        state, metrics = step(dataclasses.replace(state, frozen=frozen), batch)
        return dataclasses.replace(state, frozen={}), metrics

    layout = jax.tree.map(lambda leaf: leaf.sharding, dataclasses.replace(state, frozen={}))
    return JittedStep(jax.jit(apart, donate_argnums=0, out_shardings=(layout, None)))


class JittedStep(NamedTuple):
    """(state, batch) → (state, metrics), compiled."""

    jitted: Any
    """(state without frozen parameters, those, batch) → (state without them, metrics)"""

    def __call__(self, state: TrainState, batch: dict) -> tuple[TrainState, dict[str, jax.Array]]:
        new, metrics = self.jitted(dataclasses.replace(state, frozen={}), state.frozen, batch)
        return dataclasses.replace(new, frozen=state.frozen), metrics

    def lower(self, state: TrainState, batch: dict) -> jax.stages.Lowered:
        """As `jax.jit(…).lower`."""
        return self.jitted.lower(dataclasses.replace(state, frozen={}), state.frozen, batch)


def make_eval_step(objective: Objective, accumulation: int = 1) -> Callable[[Any, dict, jax.Array], Sums]:
    """(complete params, batch, key) → Sums, without dropout; micro-batches as in training, for memory's sake.

    One that cannot be divided is evaluated whole: without gradients there is room.
    """
    accumulation = accumulation if objective.divisible else 1

    def eval_step(params: Any, batch: dict, key: jax.Array) -> Sums:
        batch, norms = objective.prepare(batch, key, jnp.zeros((), jnp.int32), False)
        loss_key = jax.random.fold_in(key, LOSSES)

        def measured(index, micro_batch):
            return objective.loss(params, micro_batch, jax.random.fold_in(loss_key, index), norms, False)[1]

        return measured(0, batch) if accumulation == 1 else _accumulate(measured, batch, accumulation)

    return eval_step


def means(sums: Sums) -> dict[str, jax.Array]:
    """Each sum over its weight; 0 where the weight is 0. Counts are left out."""
    return {
        name: total / jnp.where(weight == 0, 1, weight) for name, (total, weight) in sums.items() if weight is not None
    }


@jax.jit
def count_tokens(batch: dict) -> jax.Array:
    """Places of every `input_ids` of a batch, nested or not, that hold a token; int32 scalar.

    `segment_ids` beside them are 0 at padding; without those, every place counts. Places that a packed row leaves empty
    are thus no tokens, as little as those behind a short example.
    """
    total = jnp.zeros((), jnp.int32)
    for name, part in batch.items():
        if isinstance(part, Mapping):
            total += count_tokens(part)
        elif name == "input_ids":
            total += jnp.sum(batch["segment_ids"] > 0) if "segment_ids" in batch else part.size
    return total


def micro_batches(batch: dict, accumulation: int) -> dict:
    """Every array [B,…] as [A, B/A,…].

    Micro-batch i is rows i, i+A, i+2A, …: every device finds its part of each among the rows it has already,
    whereas consecutive rows would have to be gathered from all devices.
    """

    def split(x, tokens):
        assert x.shape[0] % accumulation == 0, f"{x.shape[0]} rows do not split into {accumulation} micro-batches"
        x = x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:]).swapaxes(0, 1)
        rest = ("sequence" if tokens and axis == tokens else None for axis in range(1, x.ndim - 1))
        return constrain(x, None, "batch", *rest)

    return jax.tree.map(split, batch, token_axes(batch))


def _accumulate(function: Callable[..., Any], batch: dict, accumulation: int) -> Any:
    """Σ over micro-batches of function(index, micro_batch), one after the other."""

    def add(total, numbered):
        return jax.tree.map(jnp.add, total, function(*numbered)), None

    numbered = jnp.arange(accumulation), micro_batches(batch, accumulation)
    shapes = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], numbered))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, numbered)[0]
