"""The section of a report that shows pairs of a chosen and a rejected answer: those that went worst, and best."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from espalier.report import page
from espalier.report.page import Section

SHOWN = 8
"""How many pairs are shown."""


def pairs_section(rows: Sequence[dict], gain: Callable[[dict], float], value: str, form: str, note: str) -> Section:
    """The rows with the lowest and with the highest gain.

    rows: `prompt`, `chosen`, `rejected`, and VALUE_chosen and VALUE_rejected, which are shown in this format.
    """
    rows = sorted(rows, key=gain)
    shown = rows if len(rows) <= SHOWN else rows[: SHOWN // 2] + rows[-(SHOWN // 2) :]

    def said(row: dict, which: str) -> str:
        return f"{which} {row[f'{value}_{which}']:{form}}: {page.shortened(row[which])}"

    bodies = page.entries((said(row, "chosen"), said(row, "rejected"), page.shortened(row["prompt"])) for row in shown)
    return Section("Pairs", bodies, note)
