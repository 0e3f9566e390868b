"""How good rankings are, as trec_eval defines it; the mean over queries counts each query once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from espalier.intervals import draws, interval

DEPTH = 10
"""Of nDCG and MRR."""
RECALLS = (1, 10)
"""Depths of recall."""


def of_query(scores_N: np.ndarray, relevance_N: np.ndarray, missed: Sequence[float] = ()) -> dict[str, float]:
    """`ndcg@10`, `map`, `mrr@10`, `recall@1`, `recall@10` of the candidates of one query.

    scores_N: higher is better; of equal ones the later candidate comes first, as trec_eval does by their names.
    relevance_N: 0 = not relevant, else the gain; of nDCG it counts as it is (Järvelin and Kekäläinen 2002), of the
    others a candidate with more than 0 is a hit. mrr@10 is 0 where the first ten have no hit. A query without a hit at
    all has 0 everywhere. missed: relevance of what was judged and is no candidate: it counts as not found.
    """
    scores_N, relevance_N = np.asarray(scores_N), np.asarray(relevance_N, np.float64)
    assert scores_N.shape == relevance_N.shape and scores_N.ndim == 1
    order = len(scores_N) - 1 - np.argsort(-scores_N[::-1], kind="stable")
    gains_N = relevance_N[order]
    hits_N = gains_N > 0
    gains_of_missed = np.asarray(missed, np.float64)
    total = int(hits_N.sum() + (gains_of_missed > 0).sum())
    names = ("ndcg@10", "map", "mrr@10", *(f"recall@{depth}" for depth in RECALLS))
    if not total:
        return dict.fromkeys(names, 0.0)
    places = np.flatnonzero(hits_N) + 1
    ideal_N = np.sort(np.maximum(np.append(relevance_N, gains_of_missed), 0))[::-1]
    values = (
        _dcg(np.maximum(gains_N, 0)) / _dcg(ideal_N),
        float((np.arange(1, len(places) + 1) / places).sum() / total),
        1 / places[0] if len(places) and places[0] <= DEPTH else 0.0,
        *(hits_N[:depth].sum() / total for depth in RECALLS),
    )
    return dict(zip(names, map(float, values), strict=True))


def mean(queries: Iterable[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over queries."""
    queries = list(queries)
    return {name: float(np.mean([query[name] for query in queries])) for name in queries[0]} if queries else {}


def intervals(queries: Iterable[dict[str, float]]) -> dict[str, list[float]]:
    """95 % intervals of those means, over queries drawn anew: `ndcg@10_interval` …; none of a single query."""
    queries = list(queries)
    if len(queries) < 2:
        return {}
    values_QM = np.array([list(query.values()) for query in queries])
    means_SM = np.array([values_QM[drawn].mean(0) for drawn in draws(len(queries))])
    return {f"{name}_interval": list(interval(means_SM[:, at])) for at, name in enumerate(queries[0])}


def _dcg(gains_N: np.ndarray) -> float:
    gains = gains_N[:DEPTH]
    return float((gains / np.log2(np.arange(2, len(gains) + 2))).sum())
