"""The report of a classifier: metrics, confusion matrix and the most confident mistakes.

confusion.json     {"labels": [str], "matrix": [[int]]}: rows are true labels
predictions.jsonl  {"text", "text_b" for pairs, "label", "prediction", "probability"} a line
"""

from __future__ import annotations

from collections.abc import Sequence

from espalier.report import page
from espalier.report.page import Section
from espalier.report.run_files import RunFiles
from espalier.report.task import TaskReport

MISTAKES = 8
"""How many mistakes are shown."""
LARGEST_MATRIX = 24
"""A confusion matrix of more labels is not shown."""


def sections(run: RunFiles) -> list[Section]:
    """Confusion matrix and the most confident mistakes."""
    found = []
    confusion, predictions = run.json("confusion.json"), run.jsonl("predictions.jsonl")
    labels = confusion.get("labels", [])
    if 0 < len(labels) <= LARGEST_MATRIX:
        total = sum(map(sum, confusion["matrix"]))
        note = f"{total:,} held-out examples by true label (row) and predicted label (column)."
        found.append(Section("Confusion matrix", confusion_table(labels, confusion["matrix"]), note, STYLE))
    wrong = [p for p in predictions if p["label"] != p["prediction"]]
    if wrong:
        wrong = sorted(wrong, key=lambda p: -p["probability"])
        counted = f"{len(wrong):,} mistakes in {len(predictions):,} predictions"
        note = f"The most confident of {counted}; predictions.jsonl holds all."
        found.append(Section("Mistakes", page.entries(map(_mistake, wrong[:MISTAKES])), note))
    return found


def tiles(run: RunFiles) -> list[tuple[str, str]]:
    """The metrics of the whole validation file."""
    final, labels = run.summary.get("metrics") or {}, run.config.get("labels", [])
    shown = [
        ("accuracy", final.get("accuracy"), page.percent),
        ("majority class", final.get("majority"), page.percent),
        (f"F1 of {labels[1]}" if len(labels) == 2 else "F1", final.get("f1"), page.percent),
        ("Matthews", final.get("matthews"), lambda x: f"{x:.3f}"),
    ]
    return [(name, write(value)) for name, value, write in shown if value is not None]


def title(config: dict) -> str:
    labels = config.get("labels")
    return f"Classifier with {len(labels)} labels" if labels else "Classifier"


def confusion_table(labels: Sequence[str], matrix: Sequence[Sequence[int]]) -> str:
    """Rows are true labels, columns predicted labels; the shade is the fraction of the row."""
    head = "".join(f"<th>{page.marked('span', label)}</th>" for label in labels)
    turned = " class=tall" if len(labels) > 5 or max(map(len, labels)) > 12 else ""
    rows = []
    for i, (label, counts) in enumerate(zip(labels, matrix, strict=True)):
        total = max(sum(counts), 1)
        cells = "".join(
            f"<td class={'hit' if i == j else 'miss'} style='--part:{100 * count / total:.0f}%'>{count or '·'}</td>"
            for j, count in enumerate(counts)
        )
        recall = page.percent(counts[i] / total, 0)
        rows.append(f"<tr>{page.marked('th', label)}{cells}<td class=sum>{recall}</td></tr>")
    return (
        f"<div class=scroll><table class=confusion><thead{turned}><tr><td class=corner>true ↓ &nbsp;predicted →</td>"
        f"{head}<th><span>recall</span></th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _mistake(prediction: dict) -> tuple[str, str, str]:
    text = " / ".join(_short(prediction[name]) for name in ("text", "text_b") if prediction.get(name))
    # Isolated, so that a right-to-left label does not reorder the words around it.
    title = "\u2068{label}\u2069, predicted \u2068{prediction}\u2069".format(**prediction)
    return title, page.percent(prediction["probability"], 0), text


def _short(text: str, limit: int = 240) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[:limit].rsplit(" ", 1)[0] + " …"


STYLE = """
.confusion{font-size:.85rem}
.confusion th{font-weight:500;min-width:4rem;max-width:14rem;padding-right:.6rem;vertical-align:middle}
.confusion thead th{color:var(--soft);vertical-align:bottom;text-align:center;padding:.3rem}
.confusion thead th{min-width:0;overflow-wrap:normal}
.confusion .tall span{writing-mode:vertical-rl;text-orientation:sideways;transform:rotate(180deg);max-height:14rem;
overflow-wrap:anywhere}
.confusion .corner{text-align:left;vertical-align:bottom;color:var(--soft);font-size:.75rem;white-space:nowrap}
.confusion td{min-width:2.9rem;padding:.5rem .4rem;text-align:center;border:2px solid var(--paper);border-radius:6px}
.confusion .hit{background:color-mix(in srgb,var(--accent) calc(var(--part)*.62),var(--card))}
.confusion .miss{background:color-mix(in srgb,var(--wrong-ink) calc(var(--part)*.62),var(--card))}
.confusion .sum{color:var(--soft)}
"""

REPORT = TaskReport(
    title=title,
    unit="example",
    sections=sections,
    tiles=tiles,
    pipeline="text-classification",
    loader="AutoModelForSequenceClassification",
    words="fine-tuned to classify texts",
    metric_names={
        "majority": "accuracy of the most frequent label",
        "f1": "F1",
        "macro_f1": "macro F1",
        "matthews": "Matthews correlation",
    },
)
