"""Examples with named targets: texts encoded for the model, and put into batches of fitting length.

A target belongs to an example as a whole (a class, several classes, a decimal, the two ends of a span) or to each of
its tokens (a tag). Targets given by character positions are mapped to tokens through the offsets of the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from espalier.data.loader import ALL, Batch, Part, shuffled
from espalier.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ROW_STEP = 16
"""Row lengths are multiples of it."""


class Example(NamedTuple):
    ids: Sequence[int]
    """Special tokens included."""
    types: Sequence[int]
    """Which of its texts each token belongs to (0 or 1)."""
    offsets: np.ndarray | None = None
    """int32 [tokens, 2]: the characters begin … end of its text that a token stands for; -1 for special tokens."""
    of_row: Mapping[str, Any] = {}
    """Targets of the example by name, a number or an array of one shape; int32 where all are whole, else float32."""
    of_tokens: Mapping[str, Sequence[Any] | np.ndarray] = {}
    """Targets by name, one for each token."""


def encode_pairs(
    tokenizer: PreTrainedTokenizerFast,
    texts_a: Sequence[str],
    texts_b: Sequence[str] | None,
    max_length: int,
    causal: bool,
    offsets: bool = False,
) -> list[Example]:
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
    encode = backend.encode_batch if offsets else backend.encode_batch_fast

    def framed(*parts: Any) -> Example:
        """parts: (encoding, tokens kept of it), the first behind `first`, each before `between`."""
        ids, types, places = [first], [0], [(-1, -1)]
        for number, (encoding, keep) in enumerate(parts):
            ids += [*encoding.ids[:keep], between]
            types += [number] * (len(ids) - len(types))
            places += [*encoding.offsets[:keep], (-1, -1)] if offsets else []
        return Example(ids, types, np.array(places, np.int32) if offsets else None)

    encoded_a = encode(list(texts_a), add_special_tokens=False)
    if texts_b is None:
        return [framed((a, room)) for a in encoded_a]
    return [
        framed((a, keep), (b, room - keep))
        for a, b in zip(encoded_a, encode(list(texts_b), add_special_tokens=False), strict=True)
        for keep in [_kept(len(a.ids), len(b.ids), room)]
    ]


def token_span(example: Example, begin: int, end: int, text: int = 0) -> tuple[int, int] | None:
    """First and last token of the characters begin … end of one of its texts; None where some of them were cut off.

    The span must not end with blanks: a tokenizer may drop them.
    """
    assert example.offsets is not None, "encode with offsets=True"
    begins, ends = np.where(np.array(example.types)[:, None] == text, example.offsets, -1).T
    found = np.flatnonzero((begins < end) & (ends > begin))
    return (int(found[0]), int(found[-1])) if len(found) and ends[found[-1]] >= end else None


def tagged(example: Example, spans: Sequence[tuple[int, int]], tags: Sequence[int], text: int = 0) -> Example:
    """The example with `labels` of its tokens: a word's tag on its first piece, where `loss_weights` is 1 (else 0).

    spans: the characters begin … end of each word. A word that was cut off gets no label. Where several words share a
    token, it gets the label of the first.
    """
    labels, weights = np.zeros(len(example.ids), np.int32), np.zeros(len(example.ids), np.float32)
    for (begin, end), tag in zip(spans, tags, strict=True):
        found = token_span(example, begin, end, text)
        if found and not weights[found[0]]:
            labels[found[0]], weights[found[0]] = tag, 1.0
    return example._replace(of_tokens={**example.of_tokens, "labels": labels, "loss_weights": weights})


class LabelledBatches:
    """Examples in batches whose rows are as long as their longest example needs.

    There are two row lengths, so that a jitted step is compiled twice and not for each length: one that holds the
    longest example of about half of the batches, one that holds all. Arrays: `input_ids`, `segment_ids`, `positions`,
    `token_type_ids` int32 [B,T], `example_weights` float32 [B] (0 for the rows that fill up the last evaluation batch),
    and the targets by their names, [B, …] and [B,T], 0 where there is no example or token.
    """

    def __init__(self, examples: Sequence[Example], batch_size: int, seed: int = 0, *, pad_id: int, max_length: int):
        if not examples:
            raise UserError("there are no labelled examples; give a file with some")
        self._examples = examples
        self._lengths = np.array([len(example.ids) for example in examples])
        assert self._lengths.max() <= max_length, f"{self._lengths.max()} tokens in a row of {max_length}"
        self._batch_size, self._seed, self._pad_id = batch_size, seed, pad_id
        first = examples[0]
        assert all(
            example.of_row.keys() == first.of_row.keys() and example.of_tokens.keys() == first.of_tokens.keys()
            for example in examples
        ), "every example has the same targets"
        self._of_row = {name: _array([example.of_row[name] for example in examples]) for name in first.of_row}
        self._of_tokens = {
            name: _array(np.concatenate([example.of_tokens[name] for example in examples])).dtype
            for name in first.of_tokens
        }
        # A batch of B is no longer than L with probability (part of the examples up to L)^B.
        usual = np.quantile(self._lengths, 0.5 ** (1 / batch_size))
        steps = (-(-int(length) // ROW_STEP) * ROW_STEP for length in (np.ceil(usual), self._lengths.max()))
        self._row_lengths = tuple(min(length, max_length) for length in steps)

    def __len__(self) -> int:
        return len(self._examples)

    def batch(self, step: int, part: Part = ALL) -> Batch:
        """Rows `part` of this step's global batch, in an order of its own in each epoch.

        The row length is that of the global batch, so that all hosts agree on it.
        """
        return self.rows(shuffled(step * self._batch_size + np.arange(self._batch_size), len(self), self._seed), part)

    def fixed(self, part: Part = ALL) -> list[Batch]:
        """All examples in the order of the file; empty rows fill up the last batch."""
        indices = np.append(np.arange(len(self)), np.full(-len(self) % self._batch_size, -1))
        return [self.rows(chosen, part) for chosen in indices.reshape(-1, self._batch_size)]

    def rows(self, indices: np.ndarray, part: Part = ALL) -> Batch:
        """The examples `indices` of a global batch, of which `part` is returned; -1 is an empty row."""
        longest = self._lengths[indices[indices >= 0]].max()
        length = next(length for length in self._row_lengths if length >= longest)
        indices = indices[part]
        shape, real = (len(indices), length), indices >= 0
        batch = {
            "input_ids": np.full(shape, self._pad_id, np.int32),
            "segment_ids": np.zeros(shape, np.int32),
            "positions": np.zeros(shape, np.int32),
            "token_type_ids": np.zeros(shape, np.int32),
            "example_weights": real.astype(np.float32),
        }
        for name, values in self._of_row.items():
            batch[name] = np.zeros((len(indices), *values.shape[1:]), values.dtype)
            batch[name][real] = values[indices[real]]
        batch |= {name: np.zeros(shape, dtype) for name, dtype in self._of_tokens.items()}
        for row, index in enumerate(indices):
            if index >= 0:
                example = self._examples[index]
                size = len(example.ids)
                batch["input_ids"][row, :size] = example.ids
                batch["segment_ids"][row, :size] = 1
                batch["positions"][row, :size] = np.arange(size)
                batch["token_type_ids"][row, :size] = example.types
                for name in self._of_tokens:
                    batch[name][row, :size] = example.of_tokens[name]
        return batch


def _array(values: Sequence[Any] | np.ndarray) -> np.ndarray:
    """int32 of whole numbers, else float32."""
    found = np.asarray(values)
    assert found.dtype.kind in "biuf", f"targets are numbers, as many for each example; found {found.dtype}"
    return found.astype(np.float32 if found.dtype.kind == "f" else np.int32)


def _kept(a: int, b: int, room: int) -> int:
    """How many of a's tokens stay where a and b together have `room`."""
    if a + b <= room:
        return a
    half = room // 2
    return min(a, max(room - b, room - half))
