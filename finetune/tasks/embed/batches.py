"""Batches of pairs: a row has the texts of one example, a query with its positive and hard negatives, or two texts.

Rows of tokens have two lengths, as those of data.examples.LabelledBatches, so that a step is compiled twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from espalier.data.examples import ROW_STEP, Example
from espalier.data.loader import ALL, Batch, Part, shuffled
from finetune.tasks.embed.examples import Pairs

LIKE = 1.5
"""Where documents are no more than so many times as long as queries, or queries as documents, both have one length."""


class PairBatches:
    """Examples in batches.

    Arrays of a batch: `texts`, or apart `queries` and `documents` where their lengths differ much, each with
    `input_ids`, `segment_ids`, `positions`, `token_type_ids`, int32 [B,S,T]; S counts the texts of an example: the
    query or first text, the positive or second text, hard negatives. A text that is not there is all padding.

    `text_ids` int32 [B,S]    equal texts have equal numbers; -1 where there is none
    `known` int32 [B,P]       texts that belong to the query, -1 behind them; pairs with scores have none
    `scores` float32 [B]      of pairs with scores
    `example_weights` float32 [B]   0 for rows that fill up the last evaluation batch
    """

    def __init__(
        self,
        pairs: Pairs,
        encoded: Sequence[Example],
        batch_size: int,
        seed: int = 0,
        *,
        hard_negatives: int,
        pad_id: int,
        max_length: int,
        scale: tuple[float, float] = (0.0, 1.0),
    ):
        """encoded: of each text of `pairs`. scale: scores between these become those between 0 and 1."""
        self._pairs, self._encoded, self._batch_size, self._seed, self._pad_id = (
            pairs,
            encoded,
            batch_size,
            seed,
            pad_id,
        )
        self._lengths = np.array([len(example.ids) for example in encoded] + [0])
        most = max(map(len, pairs.negatives.values()), default=0)
        self._hard = min(hard_negatives, most)
        self._known = max(map(len, pairs.known.values()), default=0)
        low, high = scale
        self._scores = None if pairs.scores_N is None else (pairs.scores_N - low) / (high - low)
        # The length of a batch is decided by both sides, each of which is short with the root of the probability.
        sides = self._lengths[pairs.pairs_N2[:, 0]], self._lengths[self._documents()].max(1)
        self._row_lengths = [
            [_stepped(length, max_length) for length in (np.quantile(side, 0.5 ** (1 / (2 * batch_size))), side.max())]
            for side in sides
        ]
        longest = [lengths[-1] for lengths in self._row_lengths]
        self._together = max(longest) <= LIKE * min(longest)

    def __len__(self) -> int:
        """Examples: pairs."""
        return len(self._pairs.pairs_N2)

    @property
    def tokens_per_row(self) -> float:
        """Of an average example, all its texts together."""
        negatives = self._lengths[self._texts(np.arange(len(self)), np.zeros(len(self), np.int64))[:, 2:]]
        return float(self._lengths[self._pairs.pairs_N2].sum(1).mean() + negatives.sum(1).mean())

    def batch(self, step: int, part: Part = ALL) -> dict[str, Any]:
        """Rows `part` of this step's global batch, in an order of its own in each epoch."""
        places = step * self._batch_size + np.arange(self._batch_size)
        return self._rows(shuffled(places, len(self), self._seed), places // len(self), part)

    def fixed(self, part: Part = ALL) -> list[dict[str, Any]]:
        """All examples in the order of the file; empty rows fill up the last batch."""
        indices = np.append(np.arange(len(self)), np.full(-len(self) % self._batch_size, -1))
        epochs = np.zeros(self._batch_size, np.int64)
        return [self._rows(chosen, epochs, part) for chosen in indices.reshape(-1, self._batch_size)]

    def _rows(self, indices: np.ndarray, epochs: np.ndarray, part: Part) -> dict[str, Any]:
        ids_BS = self._texts(indices, epochs)
        tokens_BS = self._lengths[ids_BS]
        longest = tokens_BS[:, 0].max(), tokens_BS[:, 1:].max()
        short = all(most <= lengths[0] for most, lengths in zip(longest, self._row_lengths, strict=True))
        lengths = [lengths[0 if short else 1] for lengths in self._row_lengths]
        ids_BS, indices = ids_BS[part], indices[part]
        known_BP = np.full((len(ids_BS), self._known), -1, np.int32)
        for row, query in enumerate(ids_BS[:, 0]):
            found = self._pairs.known.get(int(query), ())
            known_BP[row, : len(found)] = found
        batch: dict[str, Any] = {
            "text_ids": ids_BS,
            "known": known_BP,
            "example_weights": (indices >= 0).astype(np.float32),
        }
        if self._scores is not None:
            batch["scores"] = np.where(indices >= 0, self._scores[indices], 0).astype(np.float32)
        if self._together:
            return batch | {"texts": self._tokens(ids_BS, max(lengths))}
        sides = (("queries", ids_BS[:, :1], lengths[0]), ("documents", ids_BS[:, 1:], lengths[1]))
        return batch | {name: self._tokens(ids, length) for name, ids, length in sides}

    def _texts(self, indices: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """Numbers of the texts of each example, int32 [B,S]; -1 where there is none."""
        ids_BS = np.full((len(indices), 2 + self._hard), -1, np.int32)
        real = indices >= 0
        ids_BS[real, :2] = self._pairs.pairs_N2[indices[real]]
        if self._hard:
            for row in np.flatnonzero(real):
                found = self._pairs.negatives.get(int(ids_BS[row, 0]), ())
                count = min(self._hard, len(found))
                first = int(epochs[row]) * self._hard
                ids_BS[row, 2 : 2 + count] = [found[(first + at) % len(found)] for at in range(count)]
        return ids_BS

    def _documents(self) -> np.ndarray:
        """Of every pair the document, and the longest hard negative of its query."""
        longest = {
            query: max(texts, key=lambda text: self._lengths[text]) for query, texts in self._pairs.negatives.items()
        }
        hard = [longest.get(int(query), -1) if self._hard else -1 for query in self._pairs.pairs_N2[:, 0]]
        return np.stack([self._pairs.pairs_N2[:, 1], hard], axis=1)

    def _tokens(self, ids_BS: np.ndarray, length: int) -> Batch:
        shape = (*ids_BS.shape, length)
        names = ("input_ids", "segment_ids", "positions", "token_type_ids")
        tokens: Batch = {name: np.zeros(shape, np.int32) for name in names}
        tokens["input_ids"][:] = self._pad_id
        for place in np.ndindex(ids_BS.shape):
            if ids_BS[place] >= 0:
                example = self._encoded[int(ids_BS[place])]
                size = len(example.ids)
                tokens["input_ids"][place][:size] = example.ids
                tokens["segment_ids"][place][:size] = 1
                tokens["positions"][place][:size] = np.arange(size)
                tokens["token_type_ids"][place][:size] = example.types
        return tokens


def _stepped(length: float, most: int) -> int:
    return min(-(-int(np.ceil(length)) // ROW_STEP) * ROW_STEP, most)
