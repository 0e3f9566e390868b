"""Where text comes from: files, data sets of libraries, the built-in text, and mixtures of any; and their split into
training and validation text.
"""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from espalier.data.builtin import BuiltinSource
from espalier.data.config import MAX_DOCUMENT_BYTES, DataConfig
from espalier.data.documents import Document, Item, Reject, documents
from espalier.data.encodings import codec
from espalier.data.formats import kind_of, read
from espalier.data.remote import is_remote
from espalier.data.storage import digest, expand, plain_name, size
from espalier.data.user_source import UserSource
from espalier.errors import UserError
from espalier.files import hash_of_text, sha256_of_lines, sha256_of_text
from espalier.redaction import without_secrets

if TYPE_CHECKING:
    from espalier.data.filters import Decisions
    from espalier.data.hf import HfSource
    from espalier.data.tfds import TfdsSource

MIN_HASHED_DOCUMENTS = 100
"""From this many documents on, each is assigned to a side by its own hash alone."""
MIN_TAIL = 200
"""The minimum length of an average document's held-out tail, in characters."""


class Source(Protocol):
    """Documents, and rejects between them, that can be read any number of times, always in the same order."""

    def __iter__(self) -> Iterator[Item]: ...

    def fingerprint(self) -> str:
        """Hex digest of what `__iter__` yields; computed without parsing, so that a cache lookup is cheap."""
        ...

    def size(self) -> int | None:
        """Bytes of text, roughly, for progress bars; None where unknown."""
        ...


class Sources(NamedTuple):
    train: dict[str, Source]
    """By name; a single one is called "text"."""
    validation: dict[str, Source]
    """By the name of the source that it is a part of; "validation" where it was given."""


EXPECTED = {
    "hf": "hf:ID_OR_FOLDER?split=train",
    "tfds": "tfds:NAME_OR_FOLDER?split=train",
    "builtin": "builtin:pydoc or builtin:packages",
    "python": "python:FILE.py:NAME",
}
SPEC = re.compile(r"(hf|tfds|builtin|python):(?!//)(.*)")


def open_sources(
    config: DataConfig, cache: Path | None = None, filtered: Callable[[Source], Source] = lambda source: source
) -> Sources:
    """Training and validation text of a run. filtered: what is done to each source before it is split."""
    train = _open_train(config, cache)
    if codec(config.encoding) != "utf-8" and not any(isinstance(source, FileSource) for source in train.values()):
        raise UserError(f"data.encoding={config.encoding} is of files, and no files were given; leave it out")
    for source in train.values():
        if notice := getattr(source, "approximate", None):
            print(without_secrets(notice), flush=True)
    if config.validation_files:
        validation = open_source(config.validation_files, config, cache)
        _check_apart(train, validation)
        return Sources({name: filtered(source) for name, source in train.items()}, {"validation": validation})
    halves = {name: split_validation(filtered(source), config.validation_fraction) for name, source in train.items()}
    return Sources(
        {name: kept for name, (kept, _) in halves.items()}, {name: held_out for name, (_, held_out) in halves.items()}
    )


def open_source(patterns: tuple[str, ...], config: DataConfig, cache: Path | None = None) -> Source:
    """Files and globs, or one data set: hf:…, tfds:…, builtin:…"""
    named = [match for pattern in patterns if (match := SPEC.fullmatch(pattern))]
    if not named:
        return FileSource(patterns, config.text_field, config.max_document_bytes, cache, codec(config.encoding))
    if len(patterns) > 1:
        raise UserError(f"{named[0][0]} beside other text; give each a name: --data.sources 'a={named[0][0]}' 'b=…'")
    library, spec = named[0].groups()
    if library == "python":
        return UserSource(spec)
    if library != "builtin":
        return open_library(library, spec, config.text_field, config.max_document_bytes)
    if not spec.partition("?")[0]:
        raise UserError(f"{named[0][0]!r} names no text; expected {EXPECTED[library]}")
    if spec not in ("pydoc", "packages"):
        raise UserError(f"builtin:{spec} is unknown; there are builtin:pydoc and builtin:packages")
    return BuiltinSource(spec, cache=cache)


