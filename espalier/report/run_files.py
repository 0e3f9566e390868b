"""The files of a run directory, as far as they exist.

    config.json        the settings
    metrics.jsonl      training and evaluation over the steps
    summary.json       the results and the environment
    sessions.jsonl     where the time of each start went (espalier/goodput.py)
    comparison.json    {"title", "note", "rows": [{"name", "note", "value", "run"}]}: other runs (run = their path
                       within this one, or null) and baselines; the first is shown in detail

All but config.json may be missing. A task adds files of its own (samples.json, predictions.jsonl), which its sections
read by `RunFiles.json` and `RunFiles.jsonl`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from espalier.errors import UserError
from espalier.redaction import recorded
from espalier.report.figures import Curve


@dataclass(frozen=True)
class RunFiles:
    """The contents of the files of a run directory; empty if a file is missing."""

    path: Path
    config: dict
    metrics: list[dict]
    summary: dict
    comparison: dict

    def json(self, name: str) -> dict:
        """The object in a file of the run; {} if there is no file, UserError if it is damaged."""
        return _json(self.path / name)

    def jsonl(self, name: str) -> list[dict]:
        """The objects in the lines of a file of the run, without incomplete lines; [] if there is no file."""
        return _jsonl(self.path / name)

    def curve(self, metric: str, name: str, *, marked: bool = False) -> Curve | None:
        """The finite values of a metric over the steps, or None."""
        points = [(r["step"], r[metric]) for r in self.metrics if isinstance(r.get(metric), int | float)]
        points = [(step, value) for step, value in points if math.isfinite(value)]
        return Curve(name, *map(list, zip(*points, strict=True)), marked=marked) if points else None


def read_run(run_dir: str | Path) -> RunFiles:
    """The files of a run; UserError if there is no run or one of its files is damaged."""
    path = Path(run_dir).expanduser().absolute()
    if not (path / "config.json").is_file():
        raise UserError(f"no run in {path} (it has no config.json); give a run directory, for instance runs/demo")
    config, summary, comparison = (_json(path / f"{name}.json") for name in ("config", "summary", "comparison"))
    # Runs of earlier versions may hold some.
    config, summary = recorded(config), recorded(summary)
    return RunFiles(path, config, _jsonl(path / "metrics.jsonl"), summary, comparison)


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and render the report again") from None


def _jsonl(path: Path) -> list[dict]:
    """The objects in the lines of the file, without incomplete lines."""
    # Not splitlines: JSON strings may contain other line separators of Unicode.
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [record for record in records if isinstance(record, dict)]
