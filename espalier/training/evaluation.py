"""Evaluation on held-out batches: sums and weights added up over all of them, divided once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from espalier import progress
from espalier.training.state import TrainState
from espalier.training.step import COLLECTING, Objective, make_eval_step
from sharding.mesh import place_batch

EVAL_SEED = 20_250_101
"""Draws the masks of evaluations: the same in every run with batches of this size, whatever its seed."""
Totals = dict[str, tuple[np.ndarray, float | None]]


def make_evaluate(
    objective: Objective,
    batches: Iterable[dict],
    mesh: Mesh,
    finalize: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    accumulation: int = 1,
) -> Callable[..., dict[str, float] | None]:
    """(State, ends) → metrics over all `batches` (this process's rows, NumPy); they are gone through at every call.

    ends: asked after each batch, by default never true; the metrics are None where it is.

    finalize: metrics → metrics with what follows from them (perplexity = exp loss). It sees means as floats, and what
    has no weight (`training.step.Sums`) as float64 arrays, added up over all batches; arrays it returns are left out.
    """
    eval_step = make_eval_step(objective, accumulation)

    def key_of(index):
        return jax.random.fold_in(jax.random.key(EVAL_SEED), index)

    @jax.jit
    def sums_of(params, batch, index):
        return eval_step(params, batch, key_of(index))

    def evaluate(state: TrainState, ends: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        totals: Totals = {}
        pending: dict = {}
        complete = state.complete
        every = f" of {len(batches):,}" if isinstance(batches, Sized) else ""
        with progress.waiting("evaluating on held-out data") as far:
            for index, batch in enumerate(batches):
                far(f"batch {index + 1:,}{every}")
                placed = place_batch(batch, mesh)
                if objective.collect is not None:
                    placed = objective.collect(state, placed, jax.random.fold_in(key_of(index), COLLECTING))
                sums = sums_of(complete, placed, np.uint32(index))
                _add(totals, pending)
                pending = sums
                if ends():
                    return None
            _add(totals, pending)
        found = {
            name: total if weight is None else float(total / (weight or 1.0))
            for name, (total, weight) in totals.items()
        }
        return {name: float(value) for name, value in finalize(found).items() if np.ndim(value) == 0}

    return evaluate


def _add(totals: Totals, sums: dict) -> None:
    for name, (total, weight) in sums.items():
        total_before, weight_before = totals.get(name, (0.0, 0.0))
        total = total_before + np.asarray(total, np.float64)
        totals[name] = total, None if weight is None else (weight_before or 0.0) + float(weight)