def open_library(
    library: str, spec: str, text_field: str | None = None, max_document_bytes: int = MAX_DOCUMENT_BYTES
) -> HfSource | TfdsSource:
    """A data set of "hf" or "tfds". text_field: None where it is read by `records` alone, with all columns."""
    if not spec.partition("?")[0]:
        raise UserError(f"'{library}:{spec}' names no text; expected {EXPECTED[library]}")
    if library == "hf":
        from espalier.data.hf import HfSource

        return HfSource(spec, text_field, max_document_bytes)
    from espalier.data.tfds import TfdsSource

    return TfdsSource(spec, text_field, max_document_bytes)


def user_sources(config: DataConfig) -> list[str]:
    """What of the text is given by functions of the user's own: FILE.py:NAME of each."""
    patterns = [*config.files, *config.validation_files, *(spec.partition("=")[2] for spec in config.sources)]
    return [pattern.removeprefix("python:") for pattern in patterns if pattern.startswith("python:")]


def _open_train(config: DataConfig, cache: Path | None) -> dict[str, Source]:
    if config.sources:
        if config.files:
            raise UserError("data.files and data.sources were both given; name all text: --data.sources 'a=text/*.txt'")
        patterns: dict[str, list[str]] = {}
        for spec in config.sources:
            name, _, pattern = spec.partition("=")
            patterns.setdefault(name, []).append(pattern)
        return {name: open_source(tuple(given), config, cache) for name, given in patterns.items()}
    if config.files:
        return {"text": open_source(config.files, config, cache)}
    if config.builtin:
        return {"text": BuiltinSource(config.builtin, frozenset(config.builtin_exclude), cache)}
    raise UserError("no text was given; use --data.files 'text/*.txt', or --data.builtin pydoc for what is here")


def _check_apart(train: dict[str, Source], validation: Source) -> None:
    """UserError where a file is on both sides."""

    def paths(source: Source) -> set[str]:
        return {path if is_remote(path) else os.path.realpath(path) for path in getattr(source, "paths", ())}

    for source in train.values():
        both = sorted(paths(source) & paths(validation))
        if both:
            raise UserError(
                f"{len(both)} of the validation files are also training files ({both[0]}); "
                "name them so that no file is on both sides"
            )


