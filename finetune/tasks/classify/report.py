"""The report of a classifier: metrics, confusion matrix, calibration and the most confident mistakes.

confusion.json     {"labels": [str], "matrix": [[int]]}: rows are true labels
predictions.jsonl  {"text", "text_b" for pairs, "label", "prediction", "probability"} a line; of numbers without a
                   probability; of several labels a text {"labels", "predictions", "probabilities"}
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
    """Confusion matrix, calibration and the most confident mistakes; of numbers a picture of both."""
    predictions = run.jsonl("predictions.jsonl")
    if predictions and "predictions" in predictions[0]:
        return _of_lists(predictions)
    if predictions and "probability" not in predictions[0]:
        return _of_numbers(predictions)
    found = []
    confusion = run.json("confusion.json")
    labels = confusion.get("labels", [])
    if 0 < len(labels) <= LARGEST_MATRIX:
        total = sum(map(sum, confusion["matrix"]))
        note = f"{total:,} held-out examples by true label (row) and predicted label (column)."
        found.append(Section("Confusion matrix", confusion_table(labels, confusion["matrix"]), note, STYLE))
    if predictions:
        chances = [(p["probability"], p["label"] == p["prediction"]) for p in predictions]
        note = "How often the label is right, by the probability that the model gave it; the line is that probability."
        found.append(_calibration(chances, "examples", note))
    wrong = [p for p in predictions if p["label"] != p["prediction"]]
    if wrong:
        wrong = sorted(wrong, key=lambda p: -p["probability"])
        counted = f"{len(wrong):,} mistakes in {len(predictions):,} predictions"
        note = f"The most confident of {counted}; predictions.jsonl holds all."
        found.append(Section("Mistakes", page.entries(map(_mistake, wrong[:MISTAKES])), note))
    return found


def tiles(run: RunFiles) -> list[tuple[str, str]]:
    """The metrics of the whole validation file, with their 95 % intervals."""
    final, labels = run.summary.get("metrics") or {}, run.config.get("labels", [])
    rounded = "{:.3f}".format
    shown = [
        ("accuracy", "accuracy", page.percent),
        ("most frequent set" if "majority_f1" in final else "majority class", "majority", page.percent),
        (f"F1 of {labels[1]}" if len(labels) == 2 else "F1", "f1", page.percent),
        ("Matthews", "matthews", rounded),
        ("Pearson", "pearson", rounded),
        ("Spearman", "spearman", rounded),
        ("error (RMSE)", "rmse", page.number),
        ("error of the mean", "baseline_rmse", page.number),
        ("calibration error", "calibration_error", page.percent),
        ("before its temperature", "calibration_error_before", page.percent),
    ]
    found = []
    for name, key, write in shown:
        if final.get(key) is not None:
            low_high = final.get(f"{key}_interval")
            sure = f", 95 % between {write(low_high[0])} and {write(low_high[1])}" if low_high else ""
            found.append((name + sure, write(final[key])))
    return found


def _calibration(chances: Sequence[tuple[float, bool]], unit: str, note: str) -> Section:
    """How often that is so which the model gave a probability: a bar for each tenth, its target as a line."""
    rows = []
    for tenth in range(10):
        inside = [(said, so) for said, so in chances if min(int(10 * said), 9) == tenth]
        if inside:
            given, right = (sum(values) / len(inside) for values in zip(*inside, strict=True))
            rows.append(
                f"<li><span>{10 * tenth} – {page.percent((tenth + 1) / 10, 0)}<small>{len(inside):,} {unit}</small>"
                f"</span><i><b style='width:{100 * right:.1f}%'></b><u style='left:{100 * given:.1f}%'></u></i>"
                f"<em>{page.percent(right, 0)}</em></li>"
            )
    return Section("Calibration", f"<ul class='bars calibration'>{''.join(rows)}</ul>", note, STYLE)


def _of_numbers(predictions: Sequence[dict]) -> list[Section]:
    size, shown = 360, predictions[:: max(1, len(predictions) // 1500)]
    values = [p[name] for p in shown for name in ("label", "prediction")]
    low, high = min(values), max(values)
    span = (high - low) or 1.0

    def at(value: float) -> float:
        return 34 + (size - 44) * (value - low) / span

    dots = "".join(
        f"<circle cx={at(p['label']):.1f} cy={size - at(p['prediction']):.1f} r=3><title>{p['prediction']:.3g} for "
        f"{p['label']:.3g}</title></circle>"
        for p in shown
    )
    axes = "".join(
        f"<text x={at(value):.0f} y={size - 12} text-anchor=middle>{value:.3g}</text>"
        f"<text x=28 y={size - at(value) + 4:.0f} text-anchor=end>{value:.3g}</text>"
        for value in (low, (low + high) / 2, high)
    )
    line = f"<line x1={at(low)} y1={size - at(low)} x2={at(high)} y2={size - at(high)} />"
    picture = f"<svg class=scatter viewBox='0 0 {size} {size}' role=img aria-label='predictions over true numbers'>"
    note = f"{len(predictions):,} held-out examples: predictions (upwards) over true numbers (to the right)."
    found = [Section("Predictions", f"{picture}{line}{dots}{axes}</svg>", note, STYLE)]
    worst = sorted(predictions, key=lambda p: -abs(p["prediction"] - p["label"]))[:MISTAKES]
    items = ((f"{p['label']:g}, predicted {p['prediction']:.3g}", "", _text(p)) for p in worst)
    return [*found, Section("Largest errors", page.entries(items), "predictions.jsonl holds all predictions.")]


def _of_lists(predictions: Sequence[dict]) -> list[Section]:
    rows = []
    for name in predictions[0]["probabilities"]:
        true, said = ([name in p[key] for p in predictions] for key in ("labels", "predictions"))
        both = sum(a and b for a, b in zip(true, said, strict=True))
        f1 = 2 * both / max(sum(true) + sum(said), 1)
        rows.append((f1, sum(true), f"{name}", f"{sum(true):,} examples, given to {sum(said):,}, right in {both:,}"))
    rows.sort(key=lambda row: -row[1])
    bars = page.bars([(name, f1, words) for f1, _, name, words in rows[:40]])
    found = [Section("Labels", bars, "F1 of each label on the held-out examples, the most frequent label first.")]
    chances = [(said, name in p["labels"]) for p in predictions for name, said in p["probabilities"].items()]
    note = "How often a label is right, by the probability that the model gave it; the line is that probability."
    found.append(_calibration(chances, "labels of texts", note))
    wrong = [p for p in predictions if p["labels"] != p["predictions"]]
    items = (
        (f"{', '.join(p['labels']) or 'none'}; predicted {', '.join(p['predictions']) or 'none'}", "", _text(p))
        for p in wrong[:MISTAKES]
    )
    if wrong:
        counted = f"{len(wrong):,} of {len(predictions):,} texts"
        note = f"{counted} have other labels than predicted; predictions.jsonl holds all."
        found.append(Section("Mistakes", page.entries(items), note))
    return found


def title(config: dict) -> str:
    labels, problem = config.get("labels"), _problem(config)
    if problem == "regression":
        return f"Regression of {labels[0]}" if labels else "Regression"
    if problem == "multi_label_classification" and labels:
        return f"Classifier with {len(labels)} labels, several a text"
    return f"Classifier with {len(labels)} labels" if labels else "Classifier"


def _problem(config: dict) -> str | None:
    return (config.get("model") or {}).get("problem_type")


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
    # Isolated, so that a right-to-left label does not reorder the words around it.
    title = "\u2068{label}\u2069, predicted \u2068{prediction}\u2069".format(**prediction)
    return title, page.percent(prediction["probability"], 0), _text(prediction)


def _text(prediction: dict) -> str:
    return " / ".join(page.shortened(prediction[name]) for name in ("text", "text_b") if prediction.get(name))


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
.calibration i{position:relative;overflow:visible}
.calibration u{position:absolute;top:-.2rem;bottom:-.2rem;width:2px;background:var(--ink)}
.scatter{width:100%;max-width:26rem;height:auto;font-size:11px}.scatter text{fill:var(--soft)}
.scatter circle{fill:var(--accent);fill-opacity:.45}.scatter line{stroke:var(--line);stroke-width:1.5}
"""

REPORT = TaskReport(
    title=title,
    unit="example",
    loss=lambda config: "squared error" if _problem(config) == "regression" else None,
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
        "majority_f1": "F1 of the most frequent set of labels",
        "pearson": "Pearson correlation",
        "spearman": "Spearman correlation",
        "rmse": "root of the mean squared error",
        "baseline_rmse": "the same of the mean",
        "calibration_error": "expected calibration error",
        "calibration_error_before": "the same without the fitted temperature",
        "threshold": "probability from which a label is given",
    },
)
