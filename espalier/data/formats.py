"""Text out of files: .txt and .md (one document a file), .jsonl (one a line), .csv and .parquet (one a row).

Each may be compressed (.gz, .zst), and all but .parquet may be in any encoding. A bad record becomes a reject with its
place, and reading continues after it. Memory does not depend on the size of a file.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from typing import IO, Any, cast

from espalier.data.documents import Item, Reject, from_text
from espalier.data.encodings import SAMPLE_BYTES, Guess, detect, label, other_unicode
from espalier.data.recode import Recoded, fault
from espalier.data.records import delimited_records, json_records, no_column, not_utf8, parquet_records
from espalier.data.storage import damaged_errors, open_file, plain_name
from espalier.redaction import without_secrets

PLAIN, TABLES = (".txt", ".md"), (".jsonl", ".csv", ".parquet")
PACKED = (".gz", ".zst")
TEXT_BYTES = 2**24
"""Longer text files become several documents, cut at a blank line where there is one."""


def kind_of(path: str) -> str | None:
    """The suffix that says how a file is read, without .gz or .zst; None where it is unknown."""
    path = plain_name(path)
    packing = next((suffix for suffix in PACKED if path.endswith(suffix)), "")
    return next((suffix for suffix in PLAIN + TABLES if path.removesuffix(packing).endswith(suffix)), None)


def read(path: str, text_field: str, max_bytes: int, encoding: str = "utf-8") -> Iterator[Item]:
    """Documents and rejects of a file, in order. max_bytes: a longer line or field is rejected, unread.

    encoding: of text files, as data.encodings.codec names it; a file that is actually Unicode is read as Unicode.
    """
    kind = kind_of(path) or ""
    reader = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}.get(kind)
    number, found, recoded, told = 0, False, None, False
    advice = functools.cache(lambda wanted: _advice(path, wanted))
    name = without_secrets(path)
    try:
        with open_file(path) as file:
            if kind != ".parquet":
                if encoding != "utf-8":
                    recoded = Recoded(file, encoding)
                    file = cast(IO[bytes], io.BufferedReader(recoded, 2**18))
                elif other := other_unicode(cast(Any, file).peek(SAMPLE_BYTES)[:SAMPLE_BYTES]):
                    yield Reject(name, "utf-8", f"not UTF-8: {Guess(other).advice}")
                    return
            items = reader(file, name, text_field, max_bytes) if reader else _plain(file, name)
            for number, item in items:  # noqa: B007 (an error below says where)
                found = True
                if recoded and recoded.notice and not told:
                    told = True
                    yield Reject(name, "encoding", recoded.notice, dropped=False)
                if isinstance(item, Reject) and item.kind == "utf-8" and kind != ".parquet":
                    wrong = f"bytes that are not valid {label(recoded.encoding)}" if recoded else item.message
                    item = item._replace(message=wrong + advice(recoded.encoding if recoded else encoding))
                yield item
        if not found:
            yield Reject(name, "empty", "holds no text")
    except damaged_errors() as error:
        yield Reject(f"{name}:{number + 1}", "damaged", f"damaged after {number} records ({error}); fetch it again")
    except OSError as error:
        said = without_secrets(error.strerror or " ".join(str(error).split()))
        yield Reject(name, "unreadable", said or type(error).__name__)


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
        yield not_utf8(f"{path}:{line + content.count(bytes([10]), 0, error.start)}", content, error)
        return
    yield from from_text(text.replace("\r\n", "\n"), name)


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
    for number, record in json_records(file, path, max_bytes):
        if isinstance(record, Reject):
            yield number, record
        elif text_field not in record.columns:
            there = ", ".join(map(repr, record.columns[:10])) or "none"
            message = f"no field {text_field!r}; it has {there} (--data.text-field NAME chooses another)"
            yield number, Reject(record.name, "field", message.encode(errors="replace").decode())
        elif (text := record.values[record.columns.index(text_field)]) is None:
            yield number, Reject(record.name, "type", f"field {text_field!r} is null; expected a string")
        else:
            for item in from_text(text, record.name, text_field):
                yield number, item


def _csv(file: IO[bytes], path: str, text_field: str, max_bytes: int) -> Iterator[tuple[int, Item]]:
    column: int | None = None
    for last, record in delimited_records(file, path, max_bytes):
        if isinstance(record, Reject):
            yield last, record
        elif column is None:
            if text_field not in record.columns:
                yield last, Reject(record.name, "field", no_column(text_field, record.columns))
                return
            column = record.columns.index(text_field)
        elif any("\udc80" <= character <= "\udcff" for character in record.values[column]):
            yield last, Reject(record.name, "utf-8", "bytes that are not valid UTF-8")
        else:
            for item in from_text(record.values[column], record.name, text_field):
                yield last, item


def _parquet(file: IO[bytes], path: str, text_field: str, max_bytes: int) -> Iterator[tuple[int, Item]]:
    for number, record in parquet_records(file, path, [text_field]):
        if isinstance(record, Reject):
            yield number, record
        else:
            for item in from_arrow(record.values[0], record.name, text_field, max_bytes):
                yield number, item


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
        reject, guess = not_utf8(name, content, error), detect(content)
        seems = f"; it looks like {label(guess.codec)}" if guess.codec not in (None, "utf-8") else ""
        yield reject._replace(message=reject.message + seems)
    else:
        yield from from_text(text, name, text_field)


def too_long(name: str, size: int, max_bytes: int) -> Reject:
    return Reject(name, "long", f"a text of {size:,} bytes; at most {max_bytes:,} (--data.max-document-bytes)")
