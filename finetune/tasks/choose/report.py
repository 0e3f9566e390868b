"""The report of multiple choice: accuracies beside chance, accuracy of each paradigm, and the most confident mistakes.

predictions.jsonl  {"question", "choices", "label", "prediction", "probability", "log_likelihoods"} a line
paradigms.json     {file: accuracy}, where a folder of minimal pairs was read
"""

from __future__ import annotations

from espalier.report import page
from espalier.report.page import Section
from espalier.report.run_files import RunFiles
from espalier.report.task import TaskReport

MISTAKES = 8
ACCURACIES = {
    "accuracy_by_sum": "by log-likelihood",
    "accuracy_by_tokens": "divided by tokens",
    "accuracy_by_bytes": "divided by bytes",
    "baseline_accuracy": "chance",
}


def sections(run: RunFiles) -> list[Section]:
    found = []
    metrics = run.summary.get("metrics") or {}
    rows = [(words, metrics[name], "") for name, words in ACCURACIES.items() if name in metrics]
    if rows:
        found.append(Section("Accuracy", page.bars(rows), "How often the right choice has the highest score."))
    if paradigms := run.json("paradigms.json"):
        worst = sorted(paradigms.items(), key=lambda item: item[1])
        note = "Accuracy of each file of minimal pairs, the lowest first; chance is 50 %."
        found.append(Section("Paradigms", page.bars([(name, value, "") for name, value in worst]), note))
    predictions = run.jsonl("predictions.jsonl")
    wrong = [row for row in predictions if row["prediction"] != row["label"]]
    if wrong:
        wrong = sorted(wrong, key=lambda row: -row["probability"])
        counted = f"{len(wrong):,} mistakes in {len(predictions):,} questions"
        note = f"The most confident of {counted}; predictions.jsonl holds all."
        found.append(Section("Mistakes", page.entries(map(_mistake, wrong[:MISTAKES])), note))
    return found


def tiles(run: RunFiles) -> list[tuple[str, str]]:
    metrics = run.summary.get("metrics") or {}
    shown = [("accuracy", "accuracy"), ("chance", "baseline_accuracy")]
    return [(words, page.percent(metrics[name])) for words, name in shown if name in metrics]


def _mistake(row: dict) -> tuple[str, str, str]:
    # Isolated, so that a right-to-left choice does not reorder the words around it.
    title = f"\u2068{page.shortened(row['choices'][row['prediction']], 120)}\u2069"
    right = page.shortened(row["choices"][row["label"]], 120)
    text = f"{page.shortened(row['question'])} · right: {right}" if row["question"] else f"right: {right}"
    return title, page.percent(row["probability"], 0), text


REPORT = TaskReport(
    title=lambda config: "Multiple choice by likelihood",
    unit="question",
    sections=sections,
    tiles=tiles,
    pipeline="text-generation",
    loader="AutoModelForCausalLM",
    words="fine-tuned to choose answers by their likelihood",
    metric_names={name: f"accuracy {words}" for name, words in ACCURACIES.items()}
    | {"baseline_accuracy": "accuracy of chance"},
)
