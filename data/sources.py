"""Where text comes from: documents out of .txt and .jsonl files, and their split into training and validation text."""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple, Protocol

from cli import UserError
from data.builtin import BuiltinSource
from data.config import DataConfig
from data.documents import Document

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz")
MIN_HASHED_DOCUMENTS = 100
"""From this many documents on, each falls on a side by its own hash alone."""
MIN_TAIL = 200
"""Characters that the tail of an average document must have to be worth reading."""


class Source(Protocol):
    """Documents that can be read any number of times, always in the same order."""

    def __iter__(self) -> Iterator[Document]: ...

    def fingerprint(self) -> str:
        """Hex digest of what `__iter__` yields; computed without parsing, so that a cache lookup is cheap."""
        ...

    def size(self) -> int | None:
        """Bytes of text, roughly, for progress bars; None where unknown."""
        ...


class Sources(NamedTuple):
    train: Source
    validation: Source


def open_sources(config: DataConfig) -> Sources:
    """Training and validation text of a run."""
    if config.files:
        source: Source = FileSource(config.files, config.text_field)
    elif config.builtin:
        source = BuiltinSource(config.builtin, frozenset(config.builtin_exclude))
    else:
        raise UserError("no text was given; use --data.files 'text/*.txt', or --data.builtin pydoc for what is here")
    if not config.validation_files:
        return split_validation(source, config.validation_fraction)
    validation = FileSource(config.validation_files, config.text_field)
    if isinstance(source, FileSource):
        both = sorted({os.path.realpath(p) for p in source.paths} & {os.path.realpath(p) for p in validation.paths})
        if both:
            raise UserError(
                f"{len(both)} of the validation files are also training files ({both[0]}); "
                "name them so that no file is in both data.files and data.validation_files"
            )
    return Sources(source, validation)


class FileSource:
    """Documents of files: a .txt file is one document, a .jsonl or .jsonl.gz file holds one on each line."""

    def __init__(self, patterns: tuple[str, ...], text_field: str = "text"):
        self.paths = expand(patterns)
        self.text_field = text_field

    def __iter__(self) -> Iterator[Document]:
        for path in self.paths:
            if path.endswith(".txt"):
                yield _read_text(path)
            else:
                yield from _read_lines(path, self.text_field)

    def fingerprint(self) -> str:
        """Over contents and order of the files, not their names: moving a folder changes nothing."""
        with ThreadPoolExecutor() as pool:
            digests = pool.map(_file_digest, self.paths)
            parts = [f"{_suffix(path)} {digest}" for path, digest in zip(self.paths, digests, strict=True)]
        return hashlib.sha256("\n".join([f"files 1 {self.text_field}", *parts]).encode()).hexdigest()

    def size(self) -> int | None:
        return None if any(path.endswith(".gz") for path in self.paths) else sum(map(os.path.getsize, self.paths))


class Part:
    """One side of a split source: what `choose` takes of each document's text, `share` of the whole."""

    def __init__(self, source: Source, choose: Callable[[str], str], name: str, share: float):
        self._source, self._choose, self._name, self._share = source, choose, name, share

    def __iter__(self) -> Iterator[Document]:
        for document in self._source:
            text = self._choose(document.text)
            if text.strip():
                yield Document(text, document.name)

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self._name} {self._share} {self._source.fingerprint()}".encode()).hexdigest()

    def size(self) -> int | None:
        whole = self._source.size()
        return whole and round(whole * self._share)


def split_validation(source: Source, fraction: float) -> Sources:
    """Hold out about `fraction` of the text; the same content always falls on the same side.

    Of many documents (MIN_HASHED_DOCUMENTS, and ten expected in the validation part) those that their hash draws. Of
    few, the tail of each, cut at a line break or blank; or, where such tails would be fragments (MIN_TAIL), as many
    whole ones, first in the order of their hashes, as make up the fraction.
    """
    enough = max(MIN_HASHED_DOCUMENTS, math.ceil(10 / fraction))
    few = [(_rank(document.text), len(document.text)) for document in islice(source, enough)]
    if len(few) == enough:
        return _split(source, fraction, "documents", lambda text: text if _rank(text) < fraction * 2**64 else "")
    size = sum(length for _, length in few)
    if len(few) < 10 or size * fraction / len(few) >= MIN_TAIL:
        return _split(source, fraction, "tails", lambda text: text[_tail_start(text, fraction) :])
    drawn, held_out = set(), 0
    for rank, length in sorted(few):
        if held_out < fraction * size:
            drawn.add(rank)
            held_out += length
    return _split(source, fraction, "first documents", lambda text: text if _rank(text) in drawn else "")


