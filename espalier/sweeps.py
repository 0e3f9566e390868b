"""Configuration → every seed with every learning rate, trained at once (training/sweep.py)."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from espalier.assembly import opened
from espalier.errors import UserError
from espalier.models.pretrained import load_weights
from espalier.models.transformer import layer_depths, matrix_axes
from espalier.task import Task
from espalier.training import sweep as training
from espalier.training.start import run_keys
from sharding.rules import shard_params


class Swept(NamedTuple):
    """What came of a sweep."""

    sweep: training.Sweep
    tasks: dict[int, Task]
    """By seed."""
    mesh: Mesh


def sweep_tasks(
    config: Any,
    *,
    seeds: Sequence[int],
    learning_rates: Sequence[float],
    objective: Any = None,
    evaluated: bool = True,
) -> Swept:
    """Arguments as in `espalier.sweep`. evaluated: measure every run at its end by the evaluation of a training.
    UserError where a task cannot be swept."""
    with tempfile.TemporaryDirectory(prefix="espalier-sweep-") as folder:
        # Where a run would go: there is none, so every seed begins at its beginning.
        config = dataclasses.replace(config, run_dir=f"{folder}/none")
        runs = {
            seed: opened(dataclasses.replace(config, seed=seed), objective=objective) for seed in dict.fromkeys(seeds)
        }
        if not runs:
            raise UserError("a sweep needs one or more seeds")
        first = next(iter(runs.values()))
        task, mesh, origin = first.task, first.mesh, first.origin
        if task.frozen is not None:
            raise UserError("a sweep has no place for frozen parameters; train the runs one by one")
        init = jax.jit(task.init_params)

        def params_of(seed: int) -> Any:
            if origin is None or task.scratch:
                return init(run_keys(seed)[0])
            shapes = jax.eval_shape(task.init_params, jax.random.key(0))
            layout = shard_params(shapes, mesh)
            abstract = jax.tree.map(
                lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, layout
            )
            return load_weights(origin, task.model, first.record.head, task.init_params, seed)(abstract)

        swept = training.sweep(
            task.config,
            seeds=tuple(runs),
            learning_rates=learning_rates,
            params_of=params_of,
            matrix_axes=task.matrix_axes or matrix_axes,
            depths=partial(layer_depths, task.model) if not task.part else None,
            objective=task.objective,
            batch_of=lambda seed, step: runs[seed].task.batch(step),
            mesh=mesh,
            eval_batches=task.eval_batches if evaluated else (),
            finalize_eval=task.finalize_eval,
        )
        return Swept(swept, {seed: run.task for seed, run in runs.items()}, mesh)
