"""The report of a classifier by concepts: that of a classifier, and which concepts speak for which class.

concepts.json      {"concepts": [str], "classes": [str], "weights": [[float]]}: rows are concepts
predictions.jsonl  also has `concepts`: the score of each by its name
"""

from __future__ import annotations

from dataclasses import replace
from html import escape

from espalier.report import page
from espalier.report.page import Section
from espalier.report.run_files import RunFiles
from finetune.tasks.classify import report as classify

SHOWN = 40
"""Concepts, those with the greatest weights."""
DEEPEST = 65
"""Per cent of the colour behind the greatest weight, on which its number can still be read, by day and by night."""


def sections(run: RunFiles) -> list[Section]:
    found = run.json("concepts.json")
    if not found:
        return classify.sections(run)
    weights, classes = found["weights"], found["classes"]
    most = max((abs(weight) for row in weights for weight in row), default=0.0) or 1.0
    order = sorted(range(len(weights)), key=lambda at: -max(map(abs, weights[at])))[:SHOWN]
    head = "".join(f"<th scope=col{page.language(name)}>{escape(name)}</th>" for name in classes)
    body = "".join(
        f"<tr><th scope=row{page.language(found['concepts'][at])}>{escape(found['concepts'][at])}</th>"
        + "".join(_cell(weight, most) for weight in weights[at])
        + "</tr>"
        for at in order
    )
    table = (
        f"<div class=scroll><table class=concepts><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"
        "</div>"
    )
    note = "How much each concept speaks for a class (green) or against it (red). The class is read off these alone."
    return [Section("Concepts and classes", table, note, STYLE), *classify.sections(run)]


def _cell(weight: float, most: float) -> str:
    side, written = "for" if weight > 0 else "against", f"{weight:+.2f}".replace("-", "−")
    return f"<td class={side} style='--part:{DEEPEST * abs(weight) / most:.0f}%'>{written}</td>"


def title(config: dict) -> str:
    """The model of its config.json is a regression to the concepts, which are its labels."""
    labels, concepts = config.get("labels") or [], (config.get("model") or {}).get("labels") or []
    return f"Classifier with {len(labels)} labels by {len(concepts)} concepts" if labels else "Classifier by concepts"


def tiles(run: RunFiles) -> list[tuple[str, str]]:
    final = run.summary.get("metrics") or {}
    shown = [("accuracy with the right scores", "accuracy_given", page.percent)]
    shown += [("correlation of the concepts", "concept_correlation", "{:.2f}".format)]
    return classify.tiles(run) + [(name, write(final[key])) for name, key, write in shown if key in final]


STYLE = """
.concepts th,.concepts td{padding:.25rem .7rem;font-weight:400;text-align:left}
.concepts thead th{color:var(--soft);font-size:.8rem}
.concepts .for{background:color-mix(in srgb,#1b8a5a var(--part),transparent)}
.concepts .against{background:color-mix(in srgb,#c23b4e var(--part),transparent)}
"""

REPORT = replace(
    classify.REPORT,
    title=title,
    loss=lambda config: None,
    sections=sections,
    tiles=tiles,
    words="fine-tuned to classify texts by concepts",
    metric_names={
        **classify.REPORT.metric_names,
        "concept_error": "squared error of the concept scores",
        "concept_correlation": "correlation of the concept scores with what is right",
        "accuracy_given": "accuracy with the right concept scores",
    },
)
