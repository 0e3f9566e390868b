"""report.html: a run as a page that a person can read, rendered from the files of its run directory alone.

    config.json        what was asked
    metrics.jsonl      training and evaluation over the steps
    summary.json       how it ended, and in which environment
    samples.json       masked LM: {"samples": [{"tokens": [str], "masked": [{"index": int, "truth": str, "guesses":
                       [[str, probability]]}]}], "unigram_entropy": nats}, a token with the blank before it (" word",
                       "ing"); causal LM: {"texts": [str]}
    confusion.json     {"labels": [str], "matrix": [[int]]}: rows are true labels
    predictions.jsonl  {"text", "text_b" for pairs, "label", "prediction", "probability"} a line
    comparison.json    {"title", "note", "rows": [{"name", "note", "value", "run"}]}: other runs (run = their path from
                       here, or null) and baselines beside this one; the first is shown in detail

All but config.json may be missing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from espalier.errors import UserError
from espalier.training import page
from espalier.training.figures import Bar, Curve, draw, legend
from espalier.training.page import Section
from espalier.training.run import RunDirectory

TASKS = {
    "masked_lm": "Masked language model",
    "causal_lm": "Causal language model",
    "sequence_classification": "Classifier",
}
MISTAKES = 8
"""How many of a classifier's surest mistakes are shown."""
LARGEST_MATRIX = 24
"""Labels beyond this make a confusion matrix that nobody reads."""


def write_report(run_dir: str | Path) -> Path:
    """Render (again) the report of a run; returns its path. UserError where there is no run."""
    run = read_run(run_dir)
    sections = [
        *comparison_sections(run),
        *loss_sections(run),
        *sample_sections(run),
        *classification_sections(run),
        *compared_run_sections(run),
        *curve_sections(run),
        *settings_sections(run),
    ]
    return page.write_page(run.path / "report.html", run.path.name, _subtitle(run), sections, page.tiles(_figures(run)))


@dataclass(frozen=True)
class RunFiles:
    """What the files of a run directory hold; empty where a file is missing."""

    path: Path
    config: dict
    metrics: list[dict]
    summary: dict
    samples: dict
    confusion: dict
    predictions: list[dict]
    comparison: dict

    def curve(self, metric: str, name: str, *, marked: bool = False) -> Curve | None:
        """The finite values of a metric over the steps, or None."""
        points = [(r["step"], r[metric]) for r in self.metrics if isinstance(r.get(metric), int | float)]
        points = [(step, value) for step, value in points if math.isfinite(value)]
        return Curve(name, *map(list, zip(*points, strict=True)), marked=marked) if points else None


def read_run(run_dir: str | Path) -> RunFiles:
    """The files of a run; UserError where there is no run or a file of it is damaged."""
    run = RunDirectory(run_dir)
    if not run.config.is_file():
        raise UserError(f"no run in {run.path} (it has no config.json); give a run directory, for instance runs/demo")
    names = ("config", "summary", "samples", "confusion", "comparison")
    files = {name: _json(run.path / f"{name}.json") for name in names}
    predictions = _jsonl(run.path / "predictions.jsonl")
    return RunFiles(path=run.path, metrics=_jsonl(run.metrics), predictions=predictions, **files)


def comparison_sections(run: RunFiles) -> list[Section]:
    """This run beside others and beside baselines, as bars."""
    rows = run.comparison.get("rows", [])
    if not rows:
        return []
    bars = page.bars([(row["name"], row["value"], row.get("note", "")) for row in rows])
    return [Section(run.comparison.get("title", "Comparison"), bars, run.comparison.get("note", ""))]


def loss_sections(run: RunFiles) -> list[Section]:
    """The loss with the held-out one, and the bar of the unigram entropy."""
    loss = [run.curve("loss", "training"), run.curve("eval/loss", "held-out", marked=True)]
    if not any(loss):
        return []
    entropy = run.samples.get("unigram_entropy")
    bar = Bar(f"word frequencies alone: {entropy:.2f}", entropy) if entropy else None
    label = "nats an example" if run.config.get("task") == "sequence_classification" else "nats a token"
    note = "The dashed line: what a model reaches that has learnt only how frequent each token is." if bar else ""
    return [Section("Loss", _picture(loss, label, bar=bar), note)]


def curve_sections(run: RunFiles) -> list[Section]:
    """Accuracy, bits a byte, learning rate, gradient norm and speed over the steps."""
    pictures = []
    for metric in ("accuracy", "bits_per_byte", "learning_rate", "gradient_norm", "tokens_per_second"):
        label = metric.replace("_per_", " a ").replace("_", " ")
        curves = [run.curve(metric, "training"), run.curve(f"eval/{metric}", "held-out", marked=True)]
        if any(curves):
            pictures.append(_picture(curves, label, wide=False))
    return [Section("On the way", page.grid(pictures))] if pictures else []


def sample_sections(run: RunFiles) -> list[Section]:
    """Masked words with the model's guesses, or texts that a causal model wrote."""
    sections = []
    if run.samples.get("samples"):
        masked = [slot for sample in run.samples["samples"] for slot in sample["masked"]]
        right = sum(slot["guesses"][:1] != [] and slot["guesses"][0][0] == slot["truth"] for slot in masked)
        note = (
            "Held-out text with hidden words, written as they stood; green where the first guess is right "
            f"({right} of {len(masked)}). Below each text: the hidden word, then the guesses with their probability."
        )
        sections.append(Section("Hidden words", page.masked_words(run.samples["samples"]), note))
    if run.samples.get("texts"):
        sections.append(Section("Texts it wrote", page.texts(run.samples["texts"]), "From an empty prompt."))
    return sections


