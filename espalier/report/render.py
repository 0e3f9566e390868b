"""report.html: a run as a page for people, rendered from the files of its run directory alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from espalier.files import inside
from espalier.report import page
from espalier.report.figures import Bar, Curve, draw, legend
from espalier.report.page import Section
from espalier.report.run_files import RunFiles, read_run
from espalier.report.sessions import session_sections
from espalier.report.task import loss_words, report_of

CURVES = ("accuracy", "bits_per_byte", "learning_rate", "gradient_norm", "tokens_per_second")
"""Metrics beside the loss that are drawn, in this order; those that only some tasks have follow them."""
NOT_DRAWN = frozenset(("step", "loss", "perplexity", "mfu"))
"""The loss has a section of its own, perplexity is its exponential, MFU is proportional to the tokens per second."""
FAR = 4
"""Folders above a run in which the page of all runs is looked for."""
LINK = "section a{color:var(--accent)}"


def write_report(run_dir: str | Path) -> Path:
    """Render (again) the report of a run; returns its path. UserError where there is no run."""
    run = read_run(run_dir)
    sections = [
        *comparison_sections(run),
        *loss_sections(run),
        *report_of(run.config).sections(run),
        *compared_run_sections(run),
        *curve_sections(run),
        *session_sections(run),
        *settings_sections(run),
        all_runs_section(run.path),
    ]
    return page.write_page(run.path / "report.html", run.path.name, subtitle(run), sections, page.tiles(tiles(run)))


def comparison_sections(run: RunFiles) -> list[Section]:
    """This run, other runs and baselines as bars."""
    rows = run.comparison.get("rows", [])
    if not rows:
        return []
    bars = page.bars([(row["name"], row["value"], row.get("note", "")) for row in rows])
    return [Section(run.comparison.get("title", "Comparison"), bars, run.comparison.get("note", ""))]


def loss_sections(run: RunFiles) -> list[Section]:
    """Training and held-out loss, and the baseline of the task as a dashed line."""
    loss = [run.curve("loss", "training"), run.curve("eval/loss", "held-out", marked=True)]
    if not any(loss):
        return []
    task = report_of(run.config)
    bar, note = task.baseline(run) or (None, "")
    return [Section("Loss", _picture(loss, loss_words(task, run.config), bar=bar), note)]


def compared_run_sections(run: RunFiles) -> list[Section]:
    """Curves of the runs in the comparison, and the sections of the first of them."""
    rows = run.comparison.get("rows", [])
    named = [row for row in rows if row.get("run")]
    others = [(row["name"], read_run(inside(run.path, row["run"], run.path / "comparison.json"))) for row in named]
    pictures = []
    for metric, label in (("eval/accuracy", "held-out accuracy"), ("loss", "training loss")):
        curves = [other.curve(metric, name, marked=metric.startswith("eval/")) for name, other in others]
        if any(curves):
            pictures.append(_picture(curves, label, wide=False))
    sections = [Section("The compared runs", page.grid(pictures))] if pictures else []
    for name, other in others[:1]:
        shown = report_of(other.config).sections(other)
        sections += [part._replace(title=f"{part.title}: {name}") for part in shown]
    return sections


def curve_sections(run: RunFiles) -> list[Section]:
    """The other metrics over the steps."""
    logged = {name.removeprefix("eval/") for record in run.metrics for name in record}
    pictures = []
    for metric in (*CURVES, *sorted(logged - NOT_DRAWN - {*CURVES})):
        curves = [run.curve(metric, "training"), run.curve(f"eval/{metric}", "held-out", marked=True)]
        if any(curves):
            pictures.append(_picture(curves, metric.replace("_", " "), wide=False))
    return [Section("During training", page.grid(pictures))] if pictures else []


def settings_sections(run: RunFiles) -> list[Section]:
    """Settings and environment."""
    sections = []
    if run.summary.get("data"):
        sections.append(Section("Text", page.settings(run.summary["data"])))
    asked = {name: value for name, value in run.config.items() if name != "published"}
    sections.append(Section("Settings", page.settings(asked)))
    if run.summary.get("environment"):
        sections.append(Section("Environment", page.settings(run.summary["environment"])))
    return sections


def all_runs_section(path: Path) -> Section:
    """A link to the page that compares this run with others (`./launch.sh runs`), which lies in a folder above it."""
    above = [folder / "runs.html" for folder in path.parents]
    depth = next((depth for depth, there in enumerate(above[:FAR], 1) if there.is_file()), 1)
    link = f'<p><a href="{"../" * depth}runs.html">All runs on one page</a></p>'
    note = (
        f"Curves over each other, settings that differ; `./launch.sh runs {path.parent.name} --html` writes the page."
    )
    return Section("Beside other runs", link, note, LINK)


def subtitle(run: RunFiles) -> str:
    """What was trained, from which weights, and how far."""
    config, summary = run.config, run.summary
    text = report_of(config).title(config)
    if own := config.get("user_code", {}).get("objective"):
        text += f", by the objective {own['name']} of {Path(own['file']).name}"
    if config.get("init_from"):
        text += f", {'the architecture' if config.get('scratch') else 'from the weights'} of {config['init_from']}"
        text += " with random weights" if config.get("scratch") else ""
    if not summary:
        return f"{text}. Not finished."
    steps = config.get("steps", summary["step"])
    # A run that was extended later has not reached its steps.
    state = "Finished" if summary.get("finished", True) and summary["step"] >= steps else "Paused"
    if best := summary.get("best"):
        text += f"; the best by {best['metric']} is of step {best['step']:,}"
        state = "Ended early" if best["ended"] and state == "Paused" else state
    return f"{text}. {state} at step {summary['step']:,} of {steps:,}."


def tiles(run: RunFiles) -> list[tuple[str, str]]:
    """The figures at the head of the page: (name, value)."""
    summary, own = run.summary, report_of(run.config).tiles(run)
    held_out, final = summary.get("eval") or {}, summary.get("metrics") or {}
    shown = any(name.startswith("accuracy") for name, _ in own)
    others = sorted(held_out.keys() - final.keys() - {"loss", "perplexity", "bits_per_byte", "accuracy"})
    candidates: list[tuple[str, Any, Callable[[Any], str]]] = [
        ("held-out loss", held_out.get("loss"), lambda x: f"{x:.3f}"),
        ("perplexity", held_out.get("perplexity"), page.number),
        ("bits per byte", held_out.get("bits_per_byte"), lambda x: f"{x:.3f}"),
        ("held-out accuracy", None if shown else held_out.get("accuracy"), page.percent),
        *((f"held-out {name.replace('_', ' ')}", held_out[name], page.number) for name in others),
        ("parameters", summary.get("parameters"), page.number),
        ("tokens trained on", summary.get("tokens"), page.number),
        ("tokens per second", summary.get("tokens_per_second"), page.number),
        ("MFU", summary.get("mfu"), page.percent),
        ("waiting for data", summary.get("data_wait"), page.percent),
        ("skipped batches", summary.get("skipped_batches"), page.number),
    ]
    return own + [(name, write(value)) for name, value, write in candidates if value is not None]


def _picture(curves: Sequence[Curve | None], label: str, *, bar: Bar | None = None, wide: bool = True) -> str:
    present = [curve for curve in curves if curve]
    last = ", ".join(f"{curve.name} {curve.values[-1]:.4g}" for curve in present)
    drawn = [draw(present, label, bar=bar, wide=form) for form in ((True, False) if wide else (False,))]
    said = f"{label} over the steps; last: {last}"
    return page.picture(drawn[0], said, legend(present, bar), drawn[1] if wide else None)
