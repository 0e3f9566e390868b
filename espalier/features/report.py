"""The report of an autoencoder: how sparse and how faithful it is, how often features fire, and on which texts."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from espalier.report import page
from espalier.report.page import Section
from espalier.report.run_files import RunFiles
from espalier.report.task import TaskReport

SAMPLED = 40
"""Features of the report, drawn at random from those that fired: none was picked because it reads well."""
DENSITIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Bounds of the bars, as parts of the tokens."""


def sections(run: RunFiles) -> list[Section]:
    """How often features fire, and a sample of them."""
    found = run.jsonl("features.jsonl")
    if not found:
        return []
    alive = [row for row in found if row["texts"]]
    drawn = sorted(random.Random(0).sample(alive, min(SAMPLED, len(alive))), key=lambda row: row["feature"])
    note = (
        f"{len(drawn)} of the {len(alive):,} features that fired on the held-out text, drawn at random: none was "
        "picked because it reads well. Each with the texts that fire it most, the stronger the ground the stronger, "
        "and the words that it makes likelier where the head reads it alone. All of them are in features.jsonl; "
        f"./launch.sh look features {run.path.name} shows them."
    )
    return [densities(found), Section("Features and what fires them", cards(drawn), note, STYLE)]


def densities(found: Sequence[Mapping[str, Any]]) -> Section:
    """How many features fire on which part of the tokens."""
    bounds = (0.0, *DENSITIES, 1.1)
    names = ["less than 0.001 %", "0.001 to 0.01 %", "0.01 to 0.1 %", "0.1 to 1 %", "1 to 10 %", "more than 10 %"]
    counts = [
        sum(low <= row["density"] < high and row["density"] > 0 for row in found)
        for low, high in zip(bounds, bounds[1:], strict=False)
    ]
    bars = [(f"fire on {name}", count / len(found), f"{count:,}") for name, count in zip(names, counts, strict=True)]
    silent = sum(row["density"] == 0 for row in found)
    bars.append(("never fire", silent / len(found), f"{silent:,}"))
    note = f"The part of the {len(found):,} features that fire on so many of the tokens of the held-out text."
    return Section("How often features fire", page.bars(bars), note)


def cards(found: Sequence[Mapping[str, Any]]) -> str:
    """Features with the texts that fire them."""
    return f"<div class=features>{''.join(card(row) for row in found)}</div>"


def card(row: Mapping[str, Any]) -> str:
    strongest = max((max(text["values"]) for text in row["texts"]), default=1.0) or 1.0
    words = ", ".join(f"<bdi>{escape(_shown(word))}</bdi>" for word, rise in row["words"] if rise > 0)
    lines = []
    for text in row["texts"]:
        language = page.language("".join(text["tokens"]))
        parts = []
        for index, (token, value) in enumerate(zip(text["tokens"], text["values"], strict=True)):
            space = " " if token.startswith(" ") and index else ""
            shown = escape(_shown(token))
            if value > 0:
                part = f"--part:{100 * math.sqrt(value / strongest):.0f}%"
                shown = f"<b style='{part}' title='{value:.2f}'>{shown}</b>"
            parts.append(space + shown)
        lines.append(f"<li{language}>{''.join(parts)}</li>")
    note = f"fires on {_part(row['density'])} of the tokens{f'; words: {words}' if words else ''}"
    return (
        f"<article id=feature-{row['feature']}><h3>Feature {row['feature']:,}</h3><p class=note>{note}</p>"
        f"<ul>{''.join(lines)}</ul></article>"
    )


def _shown(token: str) -> str:
    return token.strip(" ").replace("\n", "↵") or "␣"


def _part(value: float) -> str:
    return page.percent(value, 3 if value < 1e-3 else 2 if value < 1e-1 else 1)


def tiles(run: RunFiles) -> list[tuple[str, str]]:
    """The figures of the last evaluation."""
    found = run.summary.get("eval") or {}
    named = (
        ("features a token (L0)", "l0", lambda x: f"{x:.1f}"),
        ("variance explained", "variance_explained", page.percent),
        ("cross-entropy recovered", "cross_entropy_recovered", page.percent),
        ("dead features", "dead", page.percent),
    )
    return [(name, write(found[key])) for name, key, write in named if key in found]


STYLE = """
.features article{border-top:1px solid var(--line);padding:.6rem 0}
.features h3{font-size:.95rem;margin:0}.features .note{margin:.1rem 0 .3rem}
.features ul{list-style:none;margin:0;padding:0}
.features li{padding:.1rem 0;font-size:.9rem;line-height:1.6;overflow-wrap:anywhere}
.features b{font-weight:400;border-radius:3px;padding:0 .1em;
background:color-mix(in srgb,#1b8a5a var(--part),transparent)}
"""

REPORT = TaskReport(
    title=lambda config: (
        f"Sparse autoencoder on layer {config.get('autoencoder', {}).get('layer')}"
        + (" of random weights" if config.get("autoencoder", {}).get("random") else "")
    ),
    unit="token",
    loss=lambda config: "mean squared error, of vectors whose numbers have mean square 1",
    sections=sections,
    tiles=tiles,
    words="whose stream a sparse autoencoder takes apart",
)
