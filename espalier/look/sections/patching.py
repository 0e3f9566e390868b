"""Where the difference between two texts is made."""

from __future__ import annotations

from espalier.look.asked import Asked
from espalier.look.patching import Patching
from espalier.look.sections import drawn
from espalier.look.sections.heads import names
from espalier.report.page import Section

TITLES = {
    "stream": "The stream that enters a layer",
    "attention.out": "What attention adds",
    "mlp.out": "What the MLP adds",
    "attention.heads": "Each head, at all tokens",
}


def sections(first: Asked, second: Asked, found: Patching) -> list[Section]:
    layers, heads = found.restored["attention.heads"].shape
    rows, columns = names(layers, heads)
    tokens = [
        a.strip() if a == b else f"{a.strip()} / {b.strip()}" for a, b in zip(first.tokens, second.tokens, strict=True)
    ]
    note = (
        "The model reads the second text, and at one place gets what it computed on the first. 1 brings back the whole "
        f"difference between “{first.name.strip()}” and “{second.name.strip()}”, 0 nothing of it."
    )
    return [
        Section(
            title,
            drawn.heat(found.restored[place], rows, columns if place == "attention.heads" else tokens, ("{:.2f}",)),
            note if place == "stream" else "",
            drawn.STYLE,
        )
        for place, title in TITLES.items()
    ]
