"""Whole tables with named columns, for fine-tuning: files (data.records) and data sets of libraries.

A file whose content does not match its suffix is recognised. It is read, with a notice, where there is no doubt
(semicolons under a proper header, an array of JSON objects); else a UserError says what was found and what to do. The
first bad record is an error with its line.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import IO, Any, NamedTuple, cast

from espalier.data.encodings import Guess, detect, label, other_unicode
from espalier.data.formats import PACKED
from espalier.data.recode import Recoded, fault
from espalier.data.records import (
    FieldTwiceError,
    Record,
    Records,
    delimited_records,
    json_records,
    parquet_records,
    unique_fields,
)
from espalier.data.remote import is_remote
from espalier.data.sources import SPEC, open_library
from espalier.data.storage import damaged_errors, digest, open_file, plain_name
from espalier.errors import UserError
from espalier.files import sha256_of_file

DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
KINDS = (".tsv", ".csv", ".jsonl", ".json", ".parquet")
EXPECTED = f"{', '.join(KINDS)} (each also as .gz or .zst; paths or URLs) or hf:ID_OR_FOLDER?split=train"
FOREIGN = (
    (b"PK\x03\x04", "an Excel file or another archive; open it and save it as CSV in UTF-8"),
    (b"\xd0\xcf\x11\xe0", "an old Excel file; open it and save it as CSV in UTF-8"),
    (b"PAR1", "a Parquet file; name it .parquet"),
    (b"\x1f\x8b", "packed by gzip; add .gz to its name, or unpack it with `gunzip`"),
    (b"\x28\xb5\x2f\xfd", "packed by Zstandard; add .zst to its name, or unpack it with `unzstd`"),
)
"""First bytes of files that are not text, and what the files are."""
SPREADSHEETS = (".xlsx", ".xls", ".ods")
LONGEST = 2**31 - 1
"""Bytes of a record, which here is in memory anyway."""


class Table(NamedTuple):
    path: str
    columns: list[str]
    rows: list[Record]
    """Their values are strings, in the order of `columns`; None where there is no string or number."""
    delimiter: str | None
    """None where it is not a file of delimited cells."""
    notes: tuple[str, ...]
    """What people should know about the file, a sentence each."""
    fingerprint: str = ""
    """SHA-256 of the file, or what stands for the content of something remote (data.storage.digest)."""
    records: Sequence[Record] = ()
    """The rows as read, each with columns of its own: what JSON holds (lists, objects), strings of a table."""


def read_table(path: str, encoding: str = "utf-8") -> Table:
    """The rows of a file, a URL or a data set (hf:…, tfds:…). encoding: as data.encodings.codec names it."""
    if match := SPEC.fullmatch(path):
        table = _read_library(path, match[1], match[2], encoding)
    else:
        table = _read_file(path, encoding)
    if not table.rows:
        raise UserError(f"{path} holds no rows; expected a line of column names and one line for each example")
    for at, name in enumerate(table.columns):
        if name and name in table.columns[:at]:
            raise UserError(f"{path}: the column {name!r} is there twice; rename or remove one of the two")
    return table


class TextFile(NamedTuple):
    text: str
    """Its lines ended by line feeds alone."""
    notes: tuple[str, ...]
    """What people should know about the file, a sentence each."""
    fingerprint: str
    """SHA-256 of the file, or what stands for the content of something remote."""


def read_text(path: str, encoding: str = "utf-8") -> TextFile:
    """A whole file, or what is behind a URL, as text; unpacked where its name ends in .gz or .zst.

    UserError where it cannot be read or is in another encoding.
    """
    with readable(path), open_file(path) as file:
        text, notes = _text(path, file.read(), encoding)
        return TextFile(text, tuple(notes), digest(path) if is_remote(path) else sha256_of_file(path))


def looks_like_data(table: Table) -> bool:
    """Whether the first line of a table seems to be an example, not the names of columns.

    So where a name is a sentence or a number, or one of the few values that stand below it again and again.
    """
    if table.delimiter is None or table.columns == [str(at) for at in range(len(table.columns))]:
        return False
    for at, name in enumerate(table.columns):
        below = [row.values[at] for row in table.rows]
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


def _read_file(path: str, encoding: str) -> Table:
    kind = _kind(path)
    with readable(path), open_file(path) as file:
        if kind == ".parquet":
            table = _of_records(path, _all(parquet_records(file, path), ""))
        else:
            table = _of_text(path, file.read(), kind, encoding)
        found = digest(path) if is_remote(path) else sha256_of_file(path)
    return table._replace(fingerprint=found)


@contextlib.contextmanager
def readable(path: str) -> Iterator[None]:
    """What goes wrong in reading a file, as a UserError."""
    if not is_remote(path) and not os.path.isfile(path):
        raise _no_file(path)
    try:
        yield
    except damaged_errors() as error:
        raise UserError(f"{path} is cut off or damaged ({error}); fetch it again") from error
    except OSError as error:
        why = error.strerror or " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} cannot be read: {why}; check the path and its permissions") from error


def _no_file(path: str) -> UserError:
    return UserError(f"no file {path}; check the path (now in {os.getcwd()})")


def _kind(path: str) -> str:
    name = plain_name(path)
    packing = next((suffix for suffix in PACKED if name.endswith(suffix)), "")
    kind = os.path.splitext(name.removesuffix(packing))[1]
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; name a file in it ({EXPECTED})")
    if kind in SPREADSHEETS:
        raise UserError(f"{path} is a spreadsheet; open it and save it as CSV in UTF-8")
    if kind not in KINDS and not is_remote(path) and not os.path.exists(path):
        # A folder that was meant, say: its name is not what is wrong.
        raise _no_file(path)
    if kind not in KINDS:
        raise UserError(f"{path}: unknown kind of file; labelled text is read from {EXPECTED}")
    return kind


def _read_library(path: str, library: str, spec: str, encoding: str) -> Table:
    if library in ("builtin", "python"):
        raise UserError(f"{path} has no labels; labelled text is read from {EXPECTED}")
    if encoding != "utf-8":
        raise UserError(f"data.encoding={encoding} is of files, and {path} is a data set; leave it out")
    source = open_library(library, spec)
    records = list(source.records())
    notice = getattr(source, "approximate", None)
    return _of_records(path, records, (notice,) if notice else ())._replace(fingerprint=source.fingerprint())


def _of_text(path: str, content: bytes, kind: str, encoding: str) -> Table:
    text, notes = _text(path, content, encoding)
    if not text.strip():
        raise UserError(
            f"{path} holds no rows: it is empty; expected a line of column names and one line for each example"
        )
    table = _read_json(path, text) if kind.startswith(".json") else _read_delimited(path, text, kind)
    return table._replace(notes=(*notes, *table.notes))


def _of_records(path: str, records: Sequence[Record], notes: tuple[str, ...] = ()) -> Table:
    """The columns are those of the first record."""
    columns = list(records[0].columns) if records else []
    rows = []
    for record in records:
        values = dict(zip(record.columns, record.values, strict=True))
        cells = [_cell(values.get(name)) for name in columns]
        for name, value in values.items():
            try:
                f"{name}{_written(value)}".encode()
            except UnicodeEncodeError as error:
                # As which bytes that are not UTF-8 are read.
                escaped = "\udc80" <= error.object[error.start] <= "\udcff"
                problem = "bytes that are not UTF-8" if escaped else "half a surrogate pair (\\ud800 …) is no character"
                raise UserError(f"{record.name}: {problem}; remove it") from error
        rows.append(Record(record.name, columns, cells))
    read = [Record(record.name, record.columns, [_plain(value) for value in record.values]) for record in records]
    return Table(path, columns, rows, None, notes, records=read)


def _plain(value: Any) -> Any:
    """What Arrow holds as Python's own."""
    return value.as_py() if hasattr(value, "as_py") else value


