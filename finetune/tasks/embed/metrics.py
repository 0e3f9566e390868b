"""How good embeddings are: how early a query finds its own among all documents, and how well cosines follow scores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from finetune import ranking_metrics
from finetune.correlations import pearson, spearman, with_intervals
from finetune.tasks.embed.examples import Pairs

QUERIES = 256
"""Whose cosines with all documents are in memory at once."""


def retrieval(pairs: Pairs, x_TD: np.ndarray) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(metrics with 95 % intervals, a row for each query). x_TD: an embedding of each text of length 1.

    The documents are all texts of the file that belong to some query, and all hard negatives; a query is no candidate
    of itself.
    """
    documents_C = documents(pairs)
    found, rows = [], []
    for query, cosines_C in cosines(pairs, documents_C, x_TD):
        candidates = documents_C != query
        right = list(pairs.known[query])
        relevance = np.isin(documents_C, right)[candidates]
        found.append(ranking_metrics.of_query(cosines_C[candidates], relevance))
        best, own = int(np.where(candidates, cosines_C, -np.inf).argmax()), cosines_C[np.isin(documents_C, right)].max()
        rows.append(
            {
                "query": pairs.texts[query],
                "positive": pairs.texts[right[0]],
                "nearest": pairs.texts[documents_C[best]],
                "rank": int((cosines_C[candidates] > own).sum()) + 1,
                "cosine": float(own),
                "nearest_cosine": float(cosines_C[best]),
            }
        )
    return ranking_metrics.mean(found) | ranking_metrics.intervals(found), rows


def documents(pairs: Pairs) -> np.ndarray:
    """The candidates of every query, by number of the text."""
    hard = [text for texts in pairs.negatives.values() for text in texts]
    return np.unique(np.concatenate([pairs.pairs_N2[:, 1], np.array(hard, np.int32)]))


def cosines(pairs: Pairs, documents_C: np.ndarray, x_TD: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(query, its cosines with these documents), of each query of a file."""
    numbers = [query.text for query in pairs.queries]
    for start in range(0, len(numbers), QUERIES):
        chosen = numbers[start : start + QUERIES]
        yield from zip(chosen, x_TD[chosen] @ x_TD[documents_C].T, strict=True)


def similarity(pairs: Pairs, x_TD: np.ndarray) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(spearman and pearson of cosines with scores and their 95 % intervals, a row for each pair)."""
    assert pairs.scores_N is not None
    cosine_N = np.einsum("nd,nd->n", *(x_TD[side] for side in pairs.pairs_N2.T))
    metrics = with_intervals({"spearman": spearman, "pearson": pearson}, cosine_N, pairs.scores_N)
    rows = [
        {"text": pairs.texts[a], "text_b": pairs.texts[b], "score": float(score), "cosine": float(cosine)}
        for (a, b), score, cosine in zip(pairs.pairs_N2, pairs.scores_N, cosine_N, strict=True)
    ]
    return metrics, rows


def figures(pairs: Pairs, x_TD: np.ndarray) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Of what the file is of."""
    return (similarity if pairs.scored else retrieval)(pairs, x_TD)
