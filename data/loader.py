"""`batch(step)`: a pure function of seed and step, so that a resumed run sees exactly the rows it would have seen.

No state, no shuffle buffer: an epoch's order is a permutation that is computed where it is needed.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Literal, Protocol

import numpy as np

from cli import UserError
from data.packing import BEGINS, ENDS, Plan
from data.tokenizer import SpecialIds

Batch = dict[str, np.ndarray]
ROUNDS = 8


class Store(Protocol):
    """Tokens of all documents, one after the other (data.store.TokenStore)."""

    @property
    def offsets(self) -> np.ndarray: ...

    def take(self, index: np.ndarray) -> np.ndarray:
        """int32 tokens at these places of the stream."""
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


def epoch_order(step: int, batch_size: int, n: int, seed: int) -> np.ndarray:
    """int64 [B]: which of n examples make up the batch of this step, each once in an epoch, in a new order in each."""
    epoch_B, index_B = np.divmod(step * batch_size + np.arange(batch_size), n)
    return permute(index_B, n, _mix(np.uint64(seed), epoch_B.astype(np.uint64)))


class Rows:
    """Rows of token ids as a plan describes them."""

    def __init__(
        self,
        store: Store,
        plan: Plan,
        sequence_length: int,
        specials: SpecialIds,
        kind: Literal["masked_lm", "causal_lm"],
        token_bytes: np.ndarray | None = None,
    ):
        """token_bytes: int32 [V] (data.token_tables.token_bytes), for the `label_bytes` of kind "causal_lm"."""
        if not plan.rows:
            raise UserError("the text makes no row of tokens: it is empty or too short to hold a part out; add text")
        self._take, self._last = store.take, int(store.offsets[-1]) - 1
        self._plan, self._length, self._specials = plan, sequence_length, specials
        self._causal, self._token_bytes = kind == "causal_lm", token_bytes

    def __len__(self) -> int:
        return self._plan.rows

    def rows(self, indices: np.ndarray) -> Batch:
        """Arrays [B,T] of the rows `indices`; row -1 is empty (padding only).

        Both kinds: `input_ids`, `segment_ids` (1, 2, … by document, 0 = padding), `positions`, all int32. Causal LM
        adds `labels`, `loss_weights` (float32) and `label_bytes`; every place but padding has a label.
        """
        plan, T = self._plan, self._length
        indices = np.asarray(indices, np.int64)
        shape = (len(indices), T)
        first_B = plan.row_offsets[indices]
        count_B = np.where(indices >= 0, plan.row_offsets[indices + 1] - first_B, 0)
        number_P = _ranges(count_B)
        piece_P = np.repeat(first_B, count_B) + number_P

        slots_P = plan.slots[piece_P].astype(np.int64)
        before_P = np.cumsum(slots_P) - slots_P
        row_P = np.repeat(np.arange(len(indices)), count_B)
        # Places before the row's own first piece, to be taken off the running sum.
        base_P = np.repeat(before_P[np.flatnonzero(number_P == 0)], count_B[count_B > 0])
        position_S = _ranges(slots_P)
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
        if self._causal:
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
        batch["input_ids"].reshape(-1)[place_S] = input_S
        return batch

    def _gather(self, source_S: np.ndarray) -> np.ndarray:
        """Tokens at these places of the store; places one off its ends are overwritten by the caller."""
        return self._take(np.clip(source_S, 0, self._last))


class Batches:
    """Rows in batches: shuffled anew in each epoch for training, in their own order for evaluation."""

    def __init__(self, rows: Rows, batch_size: int, seed: int = 0):
        self._rows, self._batch_size, self._seed = rows, batch_size, seed

    def batch(self, step: int, part: slice = slice(None)) -> Batch:
        """Rows `part` of the global batch of this step. Epochs follow each other without a gap."""
        return self._rows.rows(epoch_order(step, self._batch_size, len(self._rows), self._seed)[part])

    def fixed(self, max_rows: int, part: slice = slice(None)) -> list[Batch]:
        """Evaluation batches: at most max_rows rows, evenly spaced over all; empty ones fill the last batch."""
        total = min(max_rows, len(self._rows))
        chosen = np.arange(total, dtype=np.int64) * len(self._rows) // max(total, 1)
        filled = np.append(chosen, np.full(-total % self._batch_size, -1))
        return [self._rows.rows(indices[part]) for indices in filled.reshape(-1, self._batch_size)]


class prefetch:
    """Iterator over batch_fn(start), batch_fn(start + 1), … that a thread prepares `depth` ahead (0 = no thread).

    What batch_fn raises is raised by `next`, once the batches before it are taken. `close` ends the thread.
    """

    def __init__(self, batch_fn: Callable[[int], Batch], start: int, depth: int):
        self._batch_fn, self._step = batch_fn, start
        self._closed = threading.Event()
        self._queue: queue.Queue[tuple[Batch | None, BaseException | None]] = queue.Queue(depth)
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True) if depth > 0 else None
        if self._thread:
            self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._closed.is_set():
            raise StopIteration
        if not self._thread:
            self._step += 1
            return self._batch_fn(self._step - 1)
        batch, error = self._queue.get()
        if batch is None:
            self.close()
            assert error is not None
            raise error
        return batch

    def close(self) -> None:
        self._closed.set()
        while self._thread and self._thread.is_alive():
            # The thread may be waiting for a free place.
            while not self._queue.empty():
                self._queue.get_nowait()
            self._thread.join(0.05)

    def _work(self) -> None:
        while not self._closed.is_set():
            try:
                item = (self._batch_fn(self._step), None)
            except BaseException as error:  # whatever it is, it belongs to whoever waits for the batch
                item = (None, error)
            self._queue.put(item)
            if item[1] is not None:
                return
            self._step += 1


def _ranges(counts: np.ndarray) -> np.ndarray:
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
