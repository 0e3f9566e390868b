"""Files of questions with choices, and of minimal pairs.

{"question": …, "choices": ["…", "…"], "label": 1}            .jsonl, .parquet; also context, endings, answer …
question, choice1, choice2, label                             .csv, .tsv: a column for each choice
{"question": …, "choices": {"text": […], "label": ["A", …]}, "answerKey": "B"}
an acceptable and an unacceptable sentence                    .tsv without names, or a folder of such (BLiMP)
{"sentence_good": …, "sentence_bad": …, "UID": …}             .jsonl, or a folder of such (BLiMP as it is published)
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
PUBLISHED = re.compile(r"\.jsonl(\.gz|\.zst)?$")
GOOD_AND_BAD = ("sentence_good", "sentence_bad")


class Questions(NamedTuple):
    """The content of a file, or of a folder of minimal pairs."""

    path: str
    asked: list[Asked]
    labels: list[int]
    paradigms: list[str]
    """The file of each, where there are several."""
    facts: tuple[str, ...]
    fingerprint: str
    from_one: bool | None = False
    """Whether labels that are numbers count from 1; None where the file leaves it open, and 0 was taken for the first.
    """


def read_questions(data: ChooseData, name: str, from_one: bool = False) -> Questions:
    """What is named `train` or `validation`; UserError where it will not do.

    from_one: how numbers are counted where the file leaves it open.
    """
    what = "questions with choices (.jsonl, .csv, .tsv, hf:…), or minimal pairs (.tsv, or a folder of them)"
    with data.opening(name, what) as path:
        if os.path.isdir(path):
            return _folder(path, data)
        pairs = _pairs(path, data)
        return pairs or _of_table(read_table(path, codec(data.encoding)), data, from_one)


def read_both(data: ChooseData) -> tuple[Questions, Questions]:
    """Training and validation. Where one says that numbers count from 1 and the other leaves it open, both do."""
    files = {name: read_questions(data, name) for name in ("train", "validation")}
    if any(found.from_one for found in files.values()):
        files |= {name: read_questions(data, name, True) for name, found in files.items() if found.from_one is None}
    return files["train"], files["validation"]


def _folder(path: str, data: ChooseData) -> Questions:
    there = sorted(Path(path).iterdir())
    files = [file for kind in (PAIRS, PUBLISHED) for file in there if kind.search(file.name)]
    if not files:
        names = ", ".join(file.name for file in there[:8]) or "no files"
        raise UserError(f"{path} has no .tsv or .jsonl of minimal pairs; it has {names}")
    asked, paradigms, fingerprints = [], [], []
    for file in files:
        published = PUBLISHED.search(file.name)
        found = _good_and_bad(read_table(str(file), codec(data.encoding))) if published else _pairs(str(file), data)
        if found is None:
            raise UserError(
                f"{file}: its first line is no pair of sentences; a folder holds minimal pairs, an acceptable and an "
                "unacceptable sentence a line, separated by a tab, without names of columns, or .jsonl with "
                f"{' and '.join(GOOD_AND_BAD)}"
            )
        count = min(data.per_file or len(found.asked), len(found.asked))
        asked += [found.asked[number * len(found.asked) // count] for number in range(count)]
        paradigms += [(PUBLISHED if published else PAIRS).sub("", file.name)] * count
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


def _good_and_bad(table: Table) -> Questions | None:
    """Rows with an acceptable and an unacceptable sentence; None for another table."""
    rows = [dict(zip(record.columns, record.values, strict=True)) for record in table.records]
    if not rows or not all(name in rows[0] for name in GOOD_AND_BAD):
        return None
    asked, paradigms = [], []
    for record, row in zip(table.records, rows, strict=True):
        pair = [row.get(name) for name in GOOD_AND_BAD]
        if not all(isinstance(text, str) and text.strip() for text in pair):
            raise UserError(f"{record.name}: {' and '.join(GOOD_AND_BAD)} must be texts; correct or remove the row")
        asked.append(Asked("", (str(pair[0]), str(pair[1]))))
        paradigms.append(str(row.get("UID") or ""))
    said = f"{table.path}: {len(asked):,} minimal pairs, {GOOD_AND_BAD[0]!r} is right{_alike(asked)}"
    kinds = paradigms if all(paradigms) else []
    return Questions(table.path, asked, [0] * len(asked), kinds, (*table.notes, said), table.fingerprint)


def _of_table(table: Table, data: ChooseData, else_from_one: bool) -> Questions:
    if not (data.question or data.choices or data.label) and (pairs := _good_and_bad(table)):
        return pairs
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
    texts = _all_texts(rows)
    from_one = False if texts else _counted_from_one(rows)
    one = else_from_one if from_one is None else from_one
    labels = [_number(*row, texts, one) for row in rows]
    said = f"{table.path}: {len(rows):,} questions, choices in {' and '.join(map(repr, choices))}, right is {label!r}"
    if question:
        said += f", before them {' and '.join(map(repr, question))}"
    facts = [*table.notes, said]
    if from_one:
        facts.append(
            f"{table.path}: numbers under {label!r} are never 0 and as high as there are choices; 1 is the first"
        )
    elif one:
        facts.append(f"{table.path}: 1 under {label!r} is taken for the first choice, as in the other file")
    if texts:
        facts.append(f"{table.path}: what stands under {label!r} is always the text of a choice, and taken for that")
    return Questions(table.path, [row[1] for row in rows], labels, [], tuple(facts), table.fingerprint, from_one)


Row = tuple[Record, Asked, Sequence[str], str, str | int | float]
"""Record, what is asked, names of the choices (A, B …, or none), column of the label, what it holds."""
NUMBER = re.compile(r"([0-9]{1,9})(?:\.0)?")


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
    return record, asked, letters, label, right.strip() if isinstance(right, str) else right


def _all_texts(rows: Sequence[Row]) -> bool:
    """Whether every label is written like a choice of its question, some of them numbers: then these are no places."""
    return all(
        isinstance(right, str) and right not in letters and right in map(str.strip, asked.choices)
        for _, asked, letters, _, right in rows
    ) and any(NUMBER.fullmatch(str(right)) for *_, right in rows)


def _counted_from_one(rows: Sequence[Row]) -> bool | None:
    """Whether labels are numbers from 1 to how many choices there are: some as high, and none 0. None where it may be
    so: they are numbers, and there is neither."""
    found = [NUMBER.fullmatch(str(right)) for _, _, letters, _, right in rows if str(right) not in letters]
    numbers = [int(match[1]) for match in found if match]
    if len(numbers) < len(rows) or min(numbers) == 0:
        return False
    highest = any(number == len(asked.choices) for number, (_, asked, *_) in zip(numbers, rows, strict=True))
    return True if highest else None


def _number(
    record: Record,
    asked: Asked,
    letters: Sequence[str],
    label: str,
    right: str | int | float,
    texts: bool,
    from_one: bool,
) -> int:
    """Which choice is right, from 0. texts: labels are texts of choices, also those that are numbers."""
    written, choices = str(right), [choice.strip() for choice in asked.choices]
    if written in letters:
        return letters.index(written)
    number = -1
    if (match := NUMBER.fullmatch(written)) and not texts:
        number = int(match[1]) - from_one
    elif written in choices:
        number = choices.index(written)
    elif re.fullmatch("[A-Z]", written):
        number = ord(written) - ord("A")
    if not 0 <= number < len(choices):
        raise UserError(
            f"{record.name}: {written[:40]!r} under {label!r} names none of the {len(choices)} choices; it is a number "
            f"from {int(from_one)}, a letter from A, or the text of a choice (in every row, where texts are numbers)"
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
