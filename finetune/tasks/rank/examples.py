"""What a ranker learns from: pairs with a target, or groups of a relevant text and irrelevant ones of its query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from espalier import progress
from espalier.data.examples import Example, LabelledBatches, encode_pairs
from espalier.data.loader import ALL, Batch, Part, shuffled
from espalier.errors import UserError
from finetune.tasks.rank.judged import Judged, Query

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

POOL = 4
"""Times as many irrelevant texts as a group holds are kept of a query, so that epochs see others."""


class Pairs(NamedTuple):
    """Queries with texts, encoded."""

    encoded: list[Example]
    """With the targets `labels` (relevance from 0 to 1) and `index` (which of them it is)."""
    relevance: list[float]
    groups: list[tuple[int, list[int]]]
    """A relevant pair and the irrelevant ones of its query, by number."""


def training_pairs(
    judged: Judged,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    causal: bool,
    *,
    negatives: int,
    grouped: bool,
    seed: int,
) -> Pairs:
    """judged: with candidates. A file that pairs queries and texts is taken as it is; of other layouts each relevant
    text comes with as many irrelevant candidates of its query as `negatives` says, drawn once (grouped: from POOL times
    as many, drawn anew in each epoch). Of clicks, a group is a clicked text and all others of its query, clicked or
    not: what it is compared with must not depend on clicks. UserError where there is nothing to tell apart.
    """
    random = np.random.default_rng([seed, 7])
    chosen: list[tuple[Query, str]] = []
    groups = []
    for query in judged.queries:
        good = [name for name, grade in query.relevance.items() if grade > 0]
        bad = [name for name in query.candidates or () if query.relevance.get(name, 0) <= 0]
        if judged.clicks and grouped:
            if not good or len(good) + len(bad) < 2:
                continue
        elif not judged.paired or grouped:
            if not good or (grouped and not bad):
                continue
            most = negatives * (POOL if grouped else 1) * len(good)
            if len(bad) > most:
                bad = [bad[at] for at in np.sort(random.choice(len(bad), most, replace=False))]
        first = len(chosen)
        chosen += [(query, name) for name in (*good, *bad)]
        own = range(first, first + len(good))
        rest = list(range(first if judged.clicks else own.stop, len(chosen)))
        groups += [(at, [other for other in rest if other != at] if judged.clicks else rest) for at in own]
    relevance = [query.relevance.get(name, 0) for query, name in chosen]
    if len(set(relevance)) < 2:
        raise UserError(
            f"{judged.path}: "
            + (
                "no query has a relevant and an irrelevant text, which --loss softmax compares; try --loss bce, or add "
                "irrelevant texts"
                if grouped
                else f"every pair has the relevance {relevance[0] if relevance else 0}; a ranker learns from relevant "
                "and irrelevant texts"
            )
        )
    return Pairs(
        encoded(judged, chosen, relevance, tokenizer, max_length, causal), relevance, groups if grouped else []
    )


def ranked_pairs(queries: Sequence[Query]) -> list[tuple[Query, str]]:
    """Every query with each of its candidates, by id: of equal scores the later one comes first (ranking_metrics)."""
    return [(query, name) for query in queries for name in sorted(query.candidates or ())]


def encoded(
    judged: Judged,
    chosen: Sequence[tuple[Query, str]],
    relevance: Sequence[float],
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    causal: bool,
) -> list[Example]:
    """Pairs as the model reads them; grades are divided by the highest of the file."""
    highest = judged.highest
    with progress.waiting(f"tokenizing {len(chosen):,} pairs"):
        examples = encode_pairs(
            *(tokenizer, [query.text for query, _ in chosen], [judged.texts[name] for _, name in chosen]),
            *(max_length, causal),
        )
    return [
        example._replace(of_row={"labels": np.float32(grade / highest), "index": at})
        for at, (example, grade) in enumerate(zip(examples, relevance, strict=True))
    ]


class GroupBatches:
    """Batches [B, G, T]: groups of G pairs, the relevant one first; a group lies on one device, whole.

    Each group comes once an epoch, with other irrelevant texts where its query has more than G - 1. The arrays are
    those of LabelledBatches with an axis more; `example_weights` is 0 where a query has fewer.
    """

    def __init__(self, pairs: Pairs, batch_size: int, size: int, seed: int, *, pad_id: int, max_length: int):
        self._groups, self._batch_size, self._size, self._seed = pairs.groups, batch_size, size, seed
        self._pairs = LabelledBatches(pairs.encoded, batch_size * size, seed, pad_id=pad_id, max_length=max_length)

    def __len__(self) -> int:
        return len(self._groups)

    def batch(self, step: int, part: Part = ALL) -> Batch:
        """Groups `part` of this step's global batch: a function of seed and step."""
        place_B = step * self._batch_size + np.arange(self._batch_size)
        chosen_B = shuffled(place_B, len(self), self._seed)
        indices_BG = np.full((self._batch_size, self._size), -1)
        for row, (epoch, number) in enumerate(zip(place_B // len(self), chosen_B, strict=True)):
            relevant, others = self._groups[number]
            random = np.random.default_rng([self._seed, int(epoch), int(number)])
            drawn = [others[at] for at in random.permutation(len(others))[: self._size - 1]]
            indices_BG[row, : len(drawn) + 1] = [relevant, *drawn]
        rows_BG = np.arange(indices_BG.size).reshape(indices_BG.shape)[part]
        flat = self._pairs.rows(indices_BG.reshape(-1), rows_BG.reshape(-1))
        return {name: array.reshape(*rows_BG.shape, *array.shape[1:]) for name, array in flat.items()}
