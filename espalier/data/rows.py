"""Rows of tables, JSON lines and plain text one at a time: what a trained model is asked about.

Memory does not depend on the size of a file. A bad row becomes a reject with its place and reading goes on; what makes
a whole file unreadable is a UserError.
"""

from __future__ import annotations

import csv
import functools
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import IO, Any, NamedTuple, cast

from espalier.data.documents import Reject
from espalier.data.encodings import SAMPLE_BYTES, Guess, detect, label, other_unicode
from espalier.data.formats import PACKED
from espalier.data.recode import Recoded, fault
from espalier.data.records import Record, delimited_records, json_records, not_utf8, parquet_records
from espalier.data.remote import is_remote
from espalier.data.storage import damaged_errors, open_file, plain_name, size
from espalier.data.tables import DELIMITERS, FOREIGN, LONGEST
from espalier.data.tagged import has_tabs
from espalier.data.task_rows import Item, json_rows, sentences
from espalier.errors import UserError

STDIN = "-"
KINDS = ("tsv", "csv", "jsonl", "json", "txt", "parquet", "conll")
SUFFIXES = {"iob": "conll", "iob2": "conll", "bio": "conll"}
"""Further endings of names → what such files hold."""
DELIMITED = {"tsv": "\t", "csv": ","}


class Row(NamedTuple):
    name: str
    """Where it begins: `file:line`."""
    values: dict[str, Any]
    """JSON values by the names of columns or fields; a line of plain text is `text`."""


class Rows:
    """The rows of files in their order, and rejects between them. To be read once.

    paths: .tsv (tabs; quotes are ordinary characters) and .csv (with quoting), both with a line of names; .jsonl (an
    object a line), .json (an array of objects, or SQuAD's file, in memory), .txt (a text a line), .parquet, .conll
    (a word a line, sentences apart); also .gz, .zst and URLs; `-` is standard input. kind: of all, where it does not
    follow from the names. encoding: as data.encodings.codec names it. UserError where a file is not there.
    """

    def __init__(self, paths: Sequence[str], kind: str | None = None, encoding: str = "utf-8"):
        self._paths = [os.path.expanduser(path) for path in paths]
        self._kind, self._encoding = kind, encoding
        for path in self._paths:
            if path != STDIN and not is_remote(path) and not os.path.isfile(path):
                raise UserError(f"no file {path}; check the path (now in {os.getcwd()})")
            if path != STDIN or kind:
                self._kind_of(path)
        self._sizes = [None if path == STDIN else size(path) for path in self._paths]
        self._before, self._file = 0, cast(Any, None)
        self.notes: list[str] = []
        """What people should know about the files so far, a sentence each."""

    def __iter__(self) -> Iterator[Row | Reject]:
        for path, bytes_of_it in zip(self._paths, self._sizes, strict=True):
            yield from self._read(path)
            self._before += bytes_of_it or 0
            self._file = None

    @property
    def share(self) -> float | None:
        """The part of all bytes that has been read; None where their number is unknown."""
        if None in self._sizes or not (total := sum(cast(list[int], self._sizes))):
            return None
        return (self._before + (self._file.tell() if self._file else 0)) / total

    def _kind_of(self, path: str) -> str:
        name = plain_name(path)
        packing = next((suffix for suffix in PACKED if name.endswith(suffix)), "")
        kind = self._kind or os.path.splitext(name.removesuffix(packing))[1].removeprefix(".")
        kind = SUFFIXES.get(kind, kind)
        if kind not in KINDS:
            raise UserError(
                f"{path}: unknown kind of file; rows are read from .{', .'.join(KINDS)} (each also .gz, .zst or a URL) "
                "and from - = standard input; --data.format says what a file holds"
            )
        return kind

    def _read(self, path: str) -> Iterator[Row | Reject]:
        number = 0
        try:
            with ExitStack() as stack:
                file: Any = sys.stdin.buffer if path == STDIN else stack.enter_context(open_file(path))
                self._file = None if path == STDIN else file
                beginning = file.peek(SAMPLE_BYTES)[:SAMPLE_BYTES] if hasattr(file, "peek") else b""
                if path == STDIN and not self._kind:
                    kind = "jsonl" if beginning.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") else "txt"
                else:
                    kind = self._kind_of(path)
                if kind != "parquet":
                    file = self._text(path, file, beginning)
                for number, row in self._rows(path, file, kind):  # noqa: B007 (an error below says where)
                    yield self._explained(path, row)
        except damaged_errors() as error:
            raise UserError(f"{path} is cut off or damaged after line {number:,} ({error}); fetch it again") from error
        except OSError as error:
            why = error.strerror or " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{path} cannot be read: {why}; check the path and its permissions") from error

    def _text(self, path: str, file: Any, beginning: bytes) -> Any:
        """The file as UTF-8; UserError where its first bytes are those of something else."""
        if b"\r" in beginning and b"\n" not in beginning and self._encoding == "utf-8":
            raise UserError(
                f"{path}: its lines end in a carriage return alone (old Mac OS); convert it: tr '\\r' '\\n' < {path}"
            )
        for first, what in FOREIGN:
            if beginning.startswith(first):
                raise UserError(f"{path} is {what}")
        if self._encoding == "utf-8":
            if other := other_unicode(beginning):
                raise UserError(f"{path} is not UTF-8: {Guess(other).advice}")
            return file
        recoded = Recoded(file, self._encoding)
        utf8 = io.BufferedReader(recoded, 2**18)
        utf8.peek(1)
        if recoded.notice:
            self.notes.append(f"{path} {recoded.notice}")
        return utf8

    def _rows(self, path: str, file: Any, kind: str) -> Iterator[tuple[int, Row | Reject]]:
        if kind == "txt":
            yield from _lines(file, path)
        elif kind in DELIMITED:
            yield from self._cells(path, file, kind)
        elif kind in ("conll", "json"):
            for number, item in _of_task(path, file, kind):
                yield number, item if isinstance(item, Reject) else Row(*item)
        else:
            records = json_records(file, path, LONGEST) if kind == "jsonl" else parquet_records(file, path)
            for number, record in records:
                if isinstance(record, Record):
                    values = [value.as_py() if hasattr(value, "as_py") else value for value in record.values]
                    yield number, Row(record.name, dict(zip(record.columns, values, strict=True)))
                elif record.dropped:
                    yield number, record

    def _cells(self, path: str, file: Any, kind: str) -> Iterator[tuple[int, Row | Reject]]:
        first = file.peek(SAMPLE_BYTES).decode("utf-8", "replace").lstrip("\ufeff\r\n").partition("\n")[0]
        if first.startswith("{"):
            raise UserError(f"{path} holds JSON, and is read as {kind}; rename it to .jsonl (--data.format jsonl)")
        delimiter = _delimiter(first, DELIMITED[kind])
        if delimiter != DELIMITED[kind]:
            self.notes.append(f"{path}: its columns are separated by {DELIMITERS[delimiter]}; read as that")
        columns: list[str] | None = None
        quoted = not (kind == "tsv" and delimiter == "\t")
        for number, record in delimited_records(cast(IO[bytes], file), path, LONGEST, delimiter, quoted, True):
            if not isinstance(record, Record):
                if record.dropped:
                    yield number, record
            elif columns is None:
                columns = [name.strip() for name in record.values]
                if twice := next((name for at, name in enumerate(columns) if name in columns[:at]), None):
                    raise UserError(f"{path}: the column {twice!r} is there twice; rename or remove one of the two")
            elif any("\udc80" <= sign <= "\udcff" for cell in record.values for sign in cell):
                yield number, Reject(record.name, "utf-8", "bytes that are not valid UTF-8")
            else:
                yield number, Row(record.name, dict(zip(columns, record.values, strict=True)))

    def _explained(self, path: str, row: Row | Reject) -> Row | Reject:
        """With what an encoding that does not fit seems to be."""
        if isinstance(row, Row) or row.kind != "utf-8":
            return row
        wrong = row.message if self._encoding == "utf-8" else f"bytes that are not valid {label(self._encoding)}"
        return row._replace(message=f"{wrong}{'' if path == STDIN else _advice(path, self._encoding)}")


