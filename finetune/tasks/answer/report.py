"""The report of a model that answers questions: its figures, and answers right and wrong in their contexts.

predictions.jsonl  {"id", "question", "context", "answers": [str], "begins": [int], "answer", "score", "begin", "end",
                   "n_best", "em", "f1"} a line; "no_answer" too where a model may find none
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from espalier.report import page
from espalier.report.page import Section
from espalier.report.run_files import RunFiles
from espalier.report.task import TaskReport

SHOWN = 6
"""Questions of each kind."""
AROUND = 120
"""Characters of the context around what is marked."""


def sections(run: RunFiles) -> list[Section]:
    """The most confident answers that share nothing with a right one, and some that are right."""
    rows = run.jsonl("predictions.jsonl")
    wrong = sorted((row for row in rows if row["f1"] == 0), key=lambda row: -row["score"])
    right = [row for row in rows if row["em"] == 1]
    # Spread over the file, which goes by article.
    right = right[:: max(1, len(right) // SHOWN)][:SHOWN]
    found = []
    marks = "Filled: the model's answer; underlined: what is right."
    for title, part, note in (
        ("Mistakes", wrong[:SHOWN], f"The most confident of {len(wrong):,} answers that have nothing of a right one."),
        ("Right answers", right, f"Some of {sum(row['em'] == 1 for row in rows):,} among {len(rows):,} questions."),
    ):
        if part:
            body = f"<ul class=entries>{''.join(map(entry, part))}</ul>"
            found.append(Section(title, body, f"{note} {marks} predictions.jsonl holds all.", STYLE))
    return found


def tiles(run: RunFiles) -> list[tuple[str, str]]:
    """The metrics of the whole validation file."""
    final = run.summary.get("metrics") or {}
    names = {
        "em": "exact match",
        "f1": "F1",
        "baseline_f1": "F1 without a model",
        "has_answer_f1": "F1 with an answer",
        "no_answer_em": "right without one",
        "best_f1": "F1, best threshold",
    }
    return [(name, page.percent(final[key])) for key, name in names.items() if final.get(key) is not None]


def entry(row: dict) -> str:
    """A question, its answer and, around both answers, the context."""
    given = [(row["begin"], row["end"])] if row["answer"] else []
    right = [(begin, begin + len(answer)) for begin, answer in zip(row["begins"], row["answers"], strict=True)]
    said = f"\u2068{row['answer']}\u2069" if row["answer"] else "no answer"
    remark = f"{said} · {page.percent(row['score'], 0)} · F1 {page.percent(row['f1'], 0)}"
    if not right:
        remark += " · it has none"
    body = "".join(
        f"<p class=context{page.language(row['context'])}>{marked_context(row['context'], given, right, *window)}</p>"
        for window in windows(row["context"], [*given, *right])
    )
    return f"<li>{page.marked('strong', row['question'])} <small dir=auto>{escape(remark)}</small>{body}</li>"


def windows(context: str, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The parts of a context around these spans, those that meet joined; its beginning where there are none."""
    parts: list[tuple[int, int]] = []
    for begin, end in sorted(spans) or [(0, AROUND)]:
        begin, end = max(0, begin - AROUND), min(len(context), end + AROUND)
        if parts and begin <= parts[-1][1]:
            begin, end = parts[-1][0], max(end, parts.pop()[1])
        parts.append((begin, end))
    return parts


def marked_context(
    context: str,
    given: Sequence[tuple[int, int]],
    right: Sequence[tuple[int, int]],
    begin: int,
    end: int,
) -> str:
    """HTML of the characters begin … end: given spans filled, right ones underlined."""
    borders = {begin, end} | {at for span in (*given, *right) for at in span if begin < at < end}
    text = "" if begin == 0 else "… "
    for left, until in zip(sorted(borders), sorted(borders)[1:], strict=False):
        part = escape(context[left:until])
        if any(span[0] <= left and until <= span[1] for span in right):
            part = f"<u>{part}</u>"
        if any(span[0] <= left and until <= span[1] for span in given):
            part = f"<mark>{part}</mark>"
        text += part
    return text + ("" if end == len(context) else " …")


STYLE = """
.context{line-height:1.7}
.context mark{color:inherit;background:var(--fill);border-radius:4px;padding:.1rem 0}
.context u{text-decoration:underline 2px var(--accent);text-underline-offset:.25em}
"""

REPORT = TaskReport(
    title=lambda config: "Answers to questions",
    unit="window",
    sections=sections,
    tiles=tiles,
    pipeline="question-answering",
    loader="AutoModelForQuestionAnswering",
    words="fine-tuned for extractive question answering",
    metric_names={
        "em": "exact match",
        "f1": "F1",
        "f1_in_order": "F1 of the longest common piece (CMRC)",
        "has_answer_em": "exact match where there is an answer",
        "has_answer_f1": "F1 where there is an answer",
        "no_answer_em": "right where there is none",
        "baseline_em": "exact match without a model",
        "baseline_f1": "F1 without a model",
        "threshold": "no-answer threshold",
        "best_em": "exact match with the best threshold",
        "best_f1": "F1 with the best threshold",
        "best_em_threshold": "its threshold",
        "best_f1_threshold": "the threshold of the best F1",
    },
)
