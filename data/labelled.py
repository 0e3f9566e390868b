"""Labelled texts for fine-tuning: read from tsv, csv or jsonl, encode, and put into batches of fitting length."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cli import UserError
from data.loader import ALL, Batch, Part, shuffled

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


class Encoded(NamedTuple):
    """Token ids of one example, special tokens included, and which text each belongs to (0 or 1)."""

    ids: list[int]
    types: list[int]


def read_labelled(path: str | os.PathLike, text: tuple[str, ...] = (), label: str | None = None) -> Labelled:
    """Rows of a .tsv (tabs; quotes are ordinary characters), .csv (with quoting) or .jsonl file with named columns.

    text: one or two columns; label: the column of labels; unset = guessed from the names, else from what the columns
    hold. Raises UserError naming file and line where the content is not as expected.
    """
    path = str(path)
    reader = {".tsv": _read_tsv, ".csv": _read_csv, ".jsonl": _read_jsonl}.get(os.path.splitext(path)[1])
    if reader is None:
        raise UserError(f"{path}: unknown kind of file; labelled text is read from .tsv, .csv, .jsonl")
    if not os.path.isfile(path):
        raise UserError(f"no file {path}; check the path (now in {os.getcwd()})")
    columns, rows = reader(path)
    if not rows:
        raise UserError(f"{path} holds no rows; expected a line of column names and one line for each example")
    missing = [name for name in (*text, *([label] if label else [])) if name not in columns]
    if missing:
        raise UserError(f"{path} has no column {missing[0]!r}; its columns are {', '.join(map(repr, columns))}")
    if len(text) > 2:
        raise UserError(f"{len(text)} text columns were given ({', '.join(text)}); a model reads one or two")
    label = label or next((name for name in LABEL_COLUMNS if name in columns and name not in text), None)
    text = text or _guess_text(path, columns, rows, label)

    def column(name: str) -> list[str]:
        at = columns.index(name)
        for row in rows:
            if row.cells[at] is None:
                raise UserError(f"{path}:{row.number}: no string or number under {name!r}; correct or remove the line")
        return [row.cells[at] or "" for row in rows]

    return Labelled(
        texts_a=column(text[0]),
        texts_b=column(text[1]) if len(text) == 2 else None,
        labels=column(label) if label else None,
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
    from data.tokenizer import plain_backend, special_ids

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


class _Row(NamedTuple):
    number: int
    """Line in the file."""
    cells: list[str | None]
    """By column; None where a JSON object has no string or number."""


def _guess_text(path: str, columns: list[str], rows: list[_Row], label: str | None) -> tuple[str, ...]:
    for names in TEXT_COLUMNS:
        if all(name in columns and name != label for name in names):
            return names
    others = [
        name for at, name in enumerate(columns) if name != label and not all(_is_number(row.cells[at]) for row in rows)
    ]
    if not 1 <= len(others) <= 2:
        raise UserError(
            f"{path}: which columns hold the text? It has {', '.join(map(repr, columns))}; name one or two of them"
        )
    return tuple(others)


def _is_number(value: str | None) -> bool:
    try:
        float(value or "0")
    except ValueError:
        return False
    return True


def _read_tsv(path: str) -> tuple[list[str], list[_Row]]:
    rows = [_Row(number, list(line.split("\t"))) for number, line in _lines(path) if line.strip()]
    return _with_header(path, rows)


def _read_csv(path: str) -> tuple[list[str], list[_Row]]:
    # A quoted field may hold line breaks, so the lines that were decoded one by one are joined again.
    text = "\n".join(line for _, line in _lines(path))
    csv.field_size_limit(2**31 - 1)  # by default a long text is an error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = [_Row(reader.line_num, list(cells)) for cells in reader if cells]
    except csv.Error as error:
        raise UserError(f'{path}:{reader.line_num}: {error}; quote fields with ", and a " inside them as ""') from error
    return _with_header(path, rows)


def _read_jsonl(path: str) -> tuple[list[str], list[_Row]]:
    records = []
    for number, line in _lines(path):
        if line.strip():
            records.append((number, _parse_object(line, path, number)))
    columns = list(records[0][1]) if records else []
    return columns, [_Row(number, [_scalar(record.get(name)) for name in columns]) for number, record in records]


def _scalar(value: object) -> str | None:
    if isinstance(value, str):
        return value
    return json.dumps(value) if isinstance(value, int | float) else None


def _with_header(path: str, rows: list[_Row]) -> tuple[list[str], list[_Row]]:
    if not rows:
        return [], []
    columns = [cell or "" for cell in rows[0].cells]
    for row in rows[1:]:
        if len(row.cells) != len(columns):
            raise UserError(
                f"{path}:{row.number}: {len(row.cells)} columns, but the first line names {len(columns)}; "
                "correct or remove the line"
            )
    return columns, rows[1:]


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """(number, line) of the file, without line ends and byte-order mark."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            text = _decode_line(line, path, number)
            yield number, (text.removeprefix("\ufeff") if number == 1 else text).removesuffix("\n").removesuffix("\r")


def _decode_line(line: bytes, path: str, number: int) -> str:
    """The line as text; raises UserError with file:line where it is no UTF-8."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}:{number}: byte {line[error.start]:#04x} is not valid UTF-8; convert the file, "
            "for instance with `iconv -f latin1 -t utf-8`"
        ) from error


def _parse_object(line: str, path: str, number: int) -> dict:
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
