"""Labelled texts for fine-tuning: read from files, encode, and put into batches of fitting length."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from espalier.data.encodings import codec
from espalier.data.loader import ALL, Batch, Part, shuffled
from espalier.data.tables import Table, is_number, looks_like_data, read_table
from espalier.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

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
"""The names that GLUE's files and most others use; the first pair or single one that is there."""
ROW_STEP = 16


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


class Encoded(NamedTuple):
    """Token ids of one example, special tokens included, and which text each belongs to (0 or 1)."""

    ids: list[int]
    types: list[int]


def read_labelled(
    path: str | os.PathLike, text: tuple[str, ...] = (), label: str | None = None, encoding: str = "utf-8"
) -> Labelled:
    """Rows of a .tsv (tabs; quotes are ordinary characters), .csv (with quoting), .jsonl, .json or .parquet file, also
    packed or behind a URL, or of a data set: hf:…, tfds:… (data.tables).

    text: one or two columns; label: the column of labels; unset = guessed from the names, else from what the columns
    hold. Raises UserError naming file and line where the content is not as expected.
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
    text = text or _guess_text(table, label)

    def column(name: str) -> list[str]:
        at = columns.index(name)
        for row in rows:
            if row.values[at] is None:
                raise UserError(f"{row.name}: no string or number under {name!r}; correct or remove it")
        return [row.values[at] or "" for row in rows]

    return Labelled(
        texts_a=column(text[0]),
        texts_b=column(text[1]) if len(text) == 2 else None,
        labels=[value.strip() for value in column(label)] if label else None,
        text_columns=tuple(text),
        label_column=label,
        columns=tuple(columns),
        notes=table.notes,
        fingerprint=table.fingerprint,
    )


def encode_pairs(
    tokenizer: PreTrainedTokenizerFast,
    texts_a: Sequence[str],
    texts_b: Sequence[str] | None,
    max_length: int,
    causal: bool,
) -> list[Encoded]:
    """Examples as the pretrained model knows text: [CLS] a [SEP] (b [SEP]), or bos a (eos b) eos for causal models.

    Too long ones are cut to max_length tokens: the longer text loses tokens from its end until both fit.
    """
    from espalier.data.tokenizer import plain_backend, special_ids

    backend = plain_backend(tokenizer)
    specials = special_ids(tokenizer, need=("bos", "eos") if causal else ("cls", "sep"))
    first, between = (specials.bos, specials.eos) if causal else (specials.cls, specials.sep)
    assert first is not None and between is not None
    room = max_length - (2 if texts_b is None else 3)
    if room < 2:
        raise UserError(f"max_length={max_length} leaves no room for text; give at least 8")

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    if texts_b is None:
        return [_framed([first, *ids[:room], between]) for ids in encode(texts_a)]
    return [
        _framed([first, *a[:keep], between], [*b[: room - keep], between])
        for a, b in zip(encode(texts_a), encode(texts_b), strict=True)
        for keep in [_kept(len(a), len(b), room)]
    ]


class LabelledBatches:
    """Encoded examples in batches whose rows are as long as their longest example needs.

    There are two row lengths, so that a jitted step is compiled twice and not for each length: one that holds the
    longest example of about half of the batches, one that holds all. Arrays: `input_ids`, `segment_ids`, `positions`,
    `token_type_ids` int32 [B,T], `labels` int32 [B], `example_weights` float32 [B] (0 for the rows that fill up the
    last evaluation batch).
    """

    def __init__(
        self,
        encoded: Sequence[Encoded],
        labels: Sequence[int] | np.ndarray,
        batch_size: int,
        seed: int = 0,
        *,
        pad_id: int,
        max_length: int,
    ):
        if not encoded:
            raise UserError("there are no labelled examples; give a file with some")
        assert len(encoded) == len(labels)
        self._encoded, self._labels = encoded, np.asarray(labels, np.int32)
        self._lengths = np.array([len(example.ids) for example in encoded])
        assert self._lengths.max() <= max_length, f"{self._lengths.max()} tokens in a row of {max_length}"
        self._batch_size, self._seed, self._pad_id = batch_size, seed, pad_id
        # A batch of B is no longer than L with probability (part of the examples up to L)^B.
        usual = np.quantile(self._lengths, 0.5 ** (1 / batch_size))
        steps = (-(-int(length) // ROW_STEP) * ROW_STEP for length in (np.ceil(usual), self._lengths.max()))
        self._row_lengths = tuple(min(length, max_length) for length in steps)

    def __len__(self) -> int:
        return len(self._encoded)

    def batch(self, step: int, part: Part = ALL) -> Batch:
        """Rows `part` of this step's global batch, in an order of its own in each epoch.

        The row length is that of the global batch, so that all hosts agree on it.
        """
        return self._rows(shuffled(step * self._batch_size + np.arange(self._batch_size), len(self), self._seed), part)

    def fixed(self, part: Part = ALL) -> list[Batch]:
        """All examples in the order of the file; empty rows fill up the last batch."""
        indices = np.append(np.arange(len(self)), np.full(-len(self) % self._batch_size, -1))
        return [self._rows(chosen, part) for chosen in indices.reshape(-1, self._batch_size)]

    def _rows(self, indices: np.ndarray, part: Part) -> Batch:
        longest = self._lengths[indices[indices >= 0]].max()
        length = next(length for length in self._row_lengths if length >= longest)
        indices = indices[part]
        shape = (len(indices), length)
        batch = {
            "input_ids": np.full(shape, self._pad_id, np.int32),
            "segment_ids": np.zeros(shape, np.int32),
            "positions": np.zeros(shape, np.int32),
            "token_type_ids": np.zeros(shape, np.int32),
            "labels": np.where(indices >= 0, self._labels[indices], 0).astype(np.int32),
            "example_weights": (indices >= 0).astype(np.float32),
        }
        for row, index in enumerate(indices):
            if index >= 0:
                example = self._encoded[index]
                size = len(example.ids)
                batch["input_ids"][row, :size] = example.ids
                batch["segment_ids"][row, :size] = 1
                batch["positions"][row, :size] = np.arange(size)
                batch["token_type_ids"][row, :size] = example.types
        return batch


def _framed(*parts: list[int]) -> Encoded:
    ids = [index for part in parts for index in part]
    return Encoded(ids, [number for number, part in enumerate(parts) for _ in part])


def _kept(a: int, b: int, room: int) -> int:
    """How many of a's tokens stay where a and b together have `room`."""
    if a + b <= room:
        return a
    half = room // 2
    return min(a, max(room - b, room - half))


def _guess_text(table: Table, label: str | None) -> tuple[str, ...]:
    columns, rows = table.columns, table.rows
    for names in TEXT_COLUMNS:
        if all(name in columns and name != label for name in names):
            return names
    others = [
        name
        for at, name in enumerate(columns)
        if name != label and not all(is_number(row.values[at] or "0") for row in rows)
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
