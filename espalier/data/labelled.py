"""Labelled texts for fine-tuning: which columns of a table hold texts and labels."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from espalier.data.encodings import codec
from espalier.data.tables import Table, is_number, looks_like_data, read_table
from espalier.errors import UserError

LABEL_COLUMNS = ("label", "Quality", "gold_label", "target", "class")
TEXT_COLUMNS = (
    ("sentence1", "sentence2"),
    ("#1 String", "#2 String"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("premise", "hypothesis"),
    ("sentence",),
    ("text",),
)
"""Column names of GLUE's files and most others; the first entry whose columns all exist is used."""


class Labelled(NamedTuple):
    """Rows of a labelled file, as strings."""

    texts_a: list[str]
    texts_b: list[str] | None
    """The second text of each pair; None where there is one text a row."""
    labels: list[str] | None
    """None where the file has no label column (texts to predict)."""
    text_columns: tuple[str, ...] = ()
    label_column: str | None = None
    columns: tuple[str, ...] = ()
    """All of the file."""
    notes: tuple[str, ...] = ()
    """What people should know about the file, a sentence each."""
    fingerprint: str = ""
    """SHA-256 of the file, or what stands for the content of something remote."""
    others: Mapping[str, list[Any]] = {}
    """Further columns that were asked for, as they were read: what JSON holds, strings of a table."""
    places: tuple[str, ...] = ()
    """Where each row stands, `file:line`, where further columns were asked for."""


def read_labelled(
    path: str | os.PathLike,
    text: tuple[str, ...] = (),
    label: str | None = None,
    encoding: str = "utf-8",
    others: tuple[str, ...] = (),
) -> Labelled:
    """Rows of a .tsv (tabs; quotes are ordinary characters), .csv (with quoting), .jsonl, .json or .parquet file, also
    packed or behind a URL, or of a data set: hf:…, tfds:… (data.tables).

    text: one or two columns; label: the column of labels; unset = guessed from the names, else from what the columns
    hold. others: further columns, of which those that the file has are given. Raises UserError naming file and line
    where the content is not as expected.
    """
    path = str(path)
    table = read_table(path, codec(encoding))
    columns, rows = table.columns, table.rows
    missing = [name for name in (*text, *([label] if label else [])) if name not in columns]
    known = {*LABEL_COLUMNS, *(name for names in TEXT_COLUMNS for name in names)}.intersection(columns)
    if (missing or not (known or text or label)) and looks_like_data(table):
        shown = ", ".join(repr(name if len(name) <= 40 else f"{name[:39]}…") for name in columns[:4])
        raise UserError(
            f"{path}: the first line looks like data, not like the names of columns: {shown}; put a line of names in "
            f"front, for instance {(table.delimiter or '').join(_names(len(columns)))!r}"
        )
    if missing:
        raise UserError(f"{path} has no column {missing[0]!r}; its columns are {', '.join(map(repr, columns))}")
    if len(text) > 2:
        raise UserError(f"{len(text)} text columns were given ({', '.join(text)}); a model reads one or two")
    label = label or next((name for name in LABEL_COLUMNS if name in columns and name not in text), None)
    text = text or _guess_text(table, label, others)

    def column(name: str) -> list[str]:
        at = columns.index(name)
        for row in rows:
            if row.values[at] is None:
                raise UserError(f"{row.name}: no string or number under {name!r}; correct or remove it")
        return [row.values[at] or "" for row in rows]

    return Labelled(
        texts_a=column(text[0]),
        texts_b=column(text[1]) if len(text) == 2 else None,
        labels=_label_cells(table, label) or [value.strip() for value in column(label)] if label else None,
        text_columns=tuple(text),
        label_column=label,
        columns=tuple(columns),
        notes=table.notes,
        fingerprint=table.fingerprint,
        others={
            name: [dict(zip(record.columns, record.values, strict=True)).get(name) for record in table.records]
            for name in others
            if name in columns
        },
        places=tuple(record.name for record in table.records) if others else (),
    )


def _label_cells(table: Table, label: str) -> list[str] | None:
    """Cells that hold lists of names, as JSON arrays; None where some do not. A label that is null is an empty list."""
    values = [dict(zip(record.columns, record.values, strict=True)).get(label) for record in table.records]
    if not values or not all(value is None or isinstance(value, list) for value in values) or not any(values):
        return None
    return [json.dumps(value or [], ensure_ascii=False) for value in values]


def _guess_text(table: Table, label: str | None, apart: tuple[str, ...]) -> tuple[str, ...]:
    columns, rows = table.columns, table.rows
    for names in TEXT_COLUMNS:
        if all(name in columns and name != label for name in names):
            return names
    others = [
        name
        for at, name in enumerate(columns)
        if name != label and name not in apart and not all(is_number(row.values[at] or "0") for row in rows)
    ]
    if not 1 <= len(others) <= 2:
        raise UserError(
            f"{table.path}: which columns hold the text? It has {', '.join(map(repr, columns))}; "
            "name one or two of them with --data.text"
        )
    return tuple(others)


def _names(count: int) -> list[str]:
    """Names for so many columns, of which the last is taken for the label."""
    texts = ["text"] if count < 3 else ["sentence1", "sentence2"]
    return ([*texts, "label"] + [f"column{number}" for number in range(4, count + 1)])[:count]
