"""What `import espalier` offers beside `load`: training, sweeps and plans from Python.

Configurations are those of the presets (`mlm.presets`, `clm.presets`, `finetune.presets`), changed by
`dataclasses.replace`; nothing here has settings of its own.
"""

from __future__ import annotations

import dataclasses
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
    from espalier.sweeps import sweep_tasks

    return sweep_tasks(config, seeds=seeds, learning_rates=learning_rates, objective=objective).sweep