def _split(source: Source, fraction: float, name: str, held_out: Callable[[str], str]) -> Sources:
    """held_out: text → its held-out end, which may be all or nothing of it."""

    def kept(text: str) -> str:
        return text[: len(text) - len(held_out(text))]

    return Sources(Part(source, kept, f"all but {name}", 1 - fraction), Part(source, held_out, name, fraction))


def expand(patterns: tuple[str, ...]) -> list[str]:
    """Sorted paths of the files that the globs match, each once."""
    paths: set[str] = set()
    for pattern in patterns:
        name = os.path.expanduser(pattern)
        found = [name] if os.path.isfile(name) else [p for p in glob.glob(name, recursive=True) if os.path.isfile(p)]
        if os.path.isdir(name):
            raise UserError(f"{pattern} is a folder; name its files, for instance '{pattern.rstrip('/')}/**/*.txt'")
        if not found:
            raise UserError(f"no file matches {pattern}; check the path (now in {os.getcwd()}) and quote globs")
        paths.update(found)
    for path in sorted(paths):
        _suffix(path)
    return sorted(paths)


def decode_line(line: bytes, path: str, number: int) -> str:
    """The line as text; raises UserError with file:line where it is no UTF-8."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}:{number}: byte {line[error.start]:#04x} is not valid UTF-8; convert the file, "
            "for instance with `iconv -f latin1 -t utf-8`"
        ) from error


def parse_object(line: str, path: str, number: int) -> dict:
    """The JSON object on a line; raises UserError with file:line where there is none, or text that no UTF-8 holds."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}:{number}: not JSON ({error}); each line holds one object, {{…}}") from error
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise UserError(f"{path}:{number}: JSON of type {kind}; each line holds one object, {{…}}")
    for name, value in record.items():
        try:
            f"{name}{value if isinstance(value, str) else ''}".encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{path}:{number}: half a surrogate pair (\\ud800 …) is no character; remove it") from error
    return record


def _suffix(path: str) -> str:
    for suffix in reversed(SUFFIXES):
        if path.endswith(suffix):
            return suffix
    raise UserError(f"{path}: unknown kind of file; text is read from {', '.join(SUFFIXES)}")


def _read_text(path: str) -> Document:
    with open(path, "rb") as file:
        content = file.read()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        text = decode_line(content.split(b"\n", number)[number - 1], path, number)
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    if not text.strip():
        raise UserError(f"{path} is empty; leave it out of the files, or give it some text")
    return Document(text, path)


def _read_lines(path: str, text_field: str) -> Iterator[Document]:
    empty = True
    try:
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    text = _parse_line(decode_line(line, path, number).removeprefix("\ufeff"), path, number, text_field)
                    if text.strip():
                        empty = False
                        yield Document(text, f"{path}:{number}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged gzip file ({error}); `gzip -t` checks it, fetch or write it again") from error
    if empty:
        raise UserError(f"{path} holds no text: it is empty or every {text_field!r} is; leave it out of the files")


def _parse_line(line: str, path: str, number: int, text_field: str) -> str:
    record = parse_object(line, path, number)
    if text_field not in record:
        raise UserError(
            f"{path}:{number}: no field {text_field!r}; it has {', '.join(map(repr, record)) or 'none'} "
            "(--data.text-field NAME chooses another)"
        )
    text = record[text_field]
    if not isinstance(text, str):
        raise UserError(f"{path}:{number}: field {text_field!r} is of type {type(text).__name__}; expected a string")
    return text


def _file_digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rank(text: str) -> int:
    """A number below 2^64 that looks random and depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _tail_start(text: str, fraction: float) -> int:
    """Where the held-out tail begins: after the last line break before its share, else after a blank, else there."""
    target = math.ceil(len(text) * (1 - fraction))
    lowest = math.floor(len(text) * max(1 - 2 * fraction, 0.0))
    for separator in ("\n", " "):
        cut = text.rfind(separator, lowest, target)
        if cut >= 0 and text[:cut].strip() and text[cut:].strip():
            return cut + 1
    return target