def _of_task(path: str, file: Any, kind: str) -> Iterator[tuple[int, Item]]:
    if kind == "json":
        return json_rows(file.read(), path)
    beginning = file.peek(SAMPLE_BYTES)[:SAMPLE_BYTES].decode("utf-8", "replace")
    return sentences(file, path, has_tabs(beginning))


def _lines(file: Any, path: str) -> Iterator[tuple[int, Row | Reject]]:
    number = 0
    while line := file.readline():
        number += 1
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            yield number, not_utf8(f"{path}:{number}", line, error)
            continue
        if number == 1:
            text = text.removeprefix("\ufeff")
        yield number, Row(f"{path}:{number}", {"text": text.removesuffix("\n").removesuffix("\r")})


def _delimiter(first: str, expected: str) -> str:
    """What separates the names in the first line: what the suffix says, or another where only that is in the line."""
    if expected in first:
        return expected
    counts = {sign: len(next(csv.reader([first], delimiter=sign), [])) for sign in DELIMITERS}
    best = max(counts, key=lambda sign: counts[sign])
    return best if counts[best] > 1 else expected


@functools.lru_cache(maxsize=8)
def _advice(path: str, encoding: str) -> str:
    """What a text file with bytes that are not of this encoding seems to be in, as the end of a line."""
    with open_file(path) as file:
        guess = detect(fault(file, encoding))
    given = encoding != "utf-8" and guess.codec in (None, encoding)
    return "; correct or remove it" if given else f"; {guess.advice}"
