"""Rows of files that are no tables, for `predict`: sentences in columns (CoNLL), and SQuAD's nested questions.

What `finetune tag` and `finetune answer` learn from is asked about as it is, with tags and answers or without.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from typing import IO, Any, cast

from espalier.data.documents import Reject
from espalier.data.records import Record, json_records, not_utf8
from espalier.data.tagged import cells_of, is_comment, is_document_line

Item = tuple[str, dict[str, Any]] | Reject
"""(`file:line`, values) of a row, or what is wrong with it."""


def sentences(file: IO[bytes], path: str, tabs: bool) -> Iterator[tuple[int, Item]]:
    """(line, row) of each sentence: `tokens`, of several columns also `tags` (the last), those between by their number.

    tabs: whether tabs separate the columns, else blanks. A sentence with a bad line is a reject as a whole.
    """
    width, begin, number = 0, 0, 0
    rows: list[list[str]] = []
    wrong: Reject | None = None

    def ended() -> Iterator[tuple[int, Item]]:
        if wrong or rows:
            yield begin, wrong or (f"{path}:{begin}", _columns(rows))

    while line := file.readline():
        number += 1
        try:
            text = line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            begin, wrong = begin or number, wrong or not_utf8(f"{path}:{number}", line, error)
            continue
        text = text.removeprefix("\ufeff") if number == 1 else text
        if is_document_line(text):
            yield from ended()
            rows, begin, wrong = [], 0, None
            continue
        if tabs and is_comment(text):
            continue
        cells = cells_of(text, tabs)
        begin, width = begin or number, width or len(cells)
        if len(cells) != width or not cells[0]:
            found = f"{len(cells)} column{'s' * (len(cells) != 1)}, and the first line has {width}"
            wrong = wrong or Reject(f"{path}:{number}", "table", found if cells[0] else "no word")
        rows.append(cells)
    yield from ended()


def _columns(rows: list[list[str]]) -> dict[str, Any]:
    columns = [list(column) for column in zip(*rows, strict=True)]
    between = {str(at): column for at, column in enumerate(columns[1:-1], 2)}
    return {"tokens": columns[0]} | between | ({"tags": columns[-1]} if len(columns) > 1 else {})


def json_rows(content: bytes, path: str) -> Iterator[tuple[int, Item]]:
    """(line or number, row) of a .json file: SQuAD's object, an array of objects, or an object a line."""
    try:
        whole = json.loads(content)
    except (ValueError, RecursionError):
        whole = None
    if isinstance(whole, Mapping) and any(name in whole for name in ("data", "paragraphs")):
        for number, item in enumerate(questions(path, whole), 1):
            yield number, item
    elif isinstance(whole, list):
        for number, value in enumerate(whole, 1):
            place = f"{path}: object {number}"
            yield number, (place, value) if isinstance(value, dict) else Reject(place, "json", "no JSON object")
    else:
        for number, record in json_records(io.BytesIO(content), path, len(content) + 1):
            if isinstance(record, Record):
                yield number, (record.name, dict(zip(record.columns, record.values, strict=True)))
            elif record.dropped:
                yield number, record


def questions(place: str, record: Mapping[str, Any]) -> Iterator[Item]:
    """A row for each question of a whole file or of an article: `id`, `title`, `question`, `context` and what else it
    has (`answers`)."""
    for name in ("data", "paragraphs", "qas"):
        if name in record:
            break
    else:
        yield Reject(place, "field", "neither data, paragraphs nor qas, as SQuAD's files have")
        return
    values = record[name]
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        yield Reject(place, "type", f"{name} is {type(values).__name__}; expected a list of objects")
        return
    for number, value in enumerate(values, 1):
        own = {key: record[key] for key in ("title", "context") if key in record}
        if name == "qas":
            yield f"{place}: question {value.get('id', number)}", own | cast(dict, value)
        else:
            yield from questions(place if name == "data" else f"{place}: paragraph {number}", own | value)
