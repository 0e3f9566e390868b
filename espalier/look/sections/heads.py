"""Which heads are needed, and what is left without the others."""

from __future__ import annotations

import numpy as np

from espalier.look.heads import ORDERS, Pruned, within_layers
from espalier.look.sections import drawn
from espalier.report.page import Section, grid


def sections(importance_LN: np.ndarray, curves: dict[str, Pruned], of: str) -> list[Section]:
    """of: what is right, in words: accuracy of classes."""
    layers, heads = importance_LN.shape
    rows, columns = names(layers, heads)
    note = (
        "How much the loss changes if a head's output is made a little smaller or larger, on average over the texts "
        "(Michel et al. 2019), divided by the length of its layer's row."
    )
    ends = ("all heads", "none")
    curve = {
        kind: {ORDERS[name]: getattr(found, kind) for name, found in curves.items()} for kind in ("nats_S", "right_S")
    }
    pruning = grid(
        [drawn.lines(of, curve["right_S"], ends), drawn.lines("Loss, nats", curve["nats_S"], ends, percent=False)]
    )
    pruned = (
        "Heads are taken out (their output is 0) and nothing is trained again. Where the first line stays level, the "
        "model does without these heads; the others say what another order would cost."
    )
    return [
        Section(
            "How important each head is", drawn.heat(within_layers(importance_LN), rows, columns), note, drawn.STYLE
        ),
        Section("Without the others", pruning, pruned, drawn.STYLE),
    ]


def names(layers: int, heads: int) -> tuple[list[str], list[str]]:
    """Of the rows and columns of a map of heads."""
    return [f"layer {layer + 1}" for layer in range(layers)], [f"{head + 1}" for head in range(heads)]
