"""The page that compares runs: one HTML file with its script and its data, which loads nothing from elsewhere.

Whatever comes from runs is data for the script, which shows it as text and never as HTML.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

from espalier.files import replacing
from espalier.page_policy import content_policy, meta
from espalier.report.style import STYLE
from espalier.runs.folder import Folder
from espalier.runs.metrics_log import thinned
from espalier.runs.run import Run

HERE = Path(__file__).parent
POINTS = 400_000
"""Of all curves of a page together; hundreds of runs have fewer points each."""
MOST, LEAST = 1000, 60
"""Points of a curve."""


def write(folder: Folder, path: Path) -> Path:
    """Write the page of the runs as they are at the last look; it links to the report of each."""
    data = snapshot(folder, path.absolute().parent)
    with replacing(path) as file:
        file.write(page_of(data))
    return path


def page_of(data: dict[str, Any]) -> str:
    """data: from `snapshot`."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    # Within <script>, no text may end the element or begin a comment; half a surrogate pair is no UTF-8.
    text = text.replace("<", "\\u003c").encode("utf-8", "replace").decode()
    page = (HERE / "page.html").read_text(encoding="utf-8")
    script = _script()
    # The data last, for they may hold what the others are put in place of.
    for mark, put in (
        ("<!--POLICY-->", meta(policy())),
        ("/*STYLE*/", STYLE),
        ("/*SCRIPT*/", script),
        ("/*DATA*/null", text),
    ):
        before, after = page.split(mark, 1)
        page = before + put + after
    return page


def policy() -> str:
    """What the page may do: run its own script, and ask the server that it comes from."""
    return content_policy([_script()], asks=True)


def _script() -> str:
    return "\n".join((HERE / name).read_text(encoding="utf-8") for name in ("chart.js", "runs.js"))


def snapshot(folder: Folder, beside: Path | None = None) -> dict[str, Any]:
    """JSON values. beside: the folder in which the page will lie; None = it is served (espalier.runs.app)."""
    now = time.time()
    runs = list(folder.runs.values())
    most = points_of_each(runs)
    return {
        "live": beside is None,
        "folder": str(folder.path),
        "time": now,
        "problems": folder.problems,
        "runs": [described(run, now, most, beside) for run in runs],
    }


def points_of_each(runs: list[Run]) -> int:
    curves = sum(len(run.log.series) for run in runs)
    return max(LEAST, min(MOST, POINTS // max(1, curves)))


def described(run: Run, now: float, most: int, beside: Path | None = None) -> dict[str, Any]:
    """Run.row, and what a page has more: settings, curves (thinned to about `most` points), samples."""
    row = run.row(now)
    report = None
    if row["report"]:
        path = run.path / "report.html"
        report = quote(os.path.relpath(path, beside)) if beside else f"report/{quote(run.name, safe='')}"
    curves = {}
    for name, series in sorted(run.log.series.items()):
        steps, values = thinned(series, most)
        curves[name] = [[int(step) for step in steps], [float(f"{value:.6g}") for value in values]]
    return row | {"report": report, "settings": run.settings, "curves": curves, "samples": run.samples}
