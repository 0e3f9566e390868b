"""What `import espalier` offers beside `load`: training, sweeps and plans from Python.

Configurations are those of the presets (`mlm.presets`, `clm.presets`, `finetune.presets`), changed by
`dataclasses.replace`; nothing here has settings of its own.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from espalier.errors import UserError

if TYPE_CHECKING:
    from espalier.commands.plan.plan import Plan
    from espalier.training.sweep import Sweep


def train(config: Any, *, objective: Any = None) -> dict[str, Any]:
    """Run, or resume, what a configuration describes, as its command does; returns what `--json` prints.

    objective: one of your own for a pretraining, a function or a record (docs/own-objective.md). UserError where the
    run directory holds another run.

    >>> from dataclasses import replace
    >>> from mlm.presets import debug
    >>> config = debug()
    >>> data = replace(config.data, files=("text/*.txt",))
    >>> summary = train(replace(config, data=data, run_dir=run))
    >>> summary["finished"], sorted(summary["eval"])
    (True, ['accuracy', 'loss', 'perplexity'])
    """
    from espalier import assembly
    from sharding.processes.coordination import joined

    if config.run_dir is None:
        raise UserError(
            "the configuration has no run_dir; replace(config, run_dir='runs/NAME') says where the run goes"
        )
    return joined(assembly.train)(config, objective=objective)


def plan(config: Any, **chips: Any) -> Plan:
    """Memory, time and cost of a pretraining run before any chip is rented.

    chips: the fields of espalier.commands.plan.settings.PlanSettings: topology="v5e:4x4", or chip="h100", chips=8;
    tokens="10B", price=2.5. The plan's `as_json()` holds every figure.

    >>> from clm.presets import gpt2
    >>> figures = plan(gpt2(), chip="h100", chips=8).as_json()
    >>> figures["fits"], figures["basis"]
    (True, 'estimate')
    """
    from espalier.commands.plan.planner import make_plan
    from espalier.commands.plan.settings import PlanSettings

    known = [field.name for field in dataclasses.fields(PlanSettings)]
    if unknown := sorted(chips.keys() - set(known)):
        raise UserError(f"a plan has no setting {unknown[0]}; it has {', '.join(known)}")
    return make_plan(config, PlanSettings(**chips))


def sweep(config: Any, *, seeds: Sequence[int], learning_rates: Sequence[float], objective: Any = None) -> Sweep:
    """Every seed with every learning rate, trained at once in one program (espalier/training/sweep.py).

    Each is the run that `config` would be with that seed and rate, to float32 rounding. Nothing is written. All must
    fit into memory together. objective: as in `train`.

    >>> from dataclasses import replace
    >>> from mlm.presets import debug
    >>> config = debug()
    >>> config = replace(config, data=replace(config.data, files=("text/*.txt",)), steps=10)
    >>> found = sweep(config, seeds=(0, 1), learning_rates=(3e-4, 3e-3))
    >>> found.loss_SRs.shape, [(row["seed"], row["learning_rate"]) for row in found.rows]
    ((2, 2, 10), [(0, 0.0003), (0, 0.003), (1, 0.0003), (1, 0.003)])
    """
    import jax

    from espalier.assembly import opened
    from espalier.models.pretrained import load_weights
    from espalier.models.transformer import matrix_axes
    from espalier.training import sweep as training
    from espalier.training.start import run_keys
    from sharding.rules import shard_params

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

        return training.sweep(
            task.config,
            seeds=tuple(runs),
            learning_rates=learning_rates,
            params_of=params_of,
            matrix_axes=task.matrix_axes or matrix_axes,
            objective=task.objective,
            batch_of=lambda seed, step: runs[seed].task.batch(step),
            mesh=mesh,
            eval_batches=task.eval_batches,
            finalize_eval=task.finalize_eval,
        )