def classification_sections(run: RunFiles) -> list[Section]:
    """Confusion matrix and the surest mistakes of a classifier."""
    sections = []
    labels = run.confusion.get("labels", [])
    if 0 < len(labels) <= LARGEST_MATRIX:
        total = sum(map(sum, run.confusion["matrix"]))
        note = f"{total:,} held-out examples: how many of each true label (row) were given each label (column)."
        sections.append(Section("Confusion matrix", page.confusion_table(labels, run.confusion["matrix"]), note))
    wrong = [p for p in run.predictions if p["label"] != p["prediction"]]
    if wrong:
        wrong = sorted(wrong, key=lambda p: -p["probability"])
        note = f"The surest of {len(wrong):,} mistakes among {len(run.predictions):,}; all are in predictions.jsonl."
        sections.append(Section("Mistakes", page.entries(map(_mistake, wrong[:MISTAKES])), note))
    return sections


def compared_run_sections(run: RunFiles) -> list[Section]:
    """Curves of the runs in the comparison, and what classifier the first of them became."""
    rows = run.comparison.get("rows", [])
    others = [(row["name"], read_run(run.path / row["run"])) for row in rows if row.get("run")]
    pictures = []
    for metric, label in (("eval/accuracy", "held-out accuracy"), ("loss", "training loss")):
        curves = [other.curve(metric, name, marked=metric.startswith("eval/")) for name, other in others]
        if any(curves):
            pictures.append(_picture(curves, label, wide=False))
    sections = [Section("The compared runs", page.grid(pictures))] if pictures else []
    for name, other in others[:1]:
        sections += [part._replace(title=f"{part.title}: {name}") for part in classification_sections(other)]
    return sections


def settings_sections(run: RunFiles) -> list[Section]:
    """What was asked, and where it ran."""
    sections = []
    if run.summary.get("data"):
        sections.append(Section("Text", page.settings(run.summary["data"])))
    asked = {name: value for name, value in run.config.items() if name != "published"}
    sections.append(Section("Settings", page.settings(asked)))
    if run.summary.get("environment"):
        sections.append(Section("Environment", page.settings(run.summary["environment"])))
    return sections


def _subtitle(run: RunFiles) -> str:
    config, summary = run.config, run.summary
    task = TASKS.get(config.get("task", ""), "Run")
    if config.get("labels"):
        task += f" with {len(config['labels'])} labels"
    if config.get("init_from"):
        task += f", {'the architecture' if config.get('scratch') else 'from the weights'} of {config['init_from']}"
        task += " with random weights" if config.get("scratch") else ""
    if not summary:
        return f"{task}. Not finished."
    steps = config.get("steps", summary["step"])
    # Less than the steps of a run that was extended since.
    state = "Finished" if summary.get("finished", True) and summary["step"] >= steps else "Paused"
    return f"{task}. {state} at step {summary['step']:,} of {steps:,}."


def _figures(run: RunFiles) -> list[tuple[str, str]]:
    """The figures at the head of the page: (name, value)."""
    summary = run.summary
    final = summary.get("metrics") or {}
    held_out = summary.get("eval") or {}
    labels = run.config.get("labels", [])
    candidates: list[tuple[str, Any, Callable[[Any], str]]] = [
        ("accuracy", final.get("accuracy"), page.percent),
        ("majority class", final.get("majority"), page.percent),
        (f"F1 of {labels[1]}" if len(labels) == 2 else "F1", final.get("f1"), page.percent),
        ("Matthews", final.get("matthews"), lambda x: f"{x:.3f}"),
        ("held-out loss", held_out.get("loss"), lambda x: f"{x:.3f}"),
        ("perplexity", held_out.get("perplexity"), page.number),
        ("bits a byte", held_out.get("bits_per_byte"), lambda x: f"{x:.3f}"),
        ("held-out accuracy", None if final else held_out.get("accuracy"), page.percent),
        ("parameters", summary.get("parameters"), page.number),
        ("tokens trained on", summary.get("tokens"), page.number),
        ("tokens a second", summary.get("tokens_per_second"), page.number),
        ("MFU", summary.get("mfu"), page.percent),
        ("waiting for data", summary.get("data_wait"), page.percent),
    ]
    return [(name, write(value)) for name, value, write in candidates if value is not None]


def _picture(curves: Sequence[Curve | None], label: str, *, bar: Bar | None = None, wide: bool = True) -> str:
    present = [curve for curve in curves if curve]
    last = ", ".join(f"{curve.name} {curve.values[-1]:.4g}" for curve in present)
    drawn = [draw(present, label, bar=bar, wide=form) for form in ((True, False) if wide else (False,))]
    said = f"{label} over the steps; last: {last}"
    return page.picture(drawn[0], said, legend(present, bar), drawn[1] if wide else None)


def _mistake(prediction: dict) -> tuple[str, str, str]:
    text = " / ".join(_short(prediction[name]) for name in ("text", "text_b") if prediction.get(name))
    # Isolated, so that a label that is written from right to left does not turn the words around it.
    title = "\u2068{label}\u2069, taken for \u2068{prediction}\u2069".format(**prediction)
    return title, page.percent(prediction["probability"], 0), text


def _short(text: str, limit: int = 240) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[:limit].rsplit(" ", 1)[0] + " …"


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete it and render the report again") from None


def _jsonl(path: Path) -> list[dict]:
    """The lines of the file, without those that were not written to their end."""
    # Not splitlines: JSON strings may hold other line separators of Unicode.
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return [record for record in records if isinstance(record, dict)]
