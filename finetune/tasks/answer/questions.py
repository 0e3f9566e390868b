"""Files of questions on contexts: SQuAD's nested JSON, or a question a line; and parts of them by article.

    nested   {"data": [{"title", "paragraphs": [{"context", "qas": [{"id", "question", "answers": [{"text",
             "answer_start"}]}]}]}]} (Rajpurkar et al. 2016; 2018 with `is_impossible`); also an article a line
    flat     {"question", "context", "answers": {"text": […], "answer_start": […]}} and, if wanted, `id` and `title`,
             as `datasets` holds SQuAD; `answers` may also be a list as above

A question without answers has none in its context.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from espalier.data.encodings import codec
from espalier.data.sources import SPEC
from espalier.data.storage import plain_name
from espalier.data.tables import read_table, read_text
from espalier.errors import UserError

FLAT = '{"question", "context", "answers": {"text": […], "answer_start": […]}}'
SHOWN = 40
"""Characters of an answer or a context that a message shows."""


class Question(NamedTuple):
    """A question on a context."""

    name: str
    """Its id, else where it stands in the file."""
    title: str
    """Of its article; "" where the file has no titles."""
    question: str
    context: str
    answers: tuple[str, ...]
    """All that are right, without blanks around them; () where the context has none."""
    begins: tuple[int, ...]
    """The character of the context at which each of them begins."""


class QuestionFile(NamedTuple):
    questions: list[Question]
    notes: tuple[str, ...]
    """What people should know about the file, a sentence each."""
    fingerprint: str
    """SHA-256 of the file, or what stands for the content of something remote."""


def read_questions(path: str, encoding: str = "utf-8") -> QuestionFile:
    """The questions of a file in either layout. UserError, naming the question, for an answer not in its context."""
    found = _whole(path, codec(encoding))
    if found is None:
        table = read_table(path, codec(encoding))
        rows = [(record.name, dict(zip(record.columns, record.values, strict=True))) for record in table.records]
        found = [q for name, row in rows for q in _questions(path, name, row)], table.notes, table.fingerprint
    questions, notes, fingerprint = found
    if not questions:
        raise UserError(f"{path} holds no questions; expected SQuAD's JSON, or a line {FLAT} for each")
    _check_places(path, questions)
    return QuestionFile(questions, notes, fingerprint)


def split_by_article(
    questions: Sequence[Question], part: float, advice: str = "give --data.validation FILE"
) -> tuple[list[Question], list[Question]]:
    """(the others, about this part of the articles), each in the order of the file; the same in every run.

    Articles are ordered by the SHA-256 of their title, and the first ones are held out, at least one. Where there are
    no titles, or only one, contexts are divided alike; none is in both parts. UserError, with the
    advice, where there is one context.
    """
    for keys in ([q.title for q in questions], [q.context for q in questions]):
        order = sorted(set(keys), key=lambda key: hashlib.sha256(key.encode()).digest())
        if len(order) > 1:
            held = set(order[: min(max(round(part * len(order)), 1), len(order) - 1)])
            kept, out = [], []
            for question, key in zip(questions, keys, strict=True):
                (out if key in held else kept).append(question)
            return kept, out
    raise UserError(f"all questions are on one context, which cannot be divided; {advice}")


def _whole(path: str, encoding: str) -> tuple[list[Question], tuple[str, ...], str] | None:
    """Questions, notes and fingerprint of a .json file that is one object; None for any other."""
    if SPEC.fullmatch(path) or not re.search(r"\.json(\.gz|\.zst)?$", plain_name(path)):
        return None
    file = read_text(path, encoding)
    try:
        content = json.loads(file.text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    return list(_questions(path, path, content)), file.notes, file.fingerprint


def _questions(path: str, place: str, record: Mapping[str, Any]) -> Iterator[Question]:
    """Those of a whole file, of an article, or the one of a line."""
    if "data" in record:
        for article in _objects(record["data"], f"{place}: data"):
            yield from _questions(path, place, article)
    elif "paragraphs" in record:
        for paragraph in _objects(record["paragraphs"], f"{place}: paragraphs"):
            for number, asked in enumerate(_objects(paragraph.get("qas"), f"{place}: qas"), 1):
                row = {"title": record.get("title"), "context": paragraph.get("context"), **asked}
                yield _question(f"{place}: question {asked.get('id', number)}", row)
    elif "question" in record:
        named = record.get("id") is not None
        yield _question(f"{path}: question {record['id']}" if named else place, record)
    else:
        there = ", ".join(map(repr, list(record)[:8])) or "nothing"
        raise UserError(
            f"{place}: neither SQuAD's JSON (data, paragraphs, qas) nor a line {FLAT}; there are the fields {there}"
        )


def _question(place: str, row: Mapping[str, Any]) -> Question:
    texts: dict[str, str] = {}
    for name in ("question", "context"):
        value = row.get(name)
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{place} has no text under {name!r}; give a string that is not empty")
        texts[name] = value
    answers, begins = [], []
    for text, begin in _answers(place, row.get("answers")):
        # Blanks around an answer belong to no token of it.
        answers.append(text.strip())
        begins.append(begin + len(text) - len(text.lstrip()))
    for text in (*texts.values(), *answers):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{place}: half a surrogate pair (\\ud800 …) is no character; remove it") from None
    if row.get("is_impossible") and answers:
        raise UserError(f"{place} is_impossible, and has the answer {_cut(answers[0])!r}; remove one of the two")
    return Question(
        place, str(row.get("title") or ""), texts["question"], texts["context"], *map(tuple, (answers, begins))
    )


def _answers(place: str, given: Any) -> Iterator[tuple[str, int]]:
    """(text, answer_start) of each."""
    if isinstance(given, Mapping):
        texts, begins = given.get("text"), given.get("answer_start")
        if not (isinstance(texts, list) and isinstance(begins, list) and len(texts) == len(begins)):
            raise UserError(f"{place}: answers need text and answer_start, lists of one length")
        given = [{"text": text, "answer_start": begin} for text, begin in zip(texts, begins, strict=True)]
    if given is None:
        raise UserError(f"{place} has no answers; write [] where its context has none")
    for answer in _objects(given, f"{place}: answers"):
        text, begin = answer.get("text"), answer.get("answer_start")
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{place} has an answer without text; a question that has none has answers []")
        if not isinstance(begin, int) or isinstance(begin, bool):
            raise UserError(f"{place}: answer_start is {begin!r}; expected the number of characters before the answer")
        yield text, begin


def _objects(values: Any, place: str) -> list[Mapping[str, Any]]:
    if not isinstance(values, list) or not all(isinstance(value, Mapping) for value in values):
        raise UserError(f"{place} is {type(values).__name__}; expected a list of objects")
    return values


def _check_places(path: str, questions: Sequence[Question]) -> None:
    """UserError where an answer is not at its answer_start: the first of them, and how many there are."""
    wrong = [
        (question, answer, begin)
        for question in questions
        for answer, begin in zip(question.answers, question.begins, strict=True)
        if begin < 0 or question.context[begin : begin + len(answer)] != answer
    ]
    if not wrong:
        return
    question, answer, begin = wrong[0]
    there = question.context[begin : begin + len(answer)] if begin >= 0 else ""
    found = question.context.find(answer)
    advice = f"it stands at {found}" if found >= 0 else "it is nowhere in its context"
    more = f" (so it is with {len(wrong):,} answers of {path})" if len(wrong) > 1 else ""
    raise UserError(
        f"{question.name}: the answer {_cut(answer)!r} is not at answer_start {begin}, where "
        f"{f'{_cut(there)!r} stands' if there else 'the context has no text'}; {advice}{more}; answer_start counts "
        "characters from 0; correct or remove it"
    )


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
