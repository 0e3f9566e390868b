"""The report of a reward model: how often it prefers what people prefer, how surely, and pairs.

predictions.jsonl  {"prompt", "chosen", "rejected", "score_chosen", "score_rejected"} a line
"""

from __future__ import annotations

from espalier.report import page
from espalier.report.page import Section
from espalier.report.run_files import RunFiles
from espalier.report.task import TaskReport
from finetune.pairs_report import pairs_section


def sections(run: RunFiles) -> list[Section]:
    """Accuracy beside that of the longer answer, and the pairs that are judged most against the file."""
    metrics, rows = run.summary.get("metrics") or {}, run.jsonl("predictions.jsonl")
    found = []
    if "baseline_accuracy" in metrics:
        bars = [
            ("accuracy", metrics["accuracy"], "this model"),
            ("accuracy", metrics["baseline_accuracy"], "the longer answer"),
        ]
        note = "Of the validation pairs, how often the chosen answer has the higher score; equal scores count half."
        found.append(Section("Preferences", page.bars(bars), note))
    if rows:
        note = (
            "The pairs judged most against the file, and those judged most clearly as in it; predictions.jsonl has all."
        )
        found.append(pairs_section(rows, lambda row: row["score_chosen"] - row["score_rejected"], "score", ".2f", note))
    return found


def tiles(run: RunFiles) -> list[tuple[str, str]]:
    """The metrics of the validation file."""
    metrics = run.summary.get("metrics") or {}
    shown = [("accuracy", "accuracy"), ("of the longer answer", "baseline_accuracy")]
    found = [(words, page.percent(metrics[name])) for words, name in shown if name in metrics]
    return found + ([("margin", page.number(metrics["margin"]))] if "margin" in metrics else [])


REPORT = TaskReport(
    title=lambda config: "Reward model",
    unit="pair",
    sections=sections,
    tiles=tiles,
    pipeline="text-classification",
    loader="AutoModelForSequenceClassification",
    words="fine-tuned to score answers as people prefer them",
    metric_names={
        "accuracy": "pairs whose chosen answer has the higher score",
        "margin": "score of the chosen answer less that of the rejected one",
        "baseline_accuracy": "accuracy of preferring the longer answer",
    },
)
