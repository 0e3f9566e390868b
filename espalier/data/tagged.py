"""Sentences whose words have tags: files in columns (CoNLL), .jsonl, .json and .parquet files, data sets hf:…

In columns, a line is a word with its tag, between them tabs or blanks, and an empty line (or one that holds a tab or
blanks) ends a sentence; lines -DOCSTART- and comments (# without a tab, where tabs separate) are left out. Elsewhere a
record holds a list of words, or a string whose characters are the words, and a list of as many tags.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Sequence
from typing import IO, NamedTuple, cast

from espalier.data.encodings import codec
from espalier.data.formats import PACKED
from espalier.data.records import Record, Records, json_records, parquet_records
from espalier.data.remote import is_remote
from espalier.data.sources import SPEC, open_library
from espalier.data.storage import digest, open_file, plain_name
from espalier.data.tables import LONGEST, read_text, readable
from espalier.errors import UserError
from espalier.files import sha256_of_file

TOKEN_FIELDS = ("tokens", "words", "characters", "text")
TAG_FIELDS = ("tags", "ner_tags", "labels", "ner", "pos_tags", "upos")
DOCUMENT = "-DOCSTART-"


class Tagged(NamedTuple):
    """Sentences in the order of their file."""

    words: list[list[str]]
    tags: list[list[str]]
    """As many for each sentence."""
    places: list[str]
    """Where each begins, for messages: file:line."""
    columns: tuple[str, str]
    """What held words and tags: names of fields, or numbers of columns."""
    notes: tuple[str, ...] = ()
    """What people should know about the file, a sentence each."""
    fingerprint: str = ""
    """SHA-256 of the file, or what stands for the content of something remote."""


def read_tagged(path: str, tokens: str | None = None, tags: str | None = None, encoding: str = "utf-8") -> Tagged:
    """tokens, tags: the columns by their numbers (from 1, or from the end: -1), or the names of fields.

    Unset = the first column and the last, or the first of TOKEN_FIELDS and TAG_FIELDS that is there. UserError naming
    file and line where the content is not as expected.
    """
    encoding = codec(encoding)
    if match := SPEC.fullmatch(path):
        if match[1] in ("builtin", "python"):
            raise UserError(f"{path} has no tags; tagged sentences are read from files in columns, .jsonl or hf:…")
        if encoding != "utf-8":
            raise UserError(f"data.encoding={encoding} is of files, and {path} is a data set; leave it out")
        source = open_library(match[1], match[2])
        found = _of_records(path, list(source.records()), tokens, tags)._replace(fingerprint=source.fingerprint())
    else:
        found = _read_file(path, tokens, tags, encoding)
    if not found.words:
        raise UserError(f"{path} holds no sentences; expected a word with its tag on each line, or JSON objects")
    return found


def _read_file(path: str, tokens: str | None, tags: str | None, encoding: str) -> Tagged:
    name = plain_name(path)
    packing = next((suffix for suffix in PACKED if name.endswith(suffix)), "")
    kind = os.path.splitext(name.removesuffix(packing))[1]
    if kind == ".parquet":
        with readable(path), open_file(path) as file:
            records = _all(parquet_records(file, path))
            fingerprint = digest(path) if is_remote(path) else sha256_of_file(path)
        return _of_records(path, records, tokens, tags)._replace(fingerprint=fingerprint)
    file = read_text(path, encoding)
    if kind in (".jsonl", ".json") or file.text.lstrip().startswith('{"'):
        content = io.BytesIO(file.text.encode())
        found = _of_records(
            path, _all(json_records(cast(IO[bytes], content), path, LONGEST, unique=True)), tokens, tags
        )
    else:
        found = _of_columns(path, file.text, tokens, tags)
    return found._replace(notes=(*file.notes, *found.notes), fingerprint=file.fingerprint)


def _all(records: Records) -> list[Record]:
    found = []
    for _, record in records:
        if isinstance(record, Record):
            found.append(record)
        elif record.dropped:
            raise UserError(f"{record.name}: {record.message}")
    return found


def _of_columns(path: str, text: str, tokens: str | None, tags: str | None) -> Tagged:
    lines = text.split("\n")
    tabs = has_tabs(text)
    words: list[list[str]] = []
    labels: list[list[str]] = []
    places: list[str] = []
    width, at_token, at_tag = 0, 0, -1
    between = True
    for number, line in enumerate(lines, 1):
        if is_document_line(line):
            between = True
            continue
        if tabs and is_comment(line):
            continue
        cells = cells_of(line, tabs)
        if not width:
            width = len(cells)
            at_token, at_tag = (
                _column(name, default, width, f"{path}:{number}") for name, default in ((tokens, 0), (tags, width - 1))
            )
            if at_token == at_tag:
                raise UserError(
                    f"{path}:{number}: one column of both words and tags, {line[:40]!r}; expected a word, a tab or "
                    "blank, and its tag on each line, an empty line behind each sentence"
                )
        if len(cells) != width:
            raise UserError(
                f"{path}:{number}: {len(cells)} column{'s' * (len(cells) != 1)}, and the lines before have {width} "
                f"({'tabs' if tabs else 'blanks'} separate them): {line[:40]!r}; correct or remove the line"
            )
        if not cells[at_token] or not cells[at_tag]:
            raise UserError(f"{path}:{number}: no {'tag' if cells[at_token] else 'word'}; correct or remove the line")
        if between:
            words.append([])
            labels.append([])
            places.append(f"{path}:{number}")
            between = False
        words[-1].append(cells[at_token])
        labels[-1].append(cells[at_tag])
    return Tagged(words, labels, places, (str(at_token + 1), str(at_tag + 1)))


def has_tabs(text: str) -> bool:
    """Whether tabs separate the columns; else blanks do."""
    return any("\t" in line.strip(" \t\r") for line in text.split("\n"))


def is_document_line(line: str) -> bool:
    """Whether it holds no word: it is empty, or marks a new document. A sentence ends there."""
    return not line.strip(" \t") or line.strip(" \t").split("\t")[0].split(" ")[0] == DOCUMENT


def is_comment(line: str) -> bool:
    """Where tabs separate columns."""
    return line.startswith("#") and "\t" not in line


def cells_of(line: str, tabs: bool) -> list[str]:
    """The columns of a line."""
    return [cell.strip(" ") for cell in line.split("\t")] if tabs else re.split(" +", line.strip(" \t"))


def _column(name: str | None, default: int, width: int, place: str) -> int:
    """The index of a column."""
    if name is None:
        return default
    if not re.fullmatch("-?[1-9][0-9]*", name):
        raise UserError(f"{place}: no column {name!r}; columns of words and tags have numbers, here 1 to {width}")
    at = int(name)
    if abs(at) > width:
        raise UserError(f"{place}: no column {at}; there are {width}")
    return at - 1 if at > 0 else width + at


def _of_records(path: str, records: Sequence[Record], tokens: str | None, tags: str | None) -> Tagged:
    fields = tuple(records[0].columns) if records else ()
    token_field = _field(path, "tokens", tokens, TOKEN_FIELDS, fields)
    tag_field = _field(path, "tags", tags, TAG_FIELDS, fields)
    words, labels, places = [], [], []
    for record in records:
        values = {name: _plain(value) for name, value in zip(record.columns, record.values, strict=True)}
        token_list, tag_list = values.get(token_field), values.get(tag_field)
        if isinstance(token_list, str):
            token_list = list(token_list)
        for name, found in ((token_field, token_list), (tag_field, tag_list)):
            if not isinstance(found, list) or not all(isinstance(item, str) and item for item in found):
                numbers = isinstance(found, list) and any(isinstance(item, int) for item in found)
                given = "a list of numbers" if numbers else "no list of strings"
                advice = "write the tags by their names" if numbers else "correct or remove it"
                raise UserError(f"{record.name}: {given} under {name!r}; {advice}")
        assert isinstance(token_list, list) and isinstance(tag_list, list)
        if len(token_list) != len(tag_list):
            raise UserError(
                f"{record.name}: {len(token_list)} words under {token_field!r} and {len(tag_list)} tags under "
                f"{tag_field!r}; each word needs one tag"
            )
        try:
            "".join([*token_list, *tag_list]).encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{record.name}: half a surrogate pair (\\ud800 …) is no character; remove it") from error
        if token_list:
            words.append(token_list)
            labels.append(tag_list)
            places.append(record.name)
    return Tagged(words, labels, places, (token_field, tag_field))


def _plain(value: object) -> object:
    return value.as_py() if hasattr(value, "as_py") else value  # type: ignore[attr-defined]


def _field(path: str, what: str, given: str | None, known: Iterable[str], fields: Sequence[str]) -> str:
    name = given or next((name for name in known if name in fields), None)
    if fields and name not in fields:
        there = ", ".join(map(repr, fields[:8]))
        wanted = f"no field {name!r}" if name else f"no field of {what} that is known by its name"
        raise UserError(f"{path} has {wanted}; there are {there}: name one with --data.{what}")
    return name or ""
