"""A run as tables for Python: records and plain dictionaries, which `pandas.DataFrame` takes as they are.

pandas.DataFrame(metrics("runs/demo")).query("split == 'evaluation'").plot(x="step", y="loss")
pandas.DataFrame([settings(run) for run in Path("runs").iterdir()])
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from espalier.report.run_files import read_run


def metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl in their order: `step`, `split`, and metrics, named alike in both splits.

    split: "training" (means over the steps since the record before; learning_rate of that step) or "evaluation" (on
    held-out data after the step). Losses are in nats. UserError where there is no run.
    """
    records = []
    for record in read_run(run_dir).metrics:
        evaluated = any(name.startswith("eval/") for name in record)
        values = {name.removeprefix("eval/"): value for name, value in record.items() if name != "step"}
        records.append({"step": record["step"], "split": "evaluation" if evaluated else "training"} | values)
    return records


def settings(run_dir: str | Path) -> dict[str, Any]:
    """What config.json holds, flat, with the names that flags have: {"optimizer.learning_rate": 0.0003, …}.

    Besides the settings: task, command, fingerprints and what else makes the run what it is. Lists stay lists.
    UserError where there is no run.
    """
    config = read_run(run_dir).config
    # The config.json of the published model that it started from, with names of its own.
    config.pop("published", None)
    return _flat(config)


def _flat(values: dict, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found
