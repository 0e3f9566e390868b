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
PACKED = 256
"""Tokens of a row of several examples at most, on average: attention costs the square of its length."""
TRIED = 256
"""Batches by which the row lengths are chosen where rows hold several examples."""


class Example(NamedTuple):
    ids: Sequence[int] | np.ndarray
    """Special tokens included."""
    types: Sequence[int] | np.ndarray
    """Which of its texts each token belongs to (0 or 1)."""
    offsets: np.ndarray | None = None
    """int32 [tokens, 2]: the characters begin … end of its text that a token stands for; -1 for special tokens."""
    of_row: Mapping[str, Any] = {}
    """Targets of the example by name, a number or an array of one shape; int32 where all are whole, else float32."""
    of_tokens: Mapping[str, Sequence[Any] | np.ndarray] = {}
    """Targets by name, one for each token."""
    cut: int = 0
    """Tokens of its texts for which there was no room."""


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
        ids, types, places, cut = [first], [0], [(-1, -1)], 0
        for number, (encoding, keep) in enumerate(parts):
            ids += [*encoding.ids[:keep], between]
            types += [number] * (len(ids) - len(types))
            cut += max(len(encoding.ids) - keep, 0)
            places += [*encoding.offsets[:keep], (-1, -1)] if offsets else []
        return Example(ids, types, np.array(places, np.int32) if offsets else None, cut=cut)

    encoded_a = encode(list(texts_a), add_special_tokens=False)
    if texts_b is None:
        return [framed((a, room)) for a in encoded_a]
    return [
        framed((a, keep), (b, room - keep))
        for a, b in zip(encoded_a, encode(list(texts_b), add_special_tokens=False), strict=True)
        for keep in [_kept(len(a.ids), len(b.ids), room)]
    ]


