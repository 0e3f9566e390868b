"""`batch(step)`: a pure function of seed and step, so that a resumed run sees exactly the rows it would have seen.

No state, no shuffle buffer: an epoch's order is a permutation that is computed where it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from espalier.contracts import BatchStream
from espalier.data.packing import BEGINS, ENDS, Plan, fill
from espalier.data.tokenizer import SpecialIds
from espalier.errors import UserError

Batch = dict[str, np.ndarray]
Part = slice | np.ndarray
"""Rows of a batch: a slice of them or their numbers."""
ALL = slice(None)
ROUNDS = 8


class Store(Protocol):
    """Tokens of all documents, one after the other (data.store.TokenStore)."""

    @property
    def offsets(self) -> np.ndarray: ...

    def take(self, index: np.ndarray) -> np.ndarray:
        """int32 tokens at these places of the stream."""
        ...

    def word_starts(self, index: np.ndarray) -> np.ndarray:
        """bool: whether these tokens begin a word; asked only of a store that knows."""
        ...


def permute(index: np.ndarray | int, n: int, seed: np.ndarray | int) -> np.ndarray:
    """Where a pseudo-random permutation of 0 … n-1 takes `index`: O(1) memory, any n; seed broadcasts against index.

    A Feistel network (Luby and Rackoff 1988) on the next greater even number of bits, applied again while the result
    is not below n (cycle walking; Black and Rogaway 2002).
    """
    index, seed = np.broadcast_arrays(np.asarray(index, np.uint64), np.asarray(seed).astype(np.uint64))
    assert n > 0 and (index < n).all()
    half = np.uint64(max(((n - 1).bit_length() + 1) // 2, 1))
    value = index.copy()
    outside = np.ones(index.shape, bool)
    while outside.any():
        value[outside] = _feistel(value[outside], seed[outside], half)
        outside = value >= n
    return value.astype(np.int64)


def shuffled(index: np.ndarray, n: int, seed: int) -> np.ndarray:
    """int64: which of n examples comes `index`-th: each once per epoch, in a new order each epoch. O(1) at any step."""
    epoch, within = np.divmod(index, n)
    return permute(within, n, _mix(np.uint64(seed), epoch.astype(np.uint64)))


class Rows:
    """Rows of token ids as a plan describes them."""

    def __init__(
        self,
        store: Store,
        plan: Plan,
        sequence_length: int,
        specials: SpecialIds,
        layout: Literal["framed", "shifted"],
        token_bytes: np.ndarray | None = None,
        word_starts: bool = False,
    ):
        """layout: "framed" = each document between [CLS] and [SEP], without labels (masked LM); "shifted" = bos before
        each document, and the next token as the label (causal LM).
        token_bytes: int32 [V] (data.token_tables.token_bytes), for the `label_bytes` of shifted rows.
        word_starts: framed rows have `word_starts` too; the store must know them.
        """
        if not plan.rows:
            label = getattr(store, "label", "the text")
            raise UserError(f"{label} makes no row of tokens: it is empty or too short to hold a part out; add text")
        self._take, self._last, self._offsets = store.take, int(store.offsets[-1]) - 1, store.offsets
        self._word_starts = store.word_starts if word_starts else None
        self._plan, self._length, self._specials = plan, sequence_length, specials
        self._shifted, self._token_bytes = layout == "shifted", token_bytes

    def __len__(self) -> int:
        return self._plan.rows

    @property
    def fill(self) -> float:
        """The fraction of positions that hold a token."""
        return fill(self._plan, self._length)

    def rows(self, indices: np.ndarray) -> Batch:
        """Arrays [B,T] of the rows `indices`; row -1 is empty (padding only).

        Always `input_ids`, `segment_ids` (1, 2, … by document, 0 = padding), `positions`, all int32. Framed rows may
        have `word_starts` (bool): whether a token begins a word; special tokens and padding do. Shifted rows add
        `labels`, `loss_weights` (float32) and `label_bytes`; every place but padding has a label.
        """
        plan, T = self._plan, self._length
        indices = np.asarray(indices, np.int64)
        shape = (len(indices), T)
        first_B = plan.row_offsets[indices]
        count_B = np.where(indices >= 0, plan.row_offsets[indices + 1] - first_B, 0)
        number_P = ranges(count_B)
        piece_P = np.repeat(first_B, count_B) + number_P

        slots_P = plan.slots[piece_P].astype(np.int64)
        before_P = np.cumsum(slots_P) - slots_P
        row_P = np.repeat(np.arange(len(indices)), count_B)
        # Places before the row's own first piece, to be taken off the running sum.
        base_P = np.repeat(before_P[np.flatnonzero(number_P == 0)], count_B[count_B > 0])
        position_S = ranges(slots_P)
        place_S = np.repeat(row_P * T + before_P - base_P, slots_P) + position_S

        begins_P = plan.flags[piece_P] & BEGINS > 0
        ends_P = plan.flags[piece_P] & ENDS > 0
        source_S = np.repeat(plan.starts[piece_P] - begins_P, slots_P) + position_S
        first_S, last_S = np.cumsum(slots_P) - slots_P, np.cumsum(slots_P) - 1
        opening, closing = first_S[begins_P], last_S[ends_P]

        batch: Batch = {
            "input_ids": np.full(shape, self._specials.pad, np.int32),
            "segment_ids": np.zeros(shape, np.int32),
            "positions": np.zeros(shape, np.int32),
        }
        batch["segment_ids"].reshape(-1)[place_S] = np.repeat(number_P + 1, slots_P)
        batch["positions"].reshape(-1)[place_S] = position_S
        if self._shifted:
            assert self._token_bytes is not None
            # One look-up serves both: inputs are the tokens from the place before, labels those of the place after.
            input_S = self._gather(source_S)
            label_S = self._gather(source_S + 1)
            input_S[opening], label_S[closing] = self._specials.bos, self._specials.eos
            batch["labels"] = np.zeros(shape, np.int32)
            batch["loss_weights"] = np.zeros(shape, np.float32)
            batch["label_bytes"] = np.zeros(shape, np.int32)
            batch["labels"].reshape(-1)[place_S] = label_S
            batch["loss_weights"].reshape(-1)[place_S] = 1.0
            batch["label_bytes"].reshape(-1)[place_S] = self._token_bytes[label_S]
        else:
            input_S = self._gather(source_S)
            input_S[opening], input_S[closing] = self._specials.cls, self._specials.sep
            if self._word_starts:
                starts_S = self._word_starts(np.clip(source_S, 0, self._last))
                starts_S[opening] = starts_S[closing] = True
                batch["word_starts"] = np.ones(shape, bool)
                batch["word_starts"].reshape(-1)[place_S] = starts_S
        batch["input_ids"].reshape(-1)[place_S] = input_S
        return batch

    def documents(self, indices: np.ndarray) -> np.ndarray:
        """int64: the documents that the pieces of these rows are of, piece by piece."""
        plan = self._plan
        first_B = plan.row_offsets[indices]
        count_B = plan.row_offsets[np.asarray(indices) + 1] - first_B
        starts_P = plan.starts[np.repeat(first_B, count_B) + ranges(count_B)]
        return np.searchsorted(self._offsets, starts_P, side="right") - 1

    def _gather(self, source_S: np.ndarray) -> np.ndarray:
        """Tokens at these places of the store; places one off its ends are overwritten by the caller."""
        return self._take(np.clip(source_S, 0, self._last))


class RowSource(Protocol):
    """Rows of one source: `Rows` of a token store, or those of data.packed_examples."""

    def __len__(self) -> int: ...

    @property
    def fill(self) -> float:
        """The part of all places that holds a token."""
        ...

    def rows(self, indices: np.ndarray) -> Batch:
        """Arrays [B, …] of the rows `indices`; row -1 is empty."""
        ...

    def documents(self, indices: np.ndarray) -> np.ndarray:
        """The numbers of the documents, or examples, in these rows."""
        ...


class Batches:
    """Rows of one source or several in batches: shuffled anew in each epoch for training, in order for evaluation."""

    def __init__(
        self, rows: Mapping[str, RowSource], batch_size: int, seed: int = 0, weights: Mapping[str, float] | None = None
    ):
        """weights: each source's share of the rows, summing to 1; None = every row of all sources once an epoch."""
        self._names, self._rows = list(rows), list(rows.values())
        self._batch_size, self._seed = batch_size, seed
        self._mixture = Mixture([weights[name] for name in self._names]) if weights else None
        self._begins = np.cumsum([0, *map(len, self._rows)])

    def batch(self, step: int, part: Part = ALL) -> Batch:
        """Rows `part` of the global batch of this step; only those are read. Epochs follow each other without a gap."""
        return self._gather(*self._drawn(step, part))

    def documents(self, step: int) -> list[str]:
        """The documents of which a part is in the global batch of this step, by source and number: "books:17".

        Numbers count the documents that are learnt from, in the order in which they were read, from 0.
        """
        source_B, chosen_B = self._drawn(step, ALL)
        named = []
        for number, rows in enumerate(self._rows):
            for document in np.unique(rows.documents(chosen_B[source_B == number])):
                named.append(f"{self._names[number]}:{document}")
        return named

    def _drawn(self, step: int, part: Part) -> tuple[np.ndarray, np.ndarray]:
        """Source of each row of a batch, and its number in that source."""
        index_B = step * self._batch_size + np.arange(self._batch_size)[part]
        if self._mixture is None:
            return self._place(shuffled(index_B, int(self._begins[-1]), self._seed))
        source_B, number_B = self._mixture.at(index_B)
        chosen_B = np.empty(len(index_B), np.int64)
        for number, rows in enumerate(self._rows):
            mine = source_B == number
            # Each source is shuffled separately, the first one as if it were alone.
            seed = self._seed if number == 0 else int(_mix(np.uint64(self._seed), np.array(number, np.uint64)))
            chosen_B[mine] = shuffled(number_B[mine], len(rows), seed)
        return source_B, chosen_B

    def fixed(self, max_rows: int, part: Part = ALL) -> list[Batch]:
        """Evaluation batches: at most max_rows rows, of each source its share of them, evenly spaced over all it has.

        Empty rows fill the last batch.
        """
        sizes = np.diff(self._begins)
        if self._mixture is None:
            every = int(self._begins[-1])
            total = min(max_rows, every)
            source, _ = self._place(np.arange(total) * every // total)
        else:
            # Where a source has too few for its share, the others are shortened with it.
            total = int(min(max_rows, *(sizes / self._mixture.shares + 1e-9)))
            source, _ = self._mixture.at(np.arange(total))
        counts = np.bincount(source, minlength=len(sizes))
        counts = np.minimum(np.maximum(counts, 1), sizes)
        source = np.repeat(np.arange(len(sizes)), counts)
        chosen = ranges(counts) * sizes[source] // counts[source]
        empty = -len(chosen) % self._batch_size
        source, chosen = np.append(source, np.zeros(empty, int)), np.append(chosen, np.full(empty, -1))
        shape = (-1, self._batch_size)
        return [
            self._gather(a[part], b[part]) for a, b in zip(source.reshape(shape), chosen.reshape(shape), strict=True)
        ]

    def epochs(self, steps: int) -> dict[str, dict[str, float]]:
        """What `steps` steps read of each source: its share of the rows, and how often it is gone through.

        Also how many rows it has, and which part of their places holds a token (`fill`). Without weights, in the middle
        of an epoch, all sources count as gone through equally far, which is so but for chance.
        """
        rows = steps * self._batch_size
        taken = self._mixture.taken(rows) if self._mixture else np.diff(self._begins) * (rows / int(self._begins[-1]))
        return {
            name: {
                "share": float(count / max(sum(taken), 1)),
                "epochs": float(count / len(rows)),
                "rows": len(rows),
                "fill": rows.fill,
            }
            for name, rows, count in zip(self._names, self._rows, taken, strict=True)
        }

    def _place(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source of each of all rows, one source after the other, and its number in that source."""
        source = np.searchsorted(self._begins, index, side="right") - 1
        return source, index - self._begins[source]

    def _gather(self, source_B: np.ndarray, chosen_B: np.ndarray) -> Batch:
        if len(self._rows) == 1:
            return self._rows[0].rows(chosen_B)
        batch: Batch = {}
        for number, rows in enumerate(self._rows):
            mine = source_B == number
            for name, values in rows.rows(chosen_B[mine]).items():
                batch.setdefault(name, np.empty((len(source_B), *values.shape[1:]), values.dtype))[mine] = values
        return batch


class Mixture:
    """Which source each row comes from, so that any number of first rows holds each source's share to within a row.

    The rows repeat a pattern of PERIOD, so that any position is computed without counting from the start.
    """

    PERIOD = 10_000

    def __init__(self, weights: Sequence[float]):
        """weights: positive; of one source alone, any. Each source has at least one row of the pattern."""
        assert 0 < len(weights) <= self.PERIOD
        exact = np.array(weights, float) / sum(weights) * self.PERIOD
        counts = np.maximum(exact.astype(np.int64), 1)
        # The rows that rounding left go to those that lost most by it; a row too many is taken where there are others.
        while counts.sum() != self.PERIOD:
            change = 1 if counts.sum() < self.PERIOD else -1
            lost = np.where((change > 0) | (counts > 1), change * (exact - counts), -np.inf)
            counts[np.argmax(lost)] += change
        self._counts_S: np.ndarray = counts
        # Row k of a source with c rows stands at (k + 1/2) / c of the pattern (Sainte-Laguë's order).
        source_P = np.repeat(np.arange(len(counts)), counts)
        number_P = ranges(counts)
        order_P = np.argsort((number_P + 0.5) / counts[source_P], kind="stable")
        self._source_P, self._number_P = source_P[order_P], number_P[order_P]

    @property
    def shares(self) -> np.ndarray:
        return self._counts_S / self.PERIOD

    def at(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source of each row `index`, and how many rows of that source come before it."""
        period, place = np.divmod(index, self.PERIOD)
        source = self._source_P[place]
        return source, period * self._counts_S[source] + self._number_P[place]

    def taken(self, rows: int) -> list[int]:
        """How many of the first rows come from each source."""
        periods, rest = divmod(rows, self.PERIOD)
        part = np.bincount(self._source_P[:rest], minlength=len(self._counts_S))
        return (periods * self._counts_S + part).tolist()


class _Steps:
    """batch_fn as an endless sequence, the form of source that Grain takes."""

    def __init__(self, batch_fn: Callable[[int], Batch]):
        self._batch_fn = batch_fn

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, index: int) -> Batch:
        return self._batch_fn(index)


def prefetch(batch_fn: Callable[[int], Batch], start: int, depth: int, workers: int = 1) -> BatchStream:
    """Iterator over batch_fn(start), batch_fn(start + 1), … that `workers` threads prepare `depth` ahead (0 = none).

    Threads of Grain's MapDataset, which asks for batches by their number: their order and content do not depend on how
    many there are. What batch_fn raises is raised by `next`, once the batches before it are taken. `close` ends them.
    """
    from absl import logging

    # Where the terminal is not ours (a notebook), Grain would say at its start what it cannot profile on older JAX.
    logging.get_absl_logger().addFilter(_not_of_profiling)
    import grain

    options = grain.ReadOptions(num_threads=workers if depth else 0, prefetch_buffer_size=depth)
    batches = iter(grain.MapDataset.source(_Steps(batch_fn))[start:].to_iter_dataset(options))
    if depth:
        # The first ones while the step is compiled.
        batches.start_prefetch()
    return batches


def _not_of_profiling(record: Any) -> bool:
    return "worker profiling requires" not in record.getMessage()


def ranges(counts: np.ndarray) -> np.ndarray:
    """0 … counts[0]-1, 0 … counts[1]-1, …"""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _mix(a: np.ndarray | np.uint64, b: np.ndarray) -> np.ndarray:
    """A 64-bit hash of two numbers (the finaliser of SplitMix64; Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        z = a * np.uint64(0x9E3779B97F4A7C15) + b + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def _feistel(value: np.ndarray, seed: np.ndarray, half: np.uint64) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = value >> half, value & mask
    for number in range(ROUNDS):
        left, right = right, left ^ (_mix(seed + np.uint64(number), right) & mask)
    return left << half | right
