"""Files of labelled rows: .tsv, .csv, .jsonl and .json, and what people call so.

What a file is other than its ending says is found out and said. It is read where that leaves no doubt (semicolons
under a proper header, an array of JSON objects); else a UserError says what was found and what to do.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple, cast

from espalier.data.encodings import Guess, detect, label, other_unicode
from espalier.data.recode import Recoded, fault
from espalier.errors import UserError

DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
FOREIGN = (
    (b"PK\x03\x04", "an Excel file or another archive; open it and save it as CSV in UTF-8"),
    (b"\xd0\xcf\x11\xe0", "an old Excel file; open it and save it as CSV in UTF-8"),
    (b"PAR1", "a Parquet file; write it as .jsonl, in Python: pandas.read_parquet(…).to_json(…, lines=True, "
     "orient='records')"),
    (b"\x1f\x8b", "packed by gzip; unpack it with `gunzip`"),
    (b"\x28\xb5\x2f\xfd", "packed by Zstandard; unpack it with `unzstd`"),
)  # fmt: skip
"""How files begin that are no text, and what they are."""
SPREADSHEETS = (".xlsx", ".xls", ".ods")


class Row(NamedTuple):
    number: int
    """Line in the file (element of a JSON array)."""
    cells: list[str | None]
    """By column; None where a JSON object has no string or number."""


class Table(NamedTuple):
    path: str
    columns: list[str]
    rows: list[Row]
    delimiter: str | None
    """None where it is of JSON."""
    notes: tuple[str, ...]
    """What people should know about the file, a sentence each."""


def read_table(path: str, encoding: str = "utf-8") -> Table:
    """The rows of a file with named columns. encoding: as data.encodings.codec names it."""
    kind = os.path.splitext(path)[1]
    if kind in SPREADSHEETS:
        raise UserError(f"{path} is a spreadsheet; open it and save it as CSV in UTF-8")
    if kind not in (".tsv", ".csv", ".jsonl", ".json"):
        raise UserError(f"{path}: unknown kind of file; labelled text is read from .tsv, .csv, .jsonl, .json")
    if not os.path.isfile(path):
        raise UserError(f"no file {path}; check the path (now in {os.getcwd()})")
    text, notes = _text(path, encoding)
    if not text.strip():
        raise UserError(
            f"{path} holds no rows: it is empty; expected a line of column names and one line for each example"
        )
    table = _read_json(path, text) if kind.startswith(".json") else _read_delimited(path, text, kind)
    if not table.rows:
        raise UserError(f"{path} holds no rows; expected a line of column names and one line for each example")
    for at, name in enumerate(table.columns):
        if name and name in table.columns[:at]:
            raise UserError(f"{path}: the column {name!r} is there twice; rename or remove one of the two")
    return table._replace(notes=(*notes, *table.notes))


def looks_like_data(table: Table) -> bool:
    """Whether the first line of a table seems to be an example, not the names of columns.

    So where a name is a sentence or a number, or one of the few values that stand below it again and again.
    """
    if table.delimiter is None or table.columns == [str(at) for at in range(len(table.columns))]:
        return False
    for at, name in enumerate(table.columns):
        below = [row.cells[at] for row in table.rows]
        if is_number(name) or len(name.split()) > 5 or len(name) > 60 or re.search("[.!。！？]$", name):
            return True
        if below.count(name) > 1 and len(set(below)) <= len(below) / 2:
            return True
    return False


def is_number(value: str) -> bool:
    """Also with a decimal comma."""
    try:
        float(value.replace(",", ".", 1))
    except ValueError:
        return False
    return True


def _text(path: str, encoding: str) -> tuple[str, list[str]]:
    """The content, its lines ended by line feeds alone."""
    notes = []
    with open(path, "rb") as raw:
        content = raw.read()
    for beginning, what in FOREIGN:
        if content.startswith(beginning):
            raise UserError(f"{path} is {what}")
    if encoding == "utf-8":
        if other := other_unicode(content[: 2**16]):
            raise UserError(f"{path} is not UTF-8: {Guess(other).advice}")
        held = encoding
    else:
        recoded = Recoded(io.BytesIO(content), encoding)
        with io.BufferedReader(recoded) as file:
            utf8 = file.read()
        notes += [f"{path} {recoded.notice}"] if recoded.notice else []
        content, utf8, held = utf8, content, recoded.encoding
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        if encoding == "utf-8":
            wrong = f"byte {content[error.start]:#04x} is not valid UTF-8"
            advice = detect(fault(cast(IO[bytes], io.BytesIO(content)), held)).advice
        else:
            wrong = f"bytes that are not valid {label(held)}"
            guess = detect(fault(cast(IO[bytes], io.BytesIO(utf8)), held))
            advice = "correct or remove the line" if guess.codec in (None, held) else guess.advice
        raise UserError(f"{path}:{line}: {wrong}; {advice}") from error
    text = text.removeprefix("\ufeff")
    if "\r" in text and "\n" not in text:
        notes.append(f"{path}: its lines end in a carriage return alone; read as lines")
        text = text.replace("\r", "\n")
    return text.replace("\r\n", "\n"), notes


def _lines(text: str) -> Iterator[tuple[int, str]]:
    return enumerate(text.removesuffix("\n").split("\n"), 1)


def _read_delimited(path: str, text: str, kind: str) -> Table:
    """By the delimiter that the ending promises; by another where that makes a table and the promised one does not."""
    expected = "\t" if kind == ".tsv" else ","
    first = text.lstrip().split("\n")[0]
    if first.startswith(("{", "[{")) and _is_json(first if first.startswith("{") else text):
        better = ".jsonl" if first[0] == "{" else ".json"
        raise UserError(f"{path} holds JSON, and is named {kind}; rename it to {better}")
    error: UserError | None = None
    table = None
    try:
        table = _with_header(path, _cells(path, text, expected, kind), expected)
    except UserError as caught:
        error = caught
    if table is None or len(table.columns) == 1:
        found = [other for delimiter in DELIMITERS if (other := _attempt(path, text, delimiter, kind))]
        best = max(found, key=lambda other: len(other.columns), default=None)
        if best and best.delimiter and best.delimiter != expected:
            words = DELIMITERS[best.delimiter]
            return best._replace(notes=(f"{path}: its columns are separated by {words}; read as that",))
        seen = next((sign for sign in DELIMITERS if sign != expected and table and sign in table.columns[0]), None)
        if seen:
            # One column with such a name is no table that anyone meant: say why it is none of several.
            _with_header(path, _cells(path, text, seen, kind), seen)
    if error:
        raise error
    assert table
    return table


def _attempt(path: str, text: str, delimiter: str, kind: str) -> Table | None:
    """The table of several columns that this delimiter makes; None where it makes none."""
    try:
        table = _with_header(path, _cells(path, text, delimiter, kind), delimiter)
    except UserError:
        return None
    return table if len(table.columns) > 1 and table.rows else None


def _cells(path: str, text: str, delimiter: str, kind: str) -> list[Row]:
    if kind == ".tsv" and delimiter == "\t":
        # Quotes are ordinary characters, as in GLUE's files.
        return [Row(number, list(line.split("\t"))) for number, line in _lines(text) if line.strip()]
    csv.field_size_limit(2**31 - 1)  # by default a long text is an error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    try:
        return [Row(reader.line_num, list(cells)) for cells in reader if cells]
    except csv.Error as error:
        raise UserError(f'{path}:{reader.line_num}: {error}; quote fields with ", and a " inside them as ""') from error


def _with_header(path: str, rows: list[Row], delimiter: str) -> Table:
    columns = [(cell or "").strip() for cell in rows[0].cells]
    for row in rows[1:]:
        if len(row.cells) != len(columns):
            raise UserError(
                f"{path}:{row.number}: {len(row.cells)} columns, but the first line names {len(columns)}; "
                "correct or remove the line"
            )
    return Table(path, columns, rows[1:], delimiter, ())


def _read_json(path: str, text: str) -> Table:
    """Objects, one a line; or all in one array, which is said."""
    notes: tuple[str, ...] = ()
    records: list[tuple[int, dict]] | None = None
    if text.lstrip()[0] == "[":
        records = _array(path, text)
        notes = (f"{path} is a JSON array of {len(records):,} objects; read as that",) if records else ()
    elif not _is_json(text.lstrip().split("\n")[0]) and _is_json(text):
        fields = ", ".join(map(repr, list(json.loads(text))[:8]))
        raise UserError(
            f"{path} is one JSON object, with the fields {fields}; write the examples as objects, one a line (.jsonl) "
            "or in an array"
        )
    if not records:
        records = [(number, _parse_object(line, f"{path}:{number}")) for number, line in _lines(text) if line.strip()]
    columns = list(records[0][1]) if records else []
    rows = [Row(number, [_scalar(record.get(name)) for name in columns]) for number, record in records]
    return Table(path, columns, rows, None, notes)


def _array(path: str, text: str) -> list[tuple[int, dict]] | None:
    """The objects of a JSON array, by number; None where the text is something else."""
    try:
        values = json.loads(text, object_pairs_hook=_unique(path))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        if "\n" in text.strip():
            raise UserError(f"{path} begins like a JSON array and is none ({error}); correct it") from error
        return None
    if not all(isinstance(value, dict) for value in values):
        return None
    return [(number, _checked(value, f"{path}:{number}")) for number, value in enumerate(values, 1)]


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def _scalar(value: object) -> str | None:
    if isinstance(value, str):
        return value
    return json.dumps(value) if isinstance(value, int | float) else None


def _parse_object(line: str, place: str) -> dict:
    """The JSON object on a line; raises UserError with file:line where there is none, or text that no UTF-8 holds."""
    try:
        record = json.loads(line, object_pairs_hook=_unique(place))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON ({error}); each line holds one object, {{…}}") from error
    if not isinstance(record, dict):
        raise UserError(f"{place}: JSON of type {type(record).__name__}; each line holds one object, {{…}}")
    return _checked(record, place)


def _unique(place: str) -> Callable[[list[tuple[str, object]]], dict]:
    """For json.loads: objects whose fields have a name each."""

    def made(pairs: list[tuple[str, object]]) -> dict:
        record = dict(pairs)
        if len(record) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for at, name in enumerate(names) if name in names[:at])
            raise UserError(f"{place}: the field {twice!r} is there twice in an object; remove one of the two")
        return record

    return made


def _checked(record: dict, place: str) -> dict:
    for name, value in record.items():
        try:
            f"{name}{value if isinstance(value, str) else ''}".encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{place}: half a surrogate pair (\\ud800 …) is no character; remove it") from error
    return record