def _written(value: Any) -> str:
    """The text that a value holds, also within lists and objects."""
    if isinstance(value, str):
        return value
    value = _plain(value)
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else ""


def _cell(value: Any) -> str | None:
    value = _plain(value)
    if isinstance(value, str):
        return value
    return json.dumps(value) if isinstance(value, int | float) else None


def _all(records: Records, advice: str) -> list[Record]:
    """The records; UserError for the first that is bad. advice: what to do where the message does not say."""
    found = []
    for _, record in records:
        if isinstance(record, Record):
            found.append(record)
        elif record.dropped:
            raise UserError(f"{record.name}: {record.message}{advice * (record.kind == 'table')}")
    return found


def _text(path: str, content: bytes, encoding: str) -> tuple[str, list[str]]:
    """The text of a file, its lines ended by line feeds alone, and what people should know about it."""
    notes = []
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


def _read_delimited(path: str, text: str, kind: str) -> Table:
    """With the delimiter of the suffix, or with another where only that one makes a table."""
    expected = "\t" if kind == ".tsv" else ","
    first = text.lstrip().split("\n")[0]
    if first.startswith(("{", "[{")) and _is_json(first if first.startswith("{") else text):
        better = ".jsonl" if first[0] == "{" else ".json"
        raise UserError(f"{path} holds JSON, and is named {kind}; rename it to {better}")
    error: UserError | None = None
    table = None
    try:
        table = _cells(path, text, expected, kind)
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
            # Nobody means a single column with such a name: the error of the other delimiter says more.
            _cells(path, text, seen, kind)
    if error:
        raise error
    assert table
    return table


