"""Files of questions with choices, and of minimal pairs.

{"question": …, "choices": ["…", "…"], "label": 1}            .jsonl, .parquet; also context, endings, answer …
question, choice1, choice2, label                             .csv, .tsv: a column for each choice
{"question": …, "choices": {"text": […], "label": ["A", …]}, "answerKey": "B"}
an acceptable and an unacceptable sentence                    .tsv without names, or a folder of such (BLiMP)
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from espalier.data.encodings import codec
from espalier.data.records import Record
from espalier.data.tables import Table, read_table, read_text
from espalier.errors import UserError
from espalier.predict.choose import Asked

if TYPE_CHECKING:
    from finetune.tasks.choose.record import ChooseData

CONTEXTS = ("context", "article", "passage", "premise", "support")
QUESTIONS = ("question", "ctx", "prompt", "goal", "query", "sentence", "startphrase")
LISTS = ("choices", "endings", "options", "answers")
ONE_EACH = re.compile(r"(?:choice|ending|option|answer|sol)[_ -]?(\d+)|([A-H])")
LABELS = ("label", "answer", "answerKey", "gold", "target", "answer_index", "correct")
PAIRS = re.compile(r"\.tsv(\.gz|\.zst)?$")


class Questions(NamedTuple):
    """The content of a file, or of a folder of minimal pairs."""

    path: str
    asked: list[Asked]
    labels: list[int]
    paradigms: list[str]
    """The file of each, where there are several."""
    facts: tuple[str, ...]
    fingerprint: str


def read_questions(data: ChooseData, name: str) -> Questions:
    """What is named `train` or `validation`; UserError where it will not do."""
    what = "questions with choices (.jsonl, .csv, .tsv, hf:…), or minimal pairs (.tsv, or a folder of them)"
    with data.opening(name, what) as path:
        if os.path.isdir(path):
            return _folder(path, data)
        pairs = _pairs(path, data)
        return pairs or _of_table(read_table(path, codec(data.encoding)), data)


def _folder(path: str, data: ChooseData) -> Questions:
    files = sorted(file for file in Path(path).iterdir() if PAIRS.search(file.name))
    if not files:
        there = ", ".join(sorted(os.listdir(path))[:8]) or "no files"
        raise UserError(f"{path} has no .tsv of minimal pairs; it has {there}")
    asked, paradigms, fingerprints = [], [], []
    for file in files:
        found = _pairs(str(file), data)
        if found is None:
            raise UserError(
                f"{file}: its first line is no pair of sentences; a folder holds minimal pairs, an acceptable and an "
                "unacceptable sentence a line, separated by a tab, without names of columns"
            )
        asked += found.asked
        paradigms += [PAIRS.sub("", file.name)] * len(found.asked)
        fingerprints.append(file.name + found.fingerprint)
    said = f"{path}: {len(asked):,} minimal pairs of {len(files):,} files, the acceptable sentence first{_alike(asked)}"
    fingerprint = hashlib.sha256("".join(fingerprints).encode()).hexdigest()
    return Questions(path, asked, [0] * len(asked), paradigms, (said,), fingerprint)


def _pairs(path: str, data: ChooseData) -> Questions | None:
    """A .tsv of two sentences a line; None for another file."""
    if not PAIRS.search(path) or data.question or data.choices or data.label:
        return None
    file = read_text(path, codec(data.encoding))
    lines = file.text.split("\n")
    first = lines[0].split("\t")
    if len(first) != 2 or any(cell.strip().lower() in (*QUESTIONS, *CONTEXTS, *LISTS, *LABELS, "") for cell in first):
        return None
    asked = []
    for number, line in enumerate(lines, 1):
        cells = line.split("\t")
        if not line.strip():
            continue
        if len(cells) != 2 or not all(cell.strip() for cell in cells):
            raise UserError(
                f"{path}:{number}: expected an acceptable and an unacceptable sentence, separated by a tab, as in the "
                f"first line; found {len(cells)} cells"
            )
        asked.append(Asked("", (cells[0], cells[1])))
    said = f"{path}: {len(asked):,} minimal pairs, the acceptable sentence first (no names of columns){_alike(asked)}"
    return Questions(path, asked, [0] * len(asked), [], (*file.notes, said), file.fingerprint)


def _alike(asked: Sequence[Asked]) -> str:
    """What is to be said of pairs whose sentences are the same: BLiMP has some."""
    count = sum(len({*one.choices}) == 1 for one in asked)
    return f"; {count:,} of them twice the same sentence, which counts as wrong" if count else ""


def _of_table(table: Table, data: ChooseData) -> Questions:
    names = list(dict.fromkeys(name for record in table.records for name in record.columns))
    for name in (*data.question, *data.choices, *filter(None, (data.label,))):
        if name not in names:
            raise UserError(f"{table.path} has no column {name!r}; its columns are {', '.join(map(repr, names))}")
    question = data.question or tuple(
        name for known in (CONTEXTS, QUESTIONS) for name in known if name in names and name not in data.choices
    )
    choices = data.choices or tuple(name for name in LISTS if _lists(table, name))[:1] or _one_each(names)
    label = data.label or next((name for name in LABELS if name in names and name not in choices), None)
    for what, found in (("choices", choices), ("label", label)):
        if not found:
            raise UserError(
                f"{table.path}: which column holds the {'right answer' if what == 'label' else what}? It has "
                f"{', '.join(map(repr, names))}; name it with --data.{what}"
            )
    assert label is not None
    rows = [_row(record, question, choices, label) for record in table.records]
    from_one = _counted_from_one(rows)
    labels = [_number(*row, from_one) for row in rows]
    said = f"{table.path}: {len(rows):,} questions, choices in {' and '.join(map(repr, choices))}, right is {label!r}"
    if question:
        said += f", before them {' and '.join(map(repr, question))}"
    facts = [*table.notes, said]
    if from_one:
        facts.append(
            f"{table.path}: numbers under {label!r} are never 0 and as high as there are choices; 1 is the first"
        )
    return Questions(table.path, [row[1] for row in rows], labels, [], tuple(facts), table.fingerprint)


Row = tuple[Record, Asked, Sequence[str], str, str]
"""Record, what is asked, names of the choices (A, B …, or none), column of the label, what it holds."""


def _row(record: Record, question: Sequence[str], choices: Sequence[str], label: str) -> Row:
    values = dict(zip(record.columns, record.values, strict=True))
    letters: Sequence[str] = ()
    if len(choices) == 1:
        listed = values.get(choices[0])
        if isinstance(listed, Mapping) and isinstance(listed.get("text"), list):
            listed, letters = listed["text"], [str(one) for one in listed.get("label") or ()]
        if not isinstance(listed, list):
            raise UserError(f"{record.name}: {choices[0]!r} is no list of choices; correct or remove the row")
    else:
        listed = [values.get(name) for name in choices]
        # Rows may have fewer than the others.
        while listed and listed[-1] in (None, ""):
            listed.pop()
    texts = [text for text in listed if isinstance(text, str) and text.strip()]
    if len(listed) < 2 or len(texts) < len(listed):
        raise UserError(f"{record.name}: two or more choices that are texts are needed; correct or remove the row")
    before = [values.get(name) for name in question]
    if not all(part is None or isinstance(part, str) for part in before):
        raise UserError(f"{record.name}: {' and '.join(map(repr, question))} must be texts; correct or remove the row")
    right = values.get(label)
    if isinstance(right, bool) or not isinstance(right, str | int | float) or not str(right).strip():
        raise UserError(f"{record.name}: nothing under {label!r} says which choice is right; correct or remove the row")
    asked = Asked("\n".join(part for part in before if isinstance(part, str) and part), tuple(texts))
    try:
        "".join((asked.question, *asked.choices)).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{record.name}: half a surrogate pair (\\ud800 …) is no character; remove it") from error
    return record, asked, letters, label, str(right).strip().removesuffix(".0")


def _counted_from_one(rows: Sequence[Row]) -> bool:
    """Whether labels are numbers from 1 to how many choices there are: some as high, and none 0."""
    numbers = [int(right) for _, _, letters, _, right in rows if re.fullmatch(r"\d+", right) and right not in letters]
    return (
        len(numbers) == len(rows)
        and min(numbers) > 0
        and any(number == len(asked.choices) for number, (_, asked, *_) in zip(numbers, rows, strict=True))
    )


def _number(record: Record, asked: Asked, letters: Sequence[str], label: str, right: str, from_one: bool) -> int:
    """Which choice is right, from 0."""
    if right in letters:
        return letters.index(right)
    if re.fullmatch(r"\d+", right):
        number = int(right) - from_one
    elif re.fullmatch("[A-Z]", right) and right not in asked.choices:
        number = ord(right) - ord("A")
    else:
        number = asked.choices.index(right) if right in asked.choices else -1
    if not 0 <= number < len(asked.choices):
        raise UserError(
            f"{record.name}: {right!r} under {label!r} names none of the {len(asked.choices)} choices; it is a number "
            f"from {int(from_one)}, a letter from A, or the text of a choice"
        )
    return number


def _lists(table: Table, name: str) -> bool:
    """Whether a column holds lists."""
    record = table.records[0]
    value: Any = dict(zip(record.columns, record.values, strict=True)).get(name)
    return isinstance(value, list | dict)


def _one_each(names: Sequence[str]) -> tuple[str, ...]:
    """Columns that are a choice each, of one kind, in their order."""
    found: dict[str, list[str]] = {}
    for name in names:
        if match := ONE_EACH.fullmatch(name):
            found.setdefault(name[: match.start(1)] if match[1] else "", []).append(name)
    best = max(found.values(), key=len, default=[])
    return tuple(best) if len(best) > 1 else ()
