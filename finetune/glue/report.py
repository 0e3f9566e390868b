"""The table of a GLUE run as Markdown, and its page with a picture of every run."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from espalier.report import page
from espalier.report.page import Section

METRICS = {
    "matthews": "Matthews",
    "accuracy": "accuracy",
    "f1": "F1",
    "pearson": "Pearson",
    "spearman": "Spearman",
    "accuracy_mismatched": "accuracy mm",
}
HEAD = ("task", "metric", "median", "min", "max", "seeds", "rate", "epochs", "batch", "from")
WIDTH, ROW, LEFT = 720, 34, 84


def markdown(found: dict[str, Any]) -> str:
    """Scores in percent; the median, least and best of the chosen rate and epochs over its seeds."""
    rows = [[str(cell) for cell in _cells(name, row)] for name, row in found["tasks"].items()]
    average = ["**average**", "", f"**{100 * found['average']:.1f}**", *[""] * (len(HEAD) - 3)]
    widths = [max(len(row[at]) for row in [list(HEAD), *rows, average]) for at in range(len(HEAD))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [list(HEAD), ["-" * width for width in widths], *rows, average]
    ]
    notes = [f"Initialised from {found['init_from']}; protocol {found['protocol']}; {found['selection']}."]
    if found["missing"]:
        notes.append("Not run: " + "; ".join(f"{name} ({why})" for name, why in found["missing"].items()) + ".")
    return "\n".join([*lines, "", *notes, ""])


def write_page(folder: Path, found: dict[str, Any]) -> Path:
    """report.html of the whole grid."""
    tasks = found["tasks"]
    runs = sum(len(row["runs"]) for row in tasks.values())
    sections = [
        Section("Scores", _table(found), f"In percent, on GLUE's dev sets: {found['selection']}.", STYLE),
        Section(
            "Every run",
            _picture(tasks),
            "One dot a run: filled are the seeds of the chosen learning rate and epochs, the line is their median.",
            STYLE,
        ),
    ]
    grids = "".join(page.folded(f"{name}: {len(row['runs'])} runs", _runs(row)) for name, row in tasks.items())
    sections.append(Section("Grids", grids))
    if found["missing"]:
        items = ((name, "", why) for name, why in found["missing"].items())
        sections.append(Section("Not run", page.entries(items)))
    tiles = page.tiles(
        [
            ("average of the medians", page.percent(found["average"])),
            ("tasks", str(len(tasks))),
            ("runs", str(runs)),
            ("protocol", found["protocol"]),
        ]
    )
    return page.write_page(folder / "report.html", "GLUE", f"Fine-tuned from {found['init_from']}", sections, tiles)


def _cells(name: str, row: dict[str, Any]) -> list[str]:
    scores = [f"{100 * row[key]:.1f}" for key in ("median", "min", "max")]
    origin = "MNLI run" if f"{Path('mnli')}/rate" in row["init_from"] else "checkpoint"
    metrics = " and ".join(METRICS[metric] for metric in row["metrics"])
    numbers = [str(len(row["seeds"])), f"{row['learning_rate']:g}", f"{row['epochs']:g}", str(row["batch_size"])]
    return [name, metrics, *scores, *numbers, origin]


def _table(found: dict[str, Any]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in HEAD)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in _cells(name, row)) + "</tr>"
        for name, row in found["tasks"].items()
    )
    return f"<div class=scroll><table class=glue><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _runs(row: dict[str, Any]) -> str:
    items = (
        (
            f"{100 * run['score']:.1f}",
            f"rate {run['learning_rate']:g}, {run['epochs']:g} epochs, seed {run['seed']}",
            ", ".join(f"{METRICS[name]} {run['metrics'][name]:.4f}" for name in row["metrics"]),
        )
        for run in sorted(row["runs"], key=lambda run: -run["score"])
    )
    return page.entries(items)


def _picture(tasks: dict[str, Any]) -> str:
    """A row of dots for each task over one axis."""
    scores = [run["score"] for row in tasks.values() for run in row["runs"]]
    low, high = min(scores), max(scores)
    margin = max(0.02, (high - low) * 0.06)
    low, high = low - margin, high + margin

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - 12) * (value - low) / (high - low)

    height, parts = ROW * len(tasks) + 30, []
    for step in range(5):
        value = low + (high - low) * step / 4
        parts.append(f"<line class=grid x1={x(value):.1f} x2={x(value):.1f} y1=4 y2={height - 24} />")
        parts.append(f"<text class=tick x={x(value):.1f} y={height - 8}>{100 * value:.0f}</text>")
    for number, (name, row) in enumerate(tasks.items()):
        y = ROW * number + ROW / 2 + 2
        parts.append(f"<text x=0 y={y + 4:.1f}>{escape(name)}</text>")
        for run in row["runs"]:
            same = run["learning_rate"] == row["learning_rate"] and run["epochs"] == row["epochs"]
            title = (
                f"{100 * run['score']:.1f}: rate {run['learning_rate']:g}, {run['epochs']:g} epochs, seed {run['seed']}"
            )
            kind = "chosen" if same else "other"
            parts.append(
                f"<circle class={kind} cx={x(run['score']):.1f} cy={y:.1f} r=5><title>{escape(title)}</title></circle>"
            )
        middle = x(row["median"])
        parts.append(f"<line class=median x1={middle:.1f} x2={middle:.1f} y1={y - 11:.1f} y2={y + 11:.1f} />")
    label = "Scores of every run, a row of dots for each task"
    return (
        f"<div class=scroll><svg class=dots viewBox='0 0 {WIDTH} {height}' role=img aria-label='{label}'>"
        f"{''.join(parts)}</svg></div>"
    )


STYLE = """
.glue td,.glue th{padding:.35rem .7rem .35rem 0;border-bottom:1px solid var(--line);white-space:nowrap}
.glue th{font-weight:500;color:var(--soft)}.glue td:nth-child(3){font-weight:600}
.dots{width:100%;min-width:30rem;height:auto;font-size:13px}.dots text{fill:var(--ink)}
.dots .tick{fill:var(--soft);text-anchor:middle}.dots .grid{stroke:var(--line)}
.dots .other{fill:none;stroke:var(--bar);stroke-width:1.5}.dots .chosen{fill:var(--accent);fill-opacity:.75}
.dots .median{stroke:var(--accent);stroke-width:2.5}
"""
