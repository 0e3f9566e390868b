"""The runs as a table in the terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from espalier.runs.state import RUNNING, duration

HEAD = ("name", "task", "step", "loss", "metric", "tokens/s", "age", "state")
RIGHT = frozenset(("step", "loss", "tokens/s", "age"))
NAME = 48
"""Columns of a name at most: of a longer one the end is shown, where runs of one series differ."""


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """rows: Run.row of each. Chinese characters take two columns."""
    lines = [HEAD, *map(_cells, rows)]
    widths = [max(width(line[at]) for line in lines) for at in range(len(HEAD))]
    return "\n".join(
        "  ".join(_padded(cell, widths[at], HEAD[at] in RIGHT) for at, cell in enumerate(line)).rstrip()
        for line in lines
    )


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    step = f"{row['step']:,}" + (f"/{row['steps']:,}" if row["steps"] else "")
    metric = (
        "–"
        if row["metric"] is None
        else f"{'held-out ' * (row['metric'] == 'loss')}{row['metric']} {_short(row['value'])}"
    )
    state = row["state"]
    if row["state"] == RUNNING and row["left"] is not None:
        state += f", {duration(row['left'])} left"
    state += f": {row['note']}" if row["note"] else ""
    cells = (_name(row["name"]), row["task"] or "–", step, _short(row["loss"]), metric)
    return tuple(map(plain, (*cells, _short(row["tokens_per_second"]), duration(row["age"]), state)))


def plain(text: str) -> str:
    """Without characters that would move the cursor or colour the terminal: a name is any file name."""
    return "".join(c if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") else "\ufffd" for c in text)


def width(text: str) -> int:
    """Columns that it takes in a terminal."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _name(name: str) -> str:
    if width(name) <= NAME:
        return name
    end = name
    while width(end) > NAME - 1:
        end = end[1:]
    return f"…{end}"


def _padded(text: str, columns: int, right: bool) -> str:
    space = " " * (columns - width(text))
    return space + text if right else text + space


def _short(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
