"""Records with named columns out of .jsonl, .csv, .tsv and .parquet: for pretraining text and for labelled examples.

One record at a time, so that memory does not depend on the size of a file. A bad record becomes a reject with its
place, and reading continues after it; a caller that tolerates none raises at the first.
"""

from __future__ import annotations

import csv
import json
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from typing import IO, Any, NamedTuple

from espalier.data.documents import Reject

READ_BYTES, ROWS = 2**20, 16
"""What is read of a parquet file at a time, as it is stored and as rows."""


class Record(NamedTuple):
    name: str
    """Where it begins: `file:line`, or `file:row` of a parquet file."""
    columns: Sequence[str]
    values: Sequence[Any]
    """By column: what JSON holds, strings of a table, Arrow's scalars of a parquet file."""


Records = Iterator[tuple[int, Record | Reject]]
"""With the number of the line (row of a parquet file) where each ends."""


def json_records(file: IO[bytes], path: str, max_bytes: int, unique: bool = False) -> Records:
    """An object a line. unique: one that has a field twice is rejected; else the last one counts."""
    number = 0
    while line := file.readline(max_bytes + 1):
        number += 1
        if len(line) > max_bytes:
            yield number, _long(f"{path}:{number}", _rest_of_line(file, line), max_bytes)
        elif not line.isspace():
            for item in _object(line, f"{path}:{number}", unique):
                yield number, item


def delimited_records(
    file: IO[bytes],
    path: str,
    max_bytes: int,
    delimiter: str = ",",
    quoted: bool = True,
    blank_rows: bool = False,
) -> Records:
    """Rows of a .csv or .tsv file; the first one's values are the names of the columns.

    quoted: a cell in quotation marks may hold the delimiter and line breaks; else each line is a row.
    blank_rows: a line that holds only delimiters is a row too.
    Bytes that are not UTF-8 pass as lone surrogates, so that only the cells which need them are rejected.
    """
    csv.field_size_limit(max(max_bytes, 1))
    lines = _Lines(file, max_bytes)
    columns: list[str] | None = None
    while first := lines.take():
        number, content, length = first
        name = f"{path}:{number}"
        if content is None:
            yield number, _long(name, length, max_bytes)
            continue
        if number == 1 and content.startswith("\ufeff"):
            content = content.lstrip("\ufeff")
            first = number, content, length
            yield 1, Reject(name, "bom", "begins with a byte-order mark; it was removed", dropped=False)
        taken = [first]
        try:
            cells = (
                next(csv.reader(lines.record(taken), strict=True, delimiter=delimiter))
                if quoted
                else content.rstrip("\r\n").split(delimiter)
                if content.strip() or blank_rows and delimiter in content
                else []
            )
        except csv.Error as error:
            # Usually an unclosed quote: only its line is rejected, and the lines that it swallowed are read again.
            lines.give_back(taken[1:])
            yield number, Reject(name, "table", f"{error} (in what begins on this line)")
            continue
        last = taken[-1][0]
        if columns is None and cells:
            columns = cells
        if columns is not None and len(cells) == len(columns):
            yield last, Record(name, columns, cells)
        elif columns is not None and cells:
            yield last, Reject(name, "table", f"{len(cells)} columns, but the first line names {len(columns)}")


def parquet_records(file: IO[bytes], path: str, wanted: Sequence[str] | None = None) -> Records:
    """Rows of a parquet file, of the columns `wanted` or of all."""
    import pyarrow
    import pyarrow.parquet

    if not file.seekable():
        # Tables are read from their end.
        with tempfile.TemporaryFile() as unpacked:
            shutil.copyfileobj(file, unpacked)
            yield from parquet_records(unpacked, path, wanted)
        return
    number = 0
    try:
        # In parts, of the file and of its rows: a table may be one group of rows, and a row a book. (A page, which is
        # 1,024 rows where Arrow wrote it, is unpacked as a whole.)
        table = pyarrow.parquet.ParquetFile(file, buffer_size=READ_BYTES, pre_buffer=False)
        there = table.schema_arrow.names
        columns = list(there if wanted is None else wanted)
        if missing := [name for name in columns if name not in there]:
            yield 1, Reject(path, "field", no_column(missing[0], there))
            return
        for group in range(table.num_row_groups):
            for batch in table.iter_batches(batch_size=ROWS, row_groups=[group], columns=columns):
                for values in zip(*batch.columns, strict=True):
                    number += 1
                    yield number, Record(f"{path}:{number}", columns, values)
    except (pyarrow.ArrowException, OSError) as error:
        # What Arrow cannot make sense of it calls an OSError, too, but not as the system and data.storage do.
        if isinstance(error, OSError) and error.strerror is not None:
            raise
        message = " ".join(str(error).split())[:200]
        yield number, Reject(f"{path}:{number + 1}", "damaged", f"damaged after {number} rows ({message})")


