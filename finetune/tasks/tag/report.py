"""The report of a tagger: figures of each type, and the most confident mistakes in their sentences.

types.json         {"scheme": str or null, "types": [{"name", "precision", "recall", "f1", "right", "predicted"}]}
predictions.jsonl  {"tokens", "tags", "prediction", "spans" of entities: [{"type", "begin", "end", "text", "score"}]}
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from espalier.predict.tags import Entity, entities
from espalier.report import page
from espalier.report.page import Section
from espalier.report.run_files import RunFiles
from espalier.report.task import TaskReport

MISTAKES = 8
"""How many sentences with mistakes are shown."""
AROUND = 24
"""Words that are shown around a mistake."""
MOST_TYPES = 60
"""Rows of the table; the most frequent are shown."""


def sections(run: RunFiles) -> list[Section]:
    """Figures of each type or tag, and the most confident mistakes."""
    found = []
    measured, lines = run.json("types.json"), run.jsonl("predictions.jsonl")
    what = "tag" if measured.get("scheme") is None else "type"
    if rows := measured.get("types"):
        words = sum(len(line["tokens"]) for line in lines)
        note = f"On {len(lines):,} held-out sentences of {words:,} words."
        if what == "type":
            note += " An entity counts where its type and both its ends are right (as conlleval counts)."
        found.append(Section(f"Each {what}", types_table(rows), note, STYLE))
    if what == "type" and lines:
        wrong = sorted((mistake for line in lines for mistake in mistakes(line)), key=lambda mistake: -mistake[0])
        if wrong:
            note = (
                f"The most confident of {len(wrong):,} predicted entities that are not there; predictions.jsonl holds "
                "all. Filled: predicted; underlined: what is right."
            )
            types = [row["name"] for row in measured.get("types", [])]
            shown = "".join(_shown(*mistake, types) for mistake in wrong[:MISTAKES])
            found.append(Section("Mistakes", f"<ul class=entries>{shown}</ul>", note, STYLE))
    return found


def mistakes(line: dict) -> list[tuple[float, dict, Entity]]:
    """Predicted entities of a sentence that are not among the right ones, with their scores."""
    right = set(entities(line["tags"]))
    predicted = entities(line["prediction"])
    scores = [span["score"] for span in line.get("spans", [])]
    return [(score, line, entity) for score, entity in zip(scores, predicted, strict=True) if entity not in right]


def tiles(run: RunFiles) -> list[tuple[str, str]]:
    """The metrics of the whole validation file."""
    final = run.summary.get("metrics") or {}
    names = {
        "f1": "F1 of entities",
        "precision": "precision",
        "recall": "recall",
        "strict_f1": "strict F1",
        "baseline_f1": "F1, most frequent tags",
        "accuracy": "accuracy",
        "macro_f1": "macro F1",
        "baseline_accuracy": "most frequent tags",
    }
    return [(name, page.percent(final[key])) for key, name in names.items() if final.get(key) is not None]


def title(config: dict) -> str:
    labels = config.get("labels")
    return f"Tagger with {len(labels)} tags" if labels else "Tagger"


def types_table(rows: Sequence[dict]) -> str:
    """Precision, recall and F1 of each, the most frequent first."""
    shown = sorted(rows, key=lambda row: (-row["right"], row["name"]))[:MOST_TYPES]
    head = "".join(f"<th>{name}</th>" for name in ("", "F1", "precision", "recall", "right", "predicted"))
    body = "".join(
        f"<tr>{page.marked('th', row['name'])}"
        + "".join(
            f"<td class={name} style='--part:{100 * row[name]:.0f}%'>{page.percent(row[name])}</td>"
            for name in ("f1", "precision", "recall")
        )
        + f"<td>{row['right']:,}</td><td>{row['predicted']:,}</td></tr>"
        for row in shown
    )
    return f"<div class=scroll><table class=types><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _shown(score: float, line: dict, mistake: Entity, types: Sequence[str]) -> str:
    """A sentence around a mistake: predicted entities filled, right ones underlined, each with its type.

    types: of all entities; each has a colour.
    """
    words, right = line["tokens"], entities(line["tags"])
    first, last = max(0, mistake.begin - AROUND // 2), min(len(words), mistake.end + AROUND // 2)
    joint = "" if all(len(word) == 1 and word > "\u2e80" for word in words[mistake.begin : mistake.end]) else " "
    parts, at = [], first
    while at < last:
        predicted = next((entity for entity in entities(line["prediction"]) if entity.begin == at), None)
        end = min(predicted.end, last) if predicted else at + 1
        inner = joint.join(_word(words[number], number, right, types) for number in range(at, end))
        if predicted:
            kind = f"{escape(predicted.type)}{'' if predicted in right else ' ✗'}"
            inner = f"<mark class='s{types.index(predicted.type) % COLOURS}'>{inner}<sub>{kind}</sub></mark>"
        parts.append(inner)
        at = end
    text = joint.join(["…"] * (first > 0) + parts + ["…"] * (last < len(words)))
    named = next((entity for entity in right if entity.begin < mistake.end and mistake.begin < entity.end), None)
    title = f"\u2068{mistake.type}\u2069, " + (
        "which is no entity"
        if named is None
        else f"which is \u2068{named.type}\u2069"
        if named.type != mistake.type
        else "with wrong ends"
    )
    written = page.language("".join(words))
    remark = page.percent(score, 0)
    return (
        f"<li><strong>{escape(title)}</strong> <small>{escape(remark)}</small><p class=tagged{written}>{text}</p></li>"
    )


def _word(word: str, number: int, right: Sequence[Entity], types: Sequence[str]) -> str:
    entity = next((entity for entity in right if entity.begin <= number < entity.end), None)
    if entity is None:
        return escape(word)
    kind = f"<sup>{escape(entity.type)}</sup>" if number == entity.begin else ""
    return f"<u class='s{types.index(entity.type) % COLOURS}'>{escape(word)}{kind}</u>"


COLOURS = 6
STYLE = """
.types th{font-weight:500;padding:.35rem .9rem .35rem 0;max-width:16rem}
.types thead th{color:var(--soft);font-size:.8rem}
.types td{padding:.35rem .9rem;text-align:right}
.types thead th:not(:first-child){text-align:right;padding-left:.9rem}
.types .f1{font-weight:600;background:linear-gradient(90deg,var(--fill) var(--part),transparent var(--part))}
.types tr+tr td,.types tr+tr th{border-top:1px solid var(--line)}
.tagged{line-height:2}
.tagged mark{color:inherit;border-radius:5px;padding:.1rem .3rem;
background:color-mix(in srgb,var(--hue) 26%,var(--card))}
.tagged u{text-decoration:underline 2px var(--hue);text-underline-offset:.25em}
.tagged sub,.tagged sup{font:600 .62rem/1 ui-sans-serif,system-ui,sans-serif;margin-left:.25rem;color:var(--soft);
text-decoration:none}
.s0{--hue:#1b6e53}.s1{--hue:#c2571a}.s2{--hue:#3c6fc4}.s3{--hue:#a4478f}.s4{--hue:#b08a00}.s5{--hue:#c23b4e}
"""

REPORT = TaskReport(
    title=title,
    unit="word",
    sections=sections,
    tiles=tiles,
    pipeline="token-classification",
    loader="AutoModelForTokenClassification",
    words="fine-tuned to tag words",
    metric_names={
        "f1": "F1 of entities (conlleval)",
        "strict_f1": "F1 of entities, strict",
        "macro_f1": "macro F1",
        "baseline_f1": "F1 of each word's most frequent tag",
        "baseline_accuracy": "accuracy of each word's most frequent tag",
    },
)
