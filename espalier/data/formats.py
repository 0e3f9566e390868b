"""Text out of files: .txt and .md (one document a file), .jsonl (one a line), .csv and .parquet (one a row).

Each also packed, as .gz or .zst, and all but .parquet in any encoding. A bad record becomes a reject that says where
it is, and reading goes on behind it; memory does not depend on the size of a file.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator
from typing import IO, Any, cast

from espalier.data.documents import Item, Reject, from_text
from espalier.data.encodings import SAMPLE_BYTES, Guess, detect, label, other_unicode
from espalier.data.recode import Recoded, fault
from espalier.data.storage import damaged_errors, open_file, plain_name

PLAIN, TABLES = (".txt", ".md"), (".jsonl", ".csv", ".parquet")
PACKED = (".gz", ".zst")
TEXT_BYTES = 2**24
"""Longer text files become several documents, cut at a blank line where there is one."""
READ_BYTES, ROWS = 2**20, 16
"""What is read of a table at a time, as it is stored and as rows."""


def kind_of(path: str) -> str | None:
    """The suffix that says how a file is read, without that of its packing; None where it is unknown."""
    path = plain_name(path)
    packing = next((suffix for suffix in PACKED if path.endswith(suffix)), "")
    return next((suffix for suffix in PLAIN + TABLES if path.removesuffix(packing).endswith(suffix)), None)


def read(path: str, text_field: str, max_bytes: int, encoding: str = "utf-8") -> Iterator[Item]:
    """Documents and rejects of a file, in order. max_bytes: a longer line or field is rejected, unread.

    encoding: of text files, as data.encodings.codec names it; one that is Unicode in truth is read as that.
    """
    kind = kind_of(path) or ""
    reader = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}.get(kind)
    number, found, recoded, told = 0, False, None, False
    advice = functools.cache(lambda wanted: _advice(path, wanted))
    try:
        with open_file(path) as file:
            if kind != ".parquet":
                if encoding != "utf-8":
                    recoded = Recoded(file, encoding)
                    file = cast(IO[bytes], io.BufferedReader(recoded, 2**18))
                elif other := other_unicode(cast(Any, file).peek(SAMPLE_BYTES)[:SAMPLE_BYTES]):
                    yield Reject(path, "utf-8", f"not UTF-8: {Guess(other).advice}")
                    return
            items = reader(file, path, text_field, max_bytes) if reader else _plain(file, path)
            for number, item in items:  # noqa: B007 (an error below says where)
                found = True
                if recoded and recoded.notice and not told:
                    told = True
                    yield Reject(path, "encoding", recoded.notice, dropped=False)
                if isinstance(item, Reject) and item.kind == "utf-8" and kind != ".parquet":
                    wrong = f"bytes that are not valid {label(recoded.encoding)}" if recoded else item.message
                    item = item._replace(message=wrong + advice(recoded.encoding if recoded else encoding))
                yield item
        if not found:
            yield Reject(path, "empty", "holds no text")
    except damaged_errors() as error:
        yield Reject(f"{path}:{number + 1}", "damaged", f"damaged after {number} records ({error}); fetch it again")
    except OSError as error:
        yield Reject(path, "unreadable", error.strerror or " ".join(str(error).split()) or type(error).__name__)


def _plain(file: IO[bytes], path: str) -> Iterator[tuple[int, Item]]:
    number, line, rest = 0, 1, b""
    while True:
        content = rest + file.read(TEXT_BYTES - len(rest) + 1)
        whole = len(content) <= TEXT_BYTES
        cut = len(content) if whole else _cut(content)
        content, rest = content[:cut], content[cut:]
        if not content and number:
            return
        name = f"{path}:{line}" if number else path
        for item in _decoded(content, name, path, line):
            yield number, item
        line += content.count(b"\n")
        number += 1
        if whole:
            return


def _cut(content: bytes) -> int:
    """Where a part of a long text ends: behind the last blank line, line or blank, or at least between characters."""
    for separator in (b"\n\n", b"\r\n\r\n", b"\n", b" "):
        cut = content.rfind(separator, len(content) // 2, len(content) - 1)
        if cut >= 0:
            return cut + len(separator)
    cut = len(content)
    while cut > len(content) - 4 and content[cut - 1] & 0xC0 == 0x80:
        cut -= 1
    return cut - 1


def _decoded(content: bytes, name: str, path: str, line: int) -> Iterator[Item]:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        yield _not_utf8(f"{path}:{line + content.count(bytes([10]), 0, error.start)}", content, error)
        return
    yield from from_text(text.replace("\r\n", "\n"), name)


def _not_utf8(name: str, content: bytes, error: UnicodeDecodeError) -> Reject:
    return Reject(name, "utf-8", f"byte {content[error.start]:#04x} is not valid UTF-8")


def _advice(path: str, encoding: str) -> str:
    """What a text file with bytes that are not of this encoding seems to be in, as the end of a line."""
    try:
        with open_file(path) as file:
            guess = detect(fault(file, encoding))
    except (OSError, *damaged_errors()):
        return ""
    given = encoding != "utf-8" and guess.codec in (None, encoding)
    return "; correct or remove it" if given else f"; {guess.advice}"


def _jsonl(file: IO[bytes], path: str, text_field: str, max_bytes: int) -> Iterator[tuple[int, Item]]:
    number = 0
    while line := file.readline(max_bytes + 1):
        number += 1
        if len(line) > max_bytes:
            yield number, _long(f"{path}:{number}", _rest_of_line(file, line), max_bytes)
        elif not line.isspace():
            for item in _record(line, f"{path}:{number}", text_field):
                yield number, item


def _rest_of_line(file: IO[bytes], line: bytes) -> int:
    """Read on to the end of a line that began with `line`, keeping nothing; returns the bytes of it all."""
    length = len(line)
    while line and not line.endswith(b"\n"):
        line = file.readline(2**20)
        length += len(line)
    return length


def _long(name: str, length: int, max_bytes: int) -> Reject:
    return Reject(name, "long", f"a line of {length:,} bytes; at most {max_bytes:,} (--data.max-document-bytes)")


def _record(line: bytes, name: str, text_field: str) -> Iterator[Item]:
    try:
        content = line.decode("utf-8")
    except UnicodeDecodeError as error:
        yield _not_utf8(name, line, error)
        return
    if content.startswith("\ufeff"):
        content = content.lstrip("\ufeff")
        yield Reject(name, "bom", "begins with a byte-order mark; it was removed", dropped=False)
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        kind = "nul" if "\0" in content else "json"
        yield Reject(name, kind, f"not JSON ({error}); each line holds one object, {{…}}")
        return
    if not isinstance(record, dict):
        yield Reject(name, "json", f"JSON of type {type(record).__name__}; each line holds one object, {{…}}")
    elif text_field not in record:
        there = ", ".join(map(repr, list(record)[:10])) or "none"
        message = f"no field {text_field!r}; it has {there} (--data.text-field NAME chooses another)"
        yield Reject(name, "field", message.encode(errors="replace").decode())
    elif record[text_field] is None:
        yield Reject(name, "type", f"field {text_field!r} is null; expected a string")
    else:
        yield from from_text(record[text_field], name, text_field)


def _csv(file: IO[bytes], path: str, text_field: str, max_bytes: int) -> Iterator[tuple[int, Item]]:
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
            first = number, content.lstrip("\ufeff"), length
            yield 1, Reject(name, "bom", "begins with a byte-order mark; it was removed", dropped=False)
        taken = [first]
        try:
            cells = next(csv.reader(lines.record(taken), strict=True))
        except csv.Error as error:
            # Mostly a quote that is never closed: it costs its line, and what it has swallowed is read again.
            lines.give_back(taken[1:])
            yield number, Reject(name, "table", f"{error} (in what begins on this line)")
            continue
        last = taken[-1][0]
        if columns is None:
            columns = cells
            if text_field not in columns:
                yield last, Reject(name, "field", _no_column(text_field, columns))
                return
        elif len(cells) != len(columns):
            if cells:
                message = f"{len(cells)} columns, but the first line names {len(columns)}"
                yield last, Reject(name, "table", message)
        else:
            text = cells[columns.index(text_field)]
            if any("\udc80" <= character <= "\udcff" for character in text):
                yield last, Reject(name, "utf-8", "bytes that are not valid UTF-8")
                continue
            for item in from_text(text, name, text_field):
                yield last, item


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


def _parquet(file: IO[bytes], path: str, text_field: str, max_bytes: int) -> Iterator[tuple[int, Item]]:
    import pyarrow
    import pyarrow.parquet

    if not file.seekable():
        # Tables are read from their end.
        with tempfile.TemporaryFile() as unpacked:
            shutil.copyfileobj(file, unpacked)
            yield from _parquet(unpacked, path, text_field, max_bytes)
        return
    number = 0
    try:
        # In parts, of the file and of its rows: a table may be one group of rows, and a row a book. (A page, which is
        # 1,024 rows where Arrow wrote it, is unpacked as a whole.)
        table = pyarrow.parquet.ParquetFile(file, buffer_size=READ_BYTES, pre_buffer=False)
        columns = table.schema_arrow.names
        if text_field not in columns:
            yield 1, Reject(path, "field", _no_column(text_field, columns))
            return
        for group in range(table.num_row_groups):
            for batch in table.iter_batches(batch_size=ROWS, row_groups=[group], columns=[text_field]):
                for value in batch.column(0):
                    number += 1
                    for item in from_arrow(value, f"{path}:{number}", text_field, max_bytes):
                        yield number, item
    except (pyarrow.ArrowException, OSError) as error:
        # What Arrow cannot make sense of it calls an OSError, too, but not as the system and data.storage do.
        if isinstance(error, OSError) and error.strerror is not None:
            raise
        message = " ".join(str(error).split())[:200]
        yield number, Reject(f"{path}:{number + 1}", "damaged", f"damaged after {number} rows ({message})")


def from_arrow(value, name: str, text_field: str, max_bytes: int) -> Iterator[Item]:
    """The document of one value of an Arrow column, or why it is none."""
    import pyarrow

    if isinstance(value, pyarrow.DictionaryScalar):
        value = value.value
    if isinstance(value, pyarrow.BinaryScalar) and value.is_valid:
        yield from from_bytes(value.as_buffer(), name, text_field, max_bytes)
    else:
        yield from from_text(value.as_py(), name, text_field)


def from_bytes(content, name: str, text_field: str, max_bytes: int) -> Iterator[Item]:
    """The document of a UTF-8 text, or why it is none. content: bytes or what holds some."""
    if len(content) > max_bytes:
        yield too_long(name, len(content), max_bytes)
        return
    content = bytes(content)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        reject, guess = _not_utf8(name, content, error), detect(content)
        seems = f"; it looks like {label(guess.codec)}" if guess.codec not in (None, "utf-8") else ""
        yield reject._replace(message=reject.message + seems)
    else:
        yield from from_text(text, name, text_field)


def too_long(name: str, size: int, max_bytes: int) -> Reject:
    return Reject(name, "long", f"a text of {size:,} bytes; at most {max_bytes:,} (--data.max-document-bytes)")


def _no_column(text_field: str, columns: list[str]) -> str:
    there = ", ".join(map(repr, columns[:10]))
    return f"no column {text_field!r}; there are {there} (--data.text-field NAME chooses another)"
