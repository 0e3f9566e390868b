"""Evaluation on held-out batches: sums and weights added up over all of them, divided once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from espalier import progress
from espalier.training.step import Objective, make_eval_step
from sharding.mesh import place_batch

EVAL_SEED = 20_250_101
"""Draws the masks of evaluations: the same in every run with batches of this size, whatever its seed."""


def make_evaluate(
    objective: Objective,
    batches: Iterable[dict],
    mesh: Mesh,
    finalize: Callable[[dict[str, float]], dict[str, float]] = dict,
    accumulation: int = 1,
) -> Callable[[Any], dict[str, float]]:
    """Complete params → metrics over all `batches` (this process's rows, NumPy); they are gone through at every call.

    finalize: metrics → metrics with what follows from them (perplexity = exp loss).
    """
    eval_step = make_eval_step(objective, accumulation)

    @jax.jit
    def sums_of(params, batch, index):
        return eval_step(params, batch, jax.random.fold_in(jax.random.key(EVAL_SEED), index))

    def evaluate(params: Any) -> dict[str, float]:
        totals: dict[str, np.ndarray] = {}
        pending: dict = {}
        every = f" of {len(batches):,}" if isinstance(batches, Sized) else ""
        with progress.waiting("evaluating on held-out data") as far:
            for index, batch in enumerate(batches):
                far(f"batch {index + 1:,}{every}")
                sums = sums_of(params, place_batch(batch, mesh), np.uint32(index))
                _add(totals, pending)
                pending = sums
            _add(totals, pending)
        return finalize({name: float(total / (weight or 1.0)) for name, (total, weight) in totals.items()})

    return evaluate


def _add(totals: dict[str, np.ndarray], sums: dict) -> None:
    for name, pair in sums.items():
        totals[name] = totals.get(name, np.zeros(2)) + np.array([float(part) for part in pair])
