"""Features of an autoencoder and what fires them: `./launch.sh look features RUN`, RUN of `./launch.sh features`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier import progress
from espalier.commands.look import pages
from espalier.errors import UserError

if TYPE_CHECKING:
    from espalier.report.run_files import RunFiles

MOST = 1000
"""Features on a page, which then has about 4 MB."""


@dataclass(frozen=True)
class FeaturesConfig:
    """Features of a sparse autoencoder: `look features RUN` writes a page of what fires each on held-out text."""

    run: str
    """Run directory of `./launch.sh features`."""
    numbers: tuple[int, ...] = ()
    """Which features; unset = `count` of them from `first` on."""
    first: int = 0
    """The first that is shown."""
    count: int = 200
    """How many are shown, those that never fired left out."""
    text: str | None = None
    """Instead, what fires in this text, the strongest features first."""
    beside: str | None = None
    """Run directory of another autoencoder, whose figures stand beside: that of random weights, the control."""
    output: str = "features.html"
    """The page."""
    json: bool = False
    """Print one JSON object as the last line of standard output."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self):
        pages.page_path(self.output)
        if not 1 <= self.count <= MOST:
            raise UserError(f"count={self.count} must lie between 1 and {MOST:,}; --first goes on from there")
        if self.first < 0:
            raise UserError(f"first={self.first} must be at least 0")


def main(config: FeaturesConfig) -> dict[str, Any]:
    """Write the page; returns the `--json` object."""
    from espalier.features.report import STYLE, cards, densities
    from espalier.report import page
    from espalier.report.page import Section

    run, found = _read(config.run)
    runs = [(config.run, run)] + ([(config.beside, _read(config.beside)[0])] if config.beside else [])
    by_number = {row["feature"]: row for row in found}
    if unknown := [number for number in config.numbers if number not in by_number]:
        raise UserError(f"--numbers {unknown[0]}: {config.run} has features 0 to {len(found) - 1}")
    if config.text is not None:
        with progress.waiting("reading the text"):
            shown = _in_text(config, by_number)
        title = "What fires in the text"
    else:
        alive = (row for row in found[config.first :] if row["texts"])
        chosen = [by_number[number] for number in config.numbers]
        shown = chosen or [row for row, _ in zip(alive, range(config.count), strict=False)]
        title = "Features and what fires them"
    note = (
        "The stronger the ground, the stronger the feature fires at a token. Words are those that it makes likelier "
        "where the model's head reads it alone, on top of the mean stream."
    )
    sections = [_figures(runs), densities(found), Section(title, cards(shown), note, STYLE)]
    path = page.write_page(Path(config.output).expanduser(), "Features", f"Of {config.run}", sections)
    progress.block({"features": f"{len(shown):,} of {len(found):,}", "page": str(path)})
    return {"features": [row["feature"] for row in shown], "page": str(path)}


def _read(folder: str) -> tuple[RunFiles, list[dict]]:
    from espalier.features.examples import FEATURES
    from espalier.report.run_files import read_run

    run = read_run(folder)
    if not (found := run.jsonl(FEATURES)):
        raise UserError(f"{folder} has no {FEATURES}; give a run that `./launch.sh features` brought to its end")
    return run, found


def _figures(runs: Sequence[tuple[str, RunFiles]]) -> Any:
    """What was measured on held-out text, a column a run."""
    from html import escape

    from espalier.features.report import tiles
    from espalier.report.page import Section

    names = "".join(f"<th scope=col>{escape(Path(name).name)}</th>" for name, _ in runs)
    columns = [dict(tiles(run)) for _, run in runs]
    rows = ""
    for name in columns[0]:
        cells = "".join(f"<td>{escape(column.get(name, '–'))}</td>" for column in columns)
        rows += f"<tr><th scope=row>{escape(name)}</th>{cells}</tr>"
    table = f"<table class=figures><thead><tr><th></th>{names}</tr></thead><tbody>{rows}</tbody></table>"
    note = "An autoencoder on random weights says how much of this needs no trained model." if len(runs) > 1 else ""
    style = ".figures th,.figures td{padding:.2rem 1.2rem .2rem 0;text-align:left;vertical-align:top}"
    return Section("On held-out text", f"<div class=scroll tabindex=0>{table}</div>", note, style)


def _in_text(config: FeaturesConfig, by_number: dict[int, dict]) -> list[dict]:
    """The features that fire in the text, as rows of features.jsonl whose first text it is."""
    import numpy as np

    from espalier.features.use import features_of

    tokens, f_TF = features_of(config.run, config.text or "")
    best_F = f_TF.max(0)
    fired = [int(number) for number in np.argsort(-best_F, kind="stable") if best_F[number] > 0][: config.count]
    shown = []
    for number in config.numbers or fired:
        values = [round(float(value), 3) for value in f_TF[:, number]]
        own = {"at": int(np.argmax(f_TF[:, number])), "tokens": tokens, "values": values}
        row = by_number[number]
        shown.append(row | {"texts": [own, *row["texts"][:3]]})
    return shown
