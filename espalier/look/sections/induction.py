"""Induction heads, and how they come about over a run."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from espalier.look.induction import Induction
from espalier.look.sections import drawn
from espalier.look.sections.heads import names
from espalier.report.page import Section, grid

SHOWN = 6
"""Heads whose curve is drawn: those with the greatest score in the end."""


def sections(found: Mapping[int | None, Induction]) -> list[Section]:
    """found: step → scores, in order; None = the only one there is."""
    last = list(found.values())[-1]
    rows, columns = names(*last.score_LN.shape)
    note = (
        "Each row is random tokens, and the same again: on the second half an induction head looks at the token behind "
        "the first occurrence of the one it stands at (Olsson et al. 2022). 1 is always, chance is about 1 in the "
        "tokens so far. It needs a head before it that looks one token back."
    )
    maps = drawn.heat(last.score_LN, rows, columns, ("{:.2f}",))
    previous = drawn.heat(last.previous_LN, rows, columns, ("{:.2f}",))
    parts = [
        Section("Heads that continue what was there before", maps, note, drawn.STYLE),
        Section("Heads that look one token back", previous, "Their mean probability for it.", drawn.STYLE),
    ]
    if len(found) > 1:
        steps = [str(step) for step in found]
        ends = (f"step {steps[0]}", f"step {steps[-1]}")
        scores = np.stack([one.score_LN for one in found.values()])
        best = np.argsort(-last.score_LN, axis=None, kind="stable")[:SHOWN]
        curves = {
            f"{rows[at // len(columns)]}, head {columns[at % len(columns)]}": scores.reshape(len(found), -1)[:, at]
            for at in best
        }
        losses = {
            "first half": np.array([one.first for one in found.values()]),
            "second half": np.array([one.second for one in found.values()]),
        }
        drawing = grid(
            [
                drawn.lines("Induction score", curves, ends),
                drawn.lines("Loss, nats a token", losses, ends, percent=False),
            ]
        )
        said = f"One point a checkpoint, evenly spaced: {', '.join(steps)}."
        parts.insert(0, Section("Over the run", drawing, said, drawn.STYLE))
    return parts
