"""Which tokens go into which row: a plan made once from document lengths, rows of any size, no token copied.

Two ways: whole documents, best fit, for masked LM (Ding et al. 2024, "Fewer truncations improve language modeling"),
and one stream cut into equal rows for causal LM.
"""

from __future__ import annotations

import bisect
from typing import NamedTuple

import numpy as np

BEGINS, ENDS = 1, 2
"""Bits of `Plan.flags`."""


class Plan(NamedTuple):
    """Rows made of pieces of documents; piece i is tokens starts[i] … starts[i] + lengths[i] of the store."""

    starts: np.ndarray
    """int64 [pieces]"""
    lengths: np.ndarray
    """int32 [pieces]: tokens taken from the store."""
    slots: np.ndarray
    """int32 [pieces]: places taken in the row, special tokens included."""
    flags: np.ndarray
    """uint8 [pieces]: BEGINS = [CLS] or bos stands before it; ENDS = [SEP] stands after, or eos is its last label."""
    row_offsets: np.ndarray
    """int64 [rows + 1]: pieces row_offsets[r] … row_offsets[r + 1] make up row r."""

    @property
    def rows(self) -> int:
        return len(self.row_offsets) - 1


def pack_best_fit(offsets: np.ndarray, sequence_length: int) -> Plan:
    """Masked LM: documents in pieces of at most T-2 tokens, each between [CLS] and [SEP], best fit decreasing.

    offsets: int64 [documents + 1], in tokens. Rows are numbered by the first piece in them, and pieces lie in the
    order of the text, so that the first rows hold the first documents.
    """
    room = sequence_length - 2
    lengths_D = np.diff(offsets)
    pieces_D = -(-lengths_D // room)
    document_P = np.repeat(np.arange(len(lengths_D)), pieces_D)
    number_P = np.arange(len(document_P)) - np.repeat(np.cumsum(pieces_D) - pieces_D, pieces_D)
    starts_P = offsets[document_P] + number_P * room
    lengths_P = np.minimum(room, offsets[document_P + 1] - starts_P)
    order_P, row_offsets = best_fit_rows(lengths_P + 2, sequence_length)
    return Plan(
        starts=starts_P[order_P],
        lengths=lengths_P[order_P].astype(np.int32),
        slots=lengths_P[order_P].astype(np.int32) + 2,
        flags=np.full(len(order_P), BEGINS | ENDS, np.uint8),
        row_offsets=row_offsets,
    )


def pack_split(offsets: np.ndarray, sequence_length: int) -> Plan:
    """Causal LM: bos and tokens of every document in one stream, cut every T places; only the last row has room left.

    A place's label is the next token of its document, or eos after the last: eos is predicted and never read, and a cut
    loses no label, because the next token can be looked up in the store.
    """
    offsets = np.concatenate([offsets[:1], offsets[1:][np.diff(offsets) > 0]])
    documents = len(offsets) - 1
    # In the stream, document d begins at offsets[d] + d, for each document before it had a bos.
    begins_D = offsets + np.arange(documents + 1) - offsets[0]
    cuts = np.arange(0, begins_D[-1], sequence_length, dtype=np.int64)
    edges = np.union1d(begins_D, cuts)
    at_P, end_P = edges[:-1], edges[1:]
    document_P = np.searchsorted(begins_D, at_P, side="right") - 1
    first_P = at_P == begins_D[document_P]
    starts_P = offsets[document_P] + at_P - begins_D[document_P] - ~first_P
    slots_P = end_P - at_P
    last_P = end_P == begins_D[document_P + 1]
    return Plan(
        starts=starts_P,
        lengths=(slots_P - first_P).astype(np.int32),
        slots=slots_P.astype(np.int32),
        flags=(first_P * BEGINS + last_P * ENDS).astype(np.uint8),
        row_offsets=np.append(np.searchsorted(at_P, cuts), len(at_P)).astype(np.int64),
    )


def best_fit_rows(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Pieces of these sizes in rows with room for `capacity`, best fit decreasing: (order, row_offsets), int64.

    Row r holds the pieces order[row_offsets[r] : row_offsets[r + 1]], in their order; rows are numbered by their first
    piece.
    """
    _, first_R, row_P = np.unique(_best_fit(sizes, capacity), return_index=True, return_inverse=True)
    row_P = np.argsort(np.argsort(first_R))[row_P]
    counts_R = np.bincount(row_P, minlength=len(first_R))
    return np.argsort(row_P, kind="stable"), np.concatenate([[0], np.cumsum(counts_R)]).astype(np.int64)


def fill(plan: Plan, sequence_length: int) -> float:
    """The part of all places that holds a token."""
    return float(plan.slots.sum(dtype=np.int64) / max(plan.rows * sequence_length, 1))


def _best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Row of each piece: largest first, each into the fullest row with room for it, else into a new row.

    Pieces of one size go together: a row with room c ≥ size is the best until it cannot take another, so it takes
    c // size of them at once. That is one numpy operation for each pair of a size and a room, not one step a piece.
    """
    row_of = np.empty(len(sizes), np.int64)
    order = np.argsort(-sizes, kind="stable")
    rows_with: dict[int, np.ndarray] = {}
    rooms: list[int] = []
    rows = 0

    def put(room: int, members: np.ndarray) -> None:
        if room and len(members):
            if room not in rows_with:
                bisect.insort(rooms, room)
                rows_with[room] = members
            else:
                rows_with[room] = np.concatenate([rows_with[room], members])

    for size, count in zip(*(part[::-1].tolist() for part in np.unique(sizes, return_counts=True)), strict=True):
        todo, order = order[:count], order[count:]
        while len(todo):
            at = bisect.bisect_left(rooms, size)
            if at < len(rooms):
                room = rooms.pop(at)
                members = rows_with.pop(room)
            else:
                room = capacity
                members = np.arange(rows, rows - (-len(todo) // (capacity // size)))
                rows += len(members)
            each = room // size
            used = members[: -(-len(todo) // each)]
            taken = np.repeat(used, each)[: len(todo)]
            row_of[todo[: len(taken)]] = taken
            last = len(taken) - each * (len(used) - 1)
            put(room, members[len(used) :])
            put(room - each * size, used[:-1])
            put(room - last * size, used[-1:])
            todo = todo[len(taken) :]
    return row_of