def cut_words(name: str, examples: Sequence[Example], max_length: int, what: str = "examples") -> tuple[str, ...]:
    """A line on those that had more tokens than there is room for, for people; none where nothing was cut."""
    lost = [example.cut for example in examples if example.cut]
    if not lost:
        return ()
    return (
        f"{name}: {len(lost):,} of {len(examples):,} {what} are longer than {max_length} tokens, the longest by "
        f"{max(lost):,}; their ends were cut off",
    )


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
    """Examples in batches whose rows are as long as the batch needs.

    There are two row lengths, so that a jitted step is compiled twice and not for each length: one that is enough for
    about half of the batches, one that holds all. Arrays: `input_ids`, `segment_ids`, `positions`, `token_type_ids`
    int32 [B,T], `row_lengths` int32 [B], `example_weights` float32 [B] (0 where the last evaluation batch has no
    example), and the targets by their names, [B, …] and [B,T], 0 where there is no example or token.

    With examples_per_row E > 1, a row holds E examples, one behind the other, as segments 1 … E that do not see each
    other, and there are no `row_lengths`. The examples of a batch are spread so that its B / E rows are about equally
    long: little of them is padding. What is said of an example then has the shape [B / E, E, …]. together: so many
    that follow one another belong together (2: a pair); they share a row, side by side, and the order of an epoch is
    one of such groups.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        seed: int = 0,
        *,
        pad_id: int,
        max_length: int,
        examples_per_row: int = 1,
        together: int = 1,
    ):
        """batch_size: examples of a batch. max_length: tokens of an example at most."""
        if not examples:
            raise UserError("there are no labelled examples; give a file with some")
        assert batch_size % examples_per_row == 0, f"{batch_size} examples in rows of {examples_per_row}"
        self._examples = examples
        self._lengths = np.array([len(example.ids) for example in examples])
        assert self._lengths.max() <= max_length, f"{self._lengths.max()} tokens in a row of {max_length}"
        assert examples_per_row % together == len(examples) % together == 0, "a group of examples is not whole"
        self._batch_size, self._seed, self._pad_id, self._per_row = batch_size, seed, pad_id, examples_per_row
        self._together = together
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
        if examples_per_row == 1:
            # A batch of B is no longer than L with probability (part of the examples up to L)^B.
            usual, longest = np.quantile(self._lengths, 0.5 ** (1 / batch_size)), self._lengths.max()
        else:
            needed = [self._needed(self._spread(self._chosen(step))) for step in range(self._tried)]
            usual, longest = np.median(needed), max(needed)
        steps = (-(-int(length) // ROW_STEP) * ROW_STEP for length in (np.ceil(usual), longest))
        self._row_lengths = tuple(min(length, max_length * examples_per_row) for length in steps)

    def __len__(self) -> int:
        return len(self._examples)

    @property
    def fill(self) -> float:
        """The part of the places of training batches that holds a token, over the first of them."""
        tokens = places = 0
        for step in range(self._tried):
            rows = self._spread(self._chosen(step))
            tokens += int(self._lengths[rows].sum())
            places += len(rows) * self._row_length(rows)
        return tokens / places

    def batch(self, step: int, part: Part = ALL) -> Batch:
        """Rows `part` of this step's global batch, in an order of its own in each epoch.

        The row length is that of the global batch, so that all hosts agree on it.
        """
        return self.rows(self._chosen(step), part)

    def fixed(self, part: Part = ALL) -> list[Batch]:
        """All examples, batch by batch in the order of the file; empty places fill up the last batch."""
        indices = np.append(np.arange(len(self)), np.full(-len(self) % self._batch_size, -1))
        return [self.rows(chosen, part) for chosen in indices.reshape(-1, self._batch_size)]

    def rows(self, indices: np.ndarray, part: Part = ALL) -> Batch:
        """The examples `indices` of a global batch, of which the rows `part` are returned; -1 is no example."""
        return self._filled(self._spread(indices), part)

    @property
    def _tried(self) -> int:
        """The first batches, of which it is known what they need."""
        return min(TRIED, -(-len(self) // self._batch_size))

    def _chosen(self, step: int) -> np.ndarray:
        """The examples of a batch [B]."""
        size = self._together
        groups = self._batch_size // size
        chosen_G = shuffled(step * groups + np.arange(groups), len(self) // size, self._seed)
        return (chosen_G[:, None] * size + np.arange(size)).reshape(-1)

    def _spread(self, indices: np.ndarray) -> np.ndarray:
        """Examples [B] by rows [B / E, E]: the longest group first, each to the row that has the fewest tokens and
        room."""
        if self._per_row == self._together:
            return indices.reshape(-1, self._per_row)
        groups = indices.reshape(-1, self._together)
        lengths = np.where(groups >= 0, self._lengths[groups], 0).sum(1)
        rows: list[list[int]] = [[] for _ in range(len(indices) // self._per_row)]
        tokens = np.zeros(len(rows))
        for place in np.argsort(-lengths, kind="stable"):
            row = int(tokens.argmin())
            rows[row] += groups[place].tolist()
            tokens[row] += lengths[place] if len(rows[row]) < self._per_row else np.inf
        return np.array(rows)

    def _needed(self, rows: np.ndarray) -> int:
        """Tokens of the longest row."""
        return int(np.where(rows >= 0, self._lengths[rows], 0).sum(1).max())

    def _row_length(self, rows: np.ndarray) -> int:
        needed = self._needed(rows)
        # Of packed rows, some batch of a later epoch may need more than any of those that were tried.
        beyond = -(-needed // (4 * ROW_STEP)) * 4 * ROW_STEP
        return next((length for length in self._row_lengths if length >= needed), beyond)

    def _filled(self, rows: np.ndarray, part: Part) -> Batch:
        """rows: examples [B / E, E], -1 for none."""
        length = self._row_length(rows)
        rows = rows[part]
        shape = (len(rows), length)
        indices = rows if self._per_row > 1 else rows[:, 0]
        real = indices >= 0
        batch = {
            "input_ids": np.full(shape, self._pad_id, np.int32),
            "segment_ids": np.zeros(shape, np.int32),
            "positions": np.zeros(shape, np.int32),
            "token_type_ids": np.zeros(shape, np.int32),
            "example_weights": real.astype(np.float32),
        }
        if self._per_row == 1:
            # Promises attention that a row is one document.
            batch["row_lengths"] = np.where(real, self._lengths[indices], 0).astype(np.int32)
        for name, values in self._of_row.items():
            batch[name] = np.zeros((*indices.shape, *values.shape[1:]), values.dtype)
            batch[name][real] = values[indices[real]]
        batch |= {name: np.zeros(shape, dtype) for name, dtype in self._of_tokens.items()}
        for row, chosen in enumerate(rows):
            begin = 0
            for number, index in enumerate(chosen, 1):
                if index < 0:
                    continue
                example = self._examples[index]
                end = begin + len(example.ids)
                batch["input_ids"][row, begin:end] = example.ids
                batch["segment_ids"][row, begin:end] = number
                batch["positions"][row, begin:end] = np.arange(end - begin)
                batch["token_type_ids"][row, begin:end] = example.types
                for name in self._of_tokens:
                    batch[name][row, begin:end] = example.of_tokens[name]
                begin = end
        return batch


def fitting_row(lengths: Sequence[int] | np.ndarray, batch_size: int, parts: int) -> int:
    """How many examples a row holds, so that it is neither short nor long for a device: a power of two up to 8.

    lengths: tokens of the examples. parts: into how many a batch is cut, by devices and micro-batches.
    """
    found = 1
    for count in (2, 4, 8):
        if batch_size % (count * parts) == 0 and count * np.mean(lengths) <= PACKED:
            found = count
    return found


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