class FieldTwiceError(Exception):
    """An object has a field twice; its text says which, and what to do."""


def unique_fields(pairs: list[tuple[str, Any]]) -> dict:
    """For json.loads (object_pairs_hook). FieldTwiceError where a name is not unique."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for at, name in enumerate(names) if name in names[:at])
        raise FieldTwiceError(f"the field {twice!r} is there twice in an object; remove one of the two")
    return record


def no_column(name: str, columns: Sequence[str]) -> str:
    """What is wrong where a column of text is missing."""
    there = ", ".join(map(repr, columns[:10]))
    return f"no column {name!r}; there are {there} (--data.text-field NAME chooses another)"


def not_utf8(name: str, content: bytes, error: UnicodeDecodeError) -> Reject:
    return Reject(name, "utf-8", f"byte {content[error.start]:#04x} is not valid UTF-8")


def _object(line: bytes, name: str, unique: bool) -> Iterator[Record | Reject]:
    try:
        content = line.decode("utf-8")
    except UnicodeDecodeError as error:
        yield not_utf8(name, line, error)
        return
    if content.startswith("\ufeff"):
        content = content.lstrip("\ufeff")
        yield Reject(name, "bom", "begins with a byte-order mark; it was removed", dropped=False)
    try:
        record = json.loads(content, object_pairs_hook=unique_fields if unique else None)
    except FieldTwiceError as error:
        yield Reject(name, "json", str(error))
        return
    except (ValueError, RecursionError) as error:
        kind = "nul" if "\0" in content else "json"
        yield Reject(name, kind, f"not JSON ({error}); each line holds one object, {{…}}")
        return
    if isinstance(record, dict):
        yield Record(name, list(record), list(record.values()))
    else:
        yield Reject(name, "json", f"JSON of type {type(record).__name__}; each line holds one object, {{…}}")


def _long(name: str, length: int, max_bytes: int) -> Reject:
    return Reject(name, "long", f"a line of {length:,} bytes; at most {max_bytes:,} (--data.max-document-bytes)")


def _rest_of_line(file: IO[bytes], line: bytes) -> int:
    """Skip to the end of a line that began with `line`; returns the length of the whole line in bytes."""
    length = len(line)
    while line and not line.endswith(b"\n"):
        line = file.readline(2**20)
        length += len(line)
    return length


class _Lines:
    """The lines of a file, which can be given back: (number, text, bytes); no text where a line is too long.

    Bytes that are no UTF-8 pass as lone surrogates, so that their row alone is rejected.
    """

    def __init__(self, file: IO[bytes], max_bytes: int):
        self._file, self._max_bytes = file, max_bytes
        self._number, self._again = 0, deque[tuple[int, str | None, int]]()

    def take(self) -> tuple[int, str | None, int] | None:
        """The next one; None at the end."""
        if self._again:
            return self._again.popleft()
        line = self._file.readline(self._max_bytes + 1)
        if not line:
            return None
        self._number += 1
        if len(line) > self._max_bytes:
            return self._number, None, _rest_of_line(self._file, line)
        return self._number, line.decode("utf-8", "surrogateescape"), len(line)

    def give_back(self, lines: list[tuple[int, str | None, int]]) -> None:
        self._again.extendleft(reversed(lines))

    def record(self, taken: list[tuple[int, str | None, int]]) -> Iterator[str]:
        """The text of the line in `taken`, then of as many as are asked for, which go there too.

        csv.Error where they are more than max_bytes together.
        """
        size = 0
        line = taken[0]
        while line:
            _, content, length = line
            size += length
            if content is None or size > self._max_bytes:
                self.give_back([taken.pop()])
                raise csv.Error(f"a row of more than {self._max_bytes:,} bytes (--data.max-document-bytes)")
            yield content
            line = self.take()
            taken += [line] if line else []