class FileSource:
    """Documents of files, local or remote, in the order of their names (data.formats says how each is read)."""

    def __init__(
        self,
        patterns: tuple[str, ...],
        text_field: str = "text",
        max_document_bytes: int = MAX_DOCUMENT_BYTES,
        cache: Path | None = None,
        encoding: str = "utf-8",
    ):
        self.paths = expand(patterns, lambda path: kind_of(path) is not None)
        self.text_field, self._max_bytes, self._cache = text_field, max_document_bytes, cache
        self._encoding = encoding

    def __iter__(self) -> Iterator[Item]:
        for path in self.paths:
            yield from read(path, self.text_field, self._max_bytes, self._encoding)

    def fingerprint(self) -> str:
        """Over contents and order of the files, not their names: moving a folder changes nothing."""
        with ThreadPoolExecutor() as pool:
            digests = pool.map(lambda path: digest(path, self._cache), self.paths)
            parts = [f"{_suffix(path)} {found}" for path, found in zip(self.paths, digests, strict=True)]
        limit = "" if self._max_bytes == MAX_DOCUMENT_BYTES else f" {self._max_bytes}"
        encoding = "" if self._encoding == "utf-8" else f" in {self._encoding}"
        return sha256_of_lines([f"files 1 {self.text_field}{limit}{encoding}", *parts])

    def part(self, rank: int, ranks: int) -> FileSource:
        """The files of one of several workers: consecutive ones, so that the parts in order are the whole."""
        found = copy.copy(self)
        found.paths = self.paths[len(self.paths) * rank // ranks : len(self.paths) * (rank + 1) // ranks]
        return found

    def size(self) -> int | None:
        sizes = [size(path) for path in self.paths]
        return None if None in sizes else sum(filter(None, sizes))


class Filtered:
    """A source without the documents that data.filters has decided to drop."""

    def __init__(self, source: Source, decisions: Decisions, key: str):
        self.source, self.decisions, self._key = source, decisions, key
        self.dropped: dict[str, int] = decisions.counts

    def __iter__(self) -> Iterator[Item]:
        number, dropped = 0, iter(self.decisions.dropped.tolist())
        following = next(dropped, None)
        for item in self.source:
            if isinstance(item, Document):
                number += 1
                if following == number - 1:
                    following = next(dropped, None)
                    continue
            yield item

    def fingerprint(self) -> str:
        return sha256_of_text(f"filtered {self._key}")

    def size(self) -> int | None:
        return self.source.size()


class Part:
    """One side of a split source: what `choose` takes of each document's text, `share` of the whole."""

    def __init__(self, source: Source, choose: Callable[[str], str], name: str, share: float):
        self.source = source
        self._choose, self._name, self._share = choose, name, share
        self.dropped: dict[str, int] = getattr(source, "dropped", {}) if share >= 0.5 else {}

    def __iter__(self) -> Iterator[Item]:
        for item in self.source:
            if isinstance(item, Reject):
                # Only the larger side of a split reports them.
                if self._share >= 0.5:
                    yield item
                continue
            text = self._choose(item.text)
            if text.strip():
                yield Document(text, item.name)

    def fingerprint(self) -> str:
        return sha256_of_text(f"{self._name} {self._share} {self.source.fingerprint()}")

    def of(self, source: Source) -> Part:
        """The same side of another source, a part of this one."""
        return Part(source, self._choose, self._name, self._share)

    def size(self) -> int | None:
        whole = self.source.size()
        return whole and round(whole * self._share)


def sample(source: Source, places: int = 8, characters: int = 200_000) -> list[str]:
    """The first documents at some places of a source: of files, evenly spaced over them; else at its beginning."""
    while inner := getattr(source, "source", None):
        source = inner
    count = min(places, len(source.paths)) if isinstance(source, FileSource) else 1
    parts = [source.part(number, count) for number in range(count)] if isinstance(source, FileSource) else [source]
    texts: list[str] = []
    for part in parts:
        left = characters // count
        for document in documents(part):
            texts.append(document.text[:left])
            left -= len(texts[-1])
            if left <= 0:
                break
    return texts


def split_validation(source: Source, fraction: float) -> tuple[Source, Source]:
    """Training and validation part, about `fraction` of the text; the same content always falls on the same side.

    Many documents (MIN_HASHED_DOCUMENTS, and ten expected in the validation part): their hashes select whole ones. Few:
    the tail of each, cut at a line break or blank; where such tails would be shorter than MIN_TAIL, whole documents in
    the order of their hashes until they make up the fraction.
    """
    enough = max(MIN_HASHED_DOCUMENTS, math.ceil(10 / fraction))
    few = [(hash_of_text(document.text), len(document.text)) for document in islice(documents(source), enough)]
    if len(few) == enough:
        return _split(source, fraction, "documents", lambda text: text if hash_of_text(text) < fraction * 2**64 else "")
    size = sum(length for _, length in few)
    if len(few) < 10 or size * fraction / len(few) >= MIN_TAIL:
        return _split(source, fraction, "tails", lambda text: text[_tail_start(text, fraction) :])
    drawn, held_out = set(), 0
    for rank, length in sorted(few):
        if held_out < fraction * size:
            drawn.add(rank)
            held_out += length
    return _split(source, fraction, "first documents", lambda text: text if hash_of_text(text) in drawn else "")


def _split(source: Source, fraction: float, name: str, held_out: Callable[[str], str]) -> tuple[Source, Source]:
    """held_out: text → its held-out end, which may be all or nothing of it."""

    def kept(text: str) -> str:
        return text[: len(text) - len(held_out(text))]

    return Part(source, kept, f"all but {name}", 1 - fraction), Part(source, held_out, name, fraction)


def _suffix(path: str) -> str:
    kind, path = kind_of(path), plain_name(path)
    assert kind
    return path[path.rindex(kind) :]


def _tail_start(text: str, fraction: float) -> int:
    """Where the held-out tail begins: after the last line break before its share, else after a blank, else there."""
    target = math.ceil(len(text) * (1 - fraction))
    lowest = math.floor(len(text) * max(1 - 2 * fraction, 0.0))
    for separator in ("\n", " "):
        cut = text.rfind(separator, lowest, target)
        if cut >= 0 and text[:cut].strip() and text[cut:].strip():
            return cut + 1
    return target
