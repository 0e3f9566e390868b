"""Weighted examples, several in a row, for causal models: prompts and answers, where only the answers count.

Rows are those of data.loader (no example sees another), and `Batches` makes batches of them: a pure function of seed
and step, shuffled anew in each epoch, of one source or of a mixture.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from espalier.data.examples import Example
from espalier.data.loader import Batch, ranges
from espalier.data.packing import best_fit_rows
from espalier.errors import UserError


class ExampleRows:
    """Rows of whole examples, best fit (Ding et al. 2024); each takes one place less than it has tokens.

    A place's label is the next token of its example: the first token is never predicted, the last one never read.
    """

    def __init__(
        self, examples: Sequence[Example], sequence_length: int, *, pad_id: int, token_bytes: np.ndarray | None = None
    ):
        """examples: of at least two tokens. Their targets, both optional:

        of_tokens["loss_weights"]: how much the prediction of this token counts (0 in a prompt, 1 in an answer, say).
        of_row["weight"]: how much the example counts, by which those of its tokens are multiplied.
        token_bytes: int32 [V] (data.token_tables.token_bytes), for `label_bytes`; without it they are left out.
        UserError where an example is too long: only the caller knows where it may be cut.
        """
        if not examples:
            raise UserError("there are no examples; give a file with some")
        sizes_N = np.array([len(example.ids) for example in examples])
        assert sizes_N.min() > 1, "an example of one token has nothing to predict"
        if sizes_N.max() > sequence_length + 1:
            raise UserError(
                f"example {sizes_N.argmax() + 1} has {sizes_N.max():,} tokens, and a row has room for "
                f"{sequence_length + 1:,}; shorten it, or make the rows longer"
            )
        self._length, self._pad_id, self._token_bytes = sequence_length, pad_id, token_bytes
        self._ids: np.ndarray = np.concatenate([np.asarray(example.ids, np.int32) for example in examples])
        weights = [
            np.broadcast_to(example.of_tokens.get("loss_weights", 1.0), len(example.ids))
            * np.float32(example.of_row.get("weight", 1.0))
            for example in examples
        ]
        self._weights: np.ndarray = np.concatenate(weights).astype(np.float32)
        order, self._row_offsets = best_fit_rows(sizes_N - 1, sequence_length)
        self._order = order
        self._begins, self._slots = (np.cumsum(sizes_N) - sizes_N)[order], (sizes_N - 1)[order]

    def __len__(self) -> int:
        return len(self._row_offsets) - 1

    @property
    def fill(self) -> float:
        """The part of all places that holds a token."""
        return float(self._slots.sum() / (len(self) * self._length))

    def documents(self, indices: np.ndarray) -> np.ndarray:
        """The numbers of the examples in these rows."""
        return np.concatenate([self._order[self._row_offsets[row] : self._row_offsets[row + 1]] for row in indices])

    def rows(self, indices: np.ndarray) -> Batch:
        """Arrays [B,T] of the rows `indices`; row -1 is empty (padding only).

        `input_ids`, `segment_ids` (1, 2, … by example, 0 = padding), `positions`, `labels`, all int32; `loss_weights`,
        float32: those of the labels; `label_bytes`, int32.
        """
        indices, T = np.asarray(indices, np.int64), self._length
        first_B = self._row_offsets[indices]
        count_B = np.where(indices >= 0, self._row_offsets[indices + 1] - first_B, 0)
        number_P = ranges(count_B)
        example_P = np.repeat(first_B, count_B) + number_P
        slots_P = self._slots[example_P]
        position_S = ranges(slots_P)
        row_S = np.repeat(np.repeat(np.arange(len(indices)), count_B), slots_P)
        # Rows are filled from the left; the number of places in earlier rows is subtracted.
        before_B = np.cumsum(np.bincount(row_S, minlength=len(indices))) - np.bincount(row_S, minlength=len(indices))
        place_S = row_S * T + np.arange(len(row_S)) - before_B[row_S]
        source_S = np.repeat(self._begins[example_P], slots_P) + position_S

        found = {
            "input_ids": self._ids[source_S],
            "segment_ids": np.repeat(number_P + 1, slots_P).astype(np.int32),
            "positions": position_S.astype(np.int32),
            "labels": self._ids[source_S + 1],
            "loss_weights": self._weights[source_S + 1],
        }
        if self._token_bytes is not None:
            found["label_bytes"] = self._token_bytes[found["labels"]]
        batch: Batch = {}
        for name, values_S in found.items():
            batch[name] = np.full((len(indices), T), self._pad_id if name == "input_ids" else 0, values_S.dtype)
            batch[name].reshape(-1)[place_S] = values_S
        return batch