def _attempt(path: str, text: str, delimiter: str, kind: str) -> Table | None:
    """The table of several columns that this delimiter makes; None where it makes none."""
    try:
        table = _cells(path, text, delimiter, kind)
    except UserError:
        return None
    return table if len(table.columns) > 1 and table.rows else None


def _cells(path: str, text: str, delimiter: str, kind: str) -> Table:
    # In GLUE's files, which are .tsv, quotes are ordinary characters.
    quoted = not (kind == ".tsv" and delimiter == "\t")
    advice = "; correct or remove the line"
    if quoted:
        advice += ' (cells that hold a delimiter or a " need quotes, and " inside them is written "")'
    records = delimited_records(cast(IO[bytes], io.BytesIO(text.encode())), path, LONGEST, delimiter, quoted)
    header, *rows = _all(records, advice)
    columns = [name.strip() for name in header.values]
    return Table(path, columns, rows, delimiter, (), records=[Record(row.name, columns, row.values) for row in rows])


def _read_json(path: str, text: str) -> Table:
    """Objects, one a line, or all in one array, with a notice."""
    if text.lstrip()[0] == "[":
        if records := _array(path, text):
            return _of_records(path, records, (f"{path} is a JSON array of {len(records):,} objects; read as that",))
    elif not _is_json(text.lstrip().split("\n")[0]) and _is_json(text):
        fields = ", ".join(map(repr, list(json.loads(text))[:8]))
        raise UserError(
            f"{path} is one JSON object, with the fields {fields}; write the examples as objects, one a line (.jsonl) "
            "or in an array"
        )
    return _of_records(path, _all(json_records(io.BytesIO(text.encode()), path, LONGEST, unique=True), ""))


def _array(path: str, text: str) -> list[Record] | None:
    """The objects of a JSON array, by number; None where the text is something else."""
    try:
        values = json.loads(text, object_pairs_hook=unique_fields)
    except FieldTwiceError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        if "\n" in text.strip():
            raise UserError(f"{path} begins like a JSON array and is none ({error}); correct it") from error
        return None
    if not all(isinstance(value, dict) for value in values):
        return None
    return [Record(f"{path}:{number}", list(value), list(value.values())) for number, value in enumerate(values, 1)]


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False
