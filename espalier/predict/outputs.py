"""Many examples through a model: batched by length, in few shapes, results in the order of the examples."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import numpy as np

from espalier.data.examples import Example
from sharding.mesh import BATCH_AXES, constrain

SHORTEST = 16
"""Tokens of a row at least; longer rows have a power of two of them, or half as many more, so that few programs are
compiled."""
TOKENS, ROWS = 4096, 64
"""Of a batch at most; there are always as many rows as the mesh splits."""


class Shapes:
    """The shapes of batches, rows × tokens, that a server keeps to (`fixed_shapes`)."""

    def __init__(self, lengths: Sequence[int], rows: Sequence[int]):
        """lengths, rows: those there are; at least one of each. Of long rows a batch holds TOKENS, or the fewest."""
        self.lengths, self._rows = sorted(set(lengths)), sorted(set(rows))
        self._ready: set[Hashable] = set()

    def all(self) -> list[tuple[int, int]]:
        return [(rows, length) for length in self.lengths for rows in self._rows_of(length)]

    def length(self, tokens: int) -> int | None:
        """The row for an example; None where it is too long for all."""
        return next((length for length in self.lengths if length >= tokens), None)

    def most(self, length: int) -> int:
        return self._rows_of(length)[-1]

    def rows(self, count: int, length: int) -> int:
        return next(rows for rows in self._rows_of(length) if rows >= count)

    def prepare(self, key: Hashable, compile: Callable[[int, int], Any]) -> None:
        """Compile a function for all shapes, if that was not done."""
        if key not in self._ready:
            for rows, length in self.all():
                compile(rows, length)
            self._ready.add(key)

    def _rows_of(self, length: int) -> list[int]:
        return [rows for rows in self._rows if rows * length <= TOKENS] or self._rows[:1]


_shapes: ContextVar[Shapes | None] = ContextVar("shapes", default=None)


@contextlib.contextmanager
def fixed_shapes(shapes: Shapes) -> Iterator[None]:
    """Within the block (and thread) `outputs` compiles a function for all these shapes when it is first asked for, and
    for no others after."""
    token = _shapes.set(shapes)
    try:
        yield
    finally:
        _shapes.reset(token)


def shapes_kept() -> Shapes | None:
    """Those of the `fixed_shapes` around the call."""
    return _shapes.get()


_cut: ContextVar[list[int] | None] = ContextVar("cut", default=None)


@contextlib.contextmanager
def counting_cut() -> Iterator[list[int]]:
    """A list that gets, within the block (and thread), how many tokens each input lost that was too long."""
    lost: list[int] = []
    token = _cut.set(lost)
    try:
        yield lost
    finally:
        _cut.reset(token)


def softmax(scores: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64, on the host: the shapes of results are many."""
    powers = np.exp(scores.astype(np.float64) - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def outputs(
    function: Callable[..., Any],
    settings: tuple[Hashable, ...],
    params: Any,
    examples: Sequence[Example],
    *,
    pad_id: int,
    longest: int | None = None,
    of_row: Sequence[str] = (),
    said: Callable[[int], None] = lambda done: None,
) -> list[Any]:
    """`function(*settings, params, batch)`, a tree of arrays [B, …], on every example: a tree of NumPy arrays each.

    batch: `input_ids`, `segment_ids`, `positions`, `token_type_ids`, int32 [B, T]; of the targets of the examples those
    that `of_row` names, [B, …], 0 in rows without an example. What an array holds at the padding of a row [T] means
    nothing: cut it to the tokens of the example. function: of a module, so that its programs are found again. longest:
    tokens that the model takes at most. said: is told how many examples are done. Under jax.set_mesh rows are split
    over the mesh; every process gives all and gets all.
    """
    lengths = np.array([len(example.ids) for example in examples])
    if (lost := _cut.get()) is not None:
        lost += [example.cut for example in examples if example.cut]
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    shapes = _shapes.get()

    def run(chosen: Sequence[Example], rows: int, length: int) -> Any:
        batch = padded(chosen, rows, length, pad_id)
        for name in of_row:
            like = np.asarray(examples[0].of_row[name])
            batch[name] = np.zeros((rows, *like.shape), like.dtype)
            for row, example in enumerate(chosen):
                batch[name][row] = example.of_row[name]
        return jax.device_get(_compiled(function, settings, params, batch))

    if shapes and examples:
        of_rows = tuple((name, np.asarray(examples[0].of_row[name]).shape) for name in of_row)
        shapes.prepare((function, settings, of_rows), lambda rows, length: run([], rows, length))
    found: list[Any] = [None] * len(examples)
    order, done = np.argsort(-lengths, kind="stable"), 0
    while done < len(order):
        tokens = int(lengths[order[done]])
        if shapes and (fixed := shapes.length(tokens)):
            length = fixed
            chosen = order[done : done + shapes.most(length)]
            rows = shapes.rows(len(chosen), length)
        else:
            length = row_length(tokens, longest)
            most = -(-max(1, min(ROWS, TOKENS // length)) // parts) * parts
            chosen = order[done : done + most]
            rows = _rows(len(chosen), most, parts)
        result = run([examples[index] for index in chosen], rows, length)
        for row, index in enumerate(chosen):
            found[index] = jax.tree.map(lambda array, row=row: array[row], result)
        done += len(chosen)
        said(done)
    return found


def row_length(tokens: int, longest: int | None = None) -> int:
    """The length of the row that so many tokens are put into."""
    step = max(SHORTEST, 1 << max(0, (tokens - 1).bit_length() - 2))
    length = -(-tokens // step) * step
    return length if longest is None else min(length, max(longest, tokens))


def padded(examples: Sequence[Example], rows: int, length: int, pad_id: int) -> dict[str, np.ndarray]:
    """The batch of `outputs`, filled up with empty rows."""
    batch = {name: np.zeros((rows, length), np.int32) for name in ("segment_ids", "positions", "token_type_ids")}
    batch["input_ids"] = np.full((rows, length), pad_id, np.int32)
    for row, example in enumerate(examples):
        size = len(example.ids)
        batch["input_ids"][row, :size] = example.ids
        batch["segment_ids"][row, :size] = 1
        batch["positions"][row, :size] = np.arange(size)
        batch["token_type_ids"][row, :size] = example.types
    return batch


def _rows(count: int, most: int, parts: int) -> int:
    """Rows of a batch of so many examples: `most`, or for few of them the next power of two."""
    return min(most, -(-(1 << (count - 1).bit_length()) // parts) * parts)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compiled(function, settings, params, batch):
    batch = {name: constrain(array, "batch", *(None,) * (array.ndim - 1)) for name, array in batch.items()}
    # Whole on every process, for each reads all rows.
    return jax.tree.map(lambda array: constrain(array, *(None,) * array.ndim), function(*settings, params, batch))
