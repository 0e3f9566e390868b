"""The report of learning from preferences: how often the chosen answer gains on the rejected one, and pairs.

predictions.jsonl  {"prompt", "chosen", "rejected", "logprob_chosen", "logprob_rejected"} a line, of single answers
                   {"prompt", "answer", "good", "logprob"}; beside them `reference_…`, where the run has a reference
"""

from __future__ import annotations

from espalier.report import page
from espalier.report.page import Section
from espalier.report.run_files import RunFiles
from espalier.report.task import TaskReport
from finetune.pairs_report import pairs_section


def sections(run: RunFiles) -> list[Section]:
    """How often the chosen answer is the likelier one, before and after, and pairs."""
    metrics, rows = run.summary.get("metrics") or {}, run.jsonl("predictions.jsonl")
    found = []
    if "baseline_likelier" in metrics:
        bars = [
            ("chosen is likelier", metrics["likelier"], "this model"),
            ("chosen is likelier", metrics["baseline_likelier"], "before"),
        ]
        note = (
            "Of the validation pairs, how often the chosen answer has the higher probability, summed over its tokens."
        )
        found.append(Section("Preferences", page.bars(bars), note))
    pairs = [row for row in rows if "chosen" in row]
    if pairs:
        note = "The pairs in which the rejected answer gained most, and those in which the chosen one did, with nats."
        found.append(pairs_section(pairs, _gain, "logprob", ".1f", note))
    return found


def tiles(run: RunFiles) -> list[tuple[str, str]]:
    """The metrics of the validation file."""
    metrics = run.summary.get("metrics") or {}
    found = [("accuracy", page.percent(metrics["accuracy"]))] if "accuracy" in metrics else []
    return found + [(name, page.number(metrics[name])) for name in ("margin", "kl") if name in metrics]


def _gain(row: dict) -> float:
    now = row["logprob_chosen"] - row["logprob_rejected"]
    return now - (row.get("reference_chosen", 0.0) - row.get("reference_rejected", 0.0))


REPORT = TaskReport(
    title=lambda config: "Tuned to preferences",
    unit="pair",
    sections=sections,
    tiles=tiles,
    pipeline="text-generation",
    loader="AutoModelForCausalLM",
    words="fine-tuned to write what is preferred",
    metric_names={
        "accuracy": "pairs whose chosen answer has the higher implicit reward",
        "margin": "implicit reward of the chosen answer less that of the rejected one",
        "kl": "nats an answer between the model and the one it started from",
        "likelier": "pairs whose chosen answer is the likelier one",
        "baseline_likelier": "of the model that it started from",
    },
)
