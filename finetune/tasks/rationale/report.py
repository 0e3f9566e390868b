"""The report of a classifier by few words: that of a classifier, and texts with the words that were selected.

predictions.jsonl also has `words`: those that the classifier saw, each {"text", "begin", "end"} (of a pair also "of").
"""

from __future__ import annotations

from dataclasses import replace
from html import escape

from espalier.report import page
from espalier.report.page import Section
from espalier.report.run_files import RunFiles
from finetune.tasks.classify import report as classify

SHOWN = 12
"""Texts whose words are shown."""


def sections(run: RunFiles) -> list[Section]:
    predictions = run.jsonl("predictions.jsonl")
    items = [
        f"<li><strong>{escape(p['prediction'])}</strong> <small>{page.percent(p['probability'], 0)}"
        f"{'' if p['prediction'] == p['label'] else ', right is ' + escape(p['label'])}</small>{_text(p)}</li>"
        for p in predictions[:SHOWN]
    ]
    note = "The marked words are all that the classifier saw; predictions.jsonl holds all texts."
    found = [Section("Selected words", f"<ul class=entries>{''.join(items)}</ul>", note, STYLE)] if items else []
    return found + classify.sections(run)


def title(config: dict) -> str:
    return f"{classify.title(config)} by few of their words"


def tiles(run: RunFiles) -> list[tuple[str, str]]:
    final = run.summary.get("metrics") or {}
    shown = (
        ("words selected", "selected"),
        ("accuracy by the whole text", "accuracy_whole"),
        ("accuracy by the words left out", "accuracy_rest"),
    )
    return classify.tiles(run) + [(name, page.percent(final[key])) for name, key in shown if key in final]


def _text(prediction: dict) -> str:
    texts = [prediction["text"], prediction.get("text_b")]
    return "".join(
        _marked(text, [word for word in prediction["words"] if word.get("of", 0) == number])
        for number, text in enumerate(texts)
        if text
    )


def _marked(text: str, words: list[dict]) -> str:
    parts, end = [], 0
    for word in words:
        parts += [escape(text[end : word["begin"]]), f"<mark>{escape(text[word['begin'] : word['end']])}</mark>"]
        end = word["end"]
    return f"<p{page.language(text)}>{''.join(parts)}{escape(text[end:])}</p>"


STYLE = """
mark{background:color-mix(in srgb,var(--accent) 30%,transparent);color:inherit;border-radius:3px;padding:0 .15em}
"""

REPORT = replace(
    classify.REPORT,
    title=title,
    sections=sections,
    tiles=tiles,
    words="fine-tuned to classify texts by few of their words",
    metric_names={
        **classify.REPORT.metric_names,
        "selected": "part of the words that is selected",
        "accuracy_whole": "accuracy by the whole text",
        "accuracy_rest": "accuracy by the words left out",
    },
)
