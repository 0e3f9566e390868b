"""What a training run needs before a chip is rented: `./launch.sh plan PRESET`, `plan budget` or `plan rollouts`."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from espalier import cli, progress
from espalier.commands.plan.settings import PRESETS

DESCRIPTION = """Memory, time and cost of a pretraining run before any chip is rented. With --topology v5e:4x4 the train
step is compiled by the TPU's own compiler on this machine; with --chip h100 --chips 8 it is worked out by analysis.
All flags of the preset may follow. `plan budget --help`: from a model size, a compute budget or a time limit to
tokens. `plan rollouts --help`: how fast completions are drawn, and what a step of reinforcement takes."""


def main(config: Any, call: cli.Call) -> dict:
    """Make the plan and print it; returns the `--json` object."""
    # What a slice needs is worked out on this machine's CPU, whatever else it has.
    import os

    os.environ["JAX_PLATFORMS"] = "cpu"
    what = "compiling for the slice" if config.topology else "working it out"
    with contextlib.nullcontext() if config.json else progress.waiting(what):
        from espalier.commands.plan.page import write_plan
        from espalier.commands.plan.planner import make_plan
        from espalier.commands.plan.text import as_text

        plan = make_plan(config, config)
        path = write_plan(config.run_dir, plan, call.command)
    if not config.json:
        print(as_text(plan))
        print(f"picture: {path}")
    return plan.as_json() | {"page": str(path)}


if __name__ == "__main__":
    if sys.argv[1:2] == ["rollouts"]:
        from espalier.commands.plan.rollouts import __main__ as rollouts

        cli.run_config(rollouts.main, rollouts.RolloutsConfig, prog="plan rollouts", argv=sys.argv[2:])
    elif sys.argv[1:2] == ["budget"]:
        from espalier.commands.plan.budget import __main__ as budget

        cli.run_config(budget.main, budget.BudgetConfig, prog="plan budget", argv=sys.argv[2:])
    else:
        cli.run(main, PRESETS, prog="plan", description=DESCRIPTION)
