"""The report of an instruction tuning: figures of the answers, and some of them beside what was wanted.

predictions.jsonl  {"prompt", "reference", "prediction"} a line
"""

from __future__ import annotations

from espalier.report import page
from espalier.report.page import Section
from espalier.report.run_files import RunFiles
from espalier.report.task import TaskReport

SHOWN = 12
"""How many answers are shown."""


def sections(run: RunFiles) -> list[Section]:
    """Answers beside their references."""
    rows = run.jsonl("predictions.jsonl")
    if not rows:
        return []
    spaced = rows[:: max(1, len(rows) // SHOWN)][:SHOWN]
    bodies = page.entries(
        (
            page.shortened(row["prediction"], 300) or "(nothing)",
            f"wanted: {page.shortened(row['reference'], 300)}",
            page.shortened(asked(row["prompt"]), 300),
        )
        for row in spaced
    )
    note = f"{len(spaced)} of {len(rows):,} answers to the validation file; predictions.jsonl holds all."
    return [Section("Answers", bodies, note)]


def tiles(run: RunFiles) -> list[tuple[str, str]]:
    """The metrics of the validation file."""
    final = run.summary.get("metrics") or {}
    shown = [
        ("BLEU", final.get("bleu"), lambda x: f"{x:.1f}"),
        ("chrF", final.get("chrf"), lambda x: f"{x:.1f}"),
        ("ROUGE-L", final.get("rougeL"), lambda x: f"{x:.1f}"),
        ("perplexity of answers", final.get("perplexity"), page.number),
    ]
    return [(name, write(value)) for name, value, write in shown if value is not None]


def asked(prompt: object) -> str:
    """A prompt as one text: fields of a template, or the turns of a chat."""
    if isinstance(prompt, dict):
        return " / ".join(map(str, prompt.values()))
    if isinstance(prompt, list):
        return " / ".join(str(message["content"]) for message in prompt)
    return str(prompt)


REPORT = TaskReport(
    title=lambda config: "Tuned to answer",
    unit="token of an answer",
    sections=sections,
    tiles=tiles,
    pipeline="text-generation",
    loader="AutoModelForCausalLM",
    words="fine-tuned to answer",
    metric_names={
        "loss": "nats per token of an answer",
        "bleu": "BLEU (sacrebleu)",
        "chrf": "chrF (sacrebleu)",
        "baseline_bleu": "BLEU of the source itself",
        "baseline_chrf": "chrF of the source itself",
        "rouge1": "ROUGE-1",
        "rouge2": "ROUGE-2",
        "rougeL": "ROUGE-L",
    },
)
