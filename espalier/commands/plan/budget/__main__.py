"""How much data and compute a model takes, before anything is prepared or rented: `./launch.sh plan budget`."""

from __future__ import annotations

import dataclasses
from typing import Any

from espalier import cli
from espalier.commands.plan.budget.budget import plan
from espalier.commands.plan.budget.settings import BudgetConfig
from espalier.commands.plan.budget.text import as_text


def main(config: BudgetConfig) -> dict[str, Any]:
    """Print the plan as text, or leave it to `--json`."""
    budget = plan(config)
    if not config.json:
        print(as_text(budget))
    return dataclasses.asdict(budget)


if __name__ == "__main__":
    cli.run_config(main, BudgetConfig, prog="plan budget")
