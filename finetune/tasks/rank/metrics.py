"""How good a ranking is beside BM25's, and the rows and files that show it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from espalier.task import Evaluation
from finetune.ranking_metrics import intervals, mean, of_query
from finetune.tasks.rank.judged import Judged, Query

SHOWN = 10
"""Texts of each query in predictions.jsonl; run.trec holds all."""


def measured(judged: Judged, scores_N: np.ndarray, baseline_N: np.ndarray) -> Evaluation:
    """scores_N: of every query with each candidate, in the order of examples.ranked_pairs. baseline_N: BM25's."""
    found, of_queries = means(judged.queries, scores_N)
    baseline, _ = means(judged.queries, baseline_N)
    metrics: dict[str, Any] = found | {f"baseline_{name}": value for name, value in baseline.items()}
    metrics |= intervals(of_queries)
    relevant = [(query, name) for query in judged.queries for name, grade in query.relevance.items() if grade > 0]
    there = sum(name in set(query.candidates or ()) for query, name in relevant)
    metrics["candidates_recall"] = there / max(len(relevant), 1)
    warnings = []
    if all(len(query.candidates or ()) < 2 for query in judged.queries):
        warnings.append(
            f"warning: no query of {judged.path} has more than one text, so that there is nothing to rank and the "
            "metrics say nothing; give each query several texts"
        )
    elif len(scores_N) > 1 and np.ptp(scores_N) < 1e-6:
        warnings.append(
            "warning: every text gets the same score, so that nothing was learnt; try more --epochs or another "
            "--optimizer.learning-rate"
        )
    return Evaluation(
        metrics,
        list(_rows(judged, scores_N, of_queries)),
        {"run.trec": "".join(_run(judged, scores_N)), "qrels.trec": "".join(_qrels(judged))},
        warnings,
    )


def means(queries: Sequence[Query], scores_N: np.ndarray) -> tuple[dict[str, float], list[dict[str, float]]]:
    """The metrics over all queries, and those of each; a query without candidates counts 0."""
    found = []
    for query, names, scores in _by_query(queries, scores_N):
        grades = [query.relevance.get(name, 0) for name in names]
        missed = [grade for name, grade in query.relevance.items() if name not in set(names)]
        found.append(of_query(scores, np.array(grades), missed))
    return mean(found), found


def validation_loss(queries: Sequence[Query], scores_N: np.ndarray, labels_N: np.ndarray, loss: str) -> float:
    """bce: mean over the pairs. softmax: mean over relevant texts, each against all irrelevant ones of its query."""
    if loss == "bce":
        return float(np.mean(np.logaddexp(0, scores_N) - labels_N * scores_N))
    losses, first = [], 0
    for _, names, scores in _by_query(queries, scores_N):
        labels = labels_N[first : first + len(names)]
        first += len(names)
        bad = scores[labels <= 0].astype(np.float64)
        losses += [np.logaddexp.reduce(np.append(bad, score)) - score for score in scores[labels > 0]]
    return float(np.mean(losses)) if losses else 0.0


def _by_query(queries: Sequence[Query], scores_N: np.ndarray) -> Iterator[tuple[Query, list[str], np.ndarray]]:
    first = 0
    for query in queries:
        names = sorted(query.candidates or ())
        yield query, names, scores_N[first : first + len(names)]
        first += len(names)
    assert first == len(scores_N), f"{first} candidates and {len(scores_N)} scores"


def _order(scores_N: np.ndarray) -> np.ndarray:
    """Of equal scores the later name first, as trec_eval and ranking_metrics have it."""
    return len(scores_N) - 1 - np.argsort(-scores_N[::-1], kind="stable")


def _rows(judged: Judged, scores_N: np.ndarray, of_queries: Sequence[dict[str, float]]) -> Iterator[dict]:
    for (query, names, scores), found in zip(_by_query(judged.queries, scores_N), of_queries, strict=True):
        ranking = [
            {
                "text_id": names[at],
                "text": judged.texts[names[at]],
                "score": float(scores[at]),
                "relevance": query.relevance.get(names[at], 0),
            }
            for at in _order(scores)[:SHOWN]
        ]
        yield {"query_id": query.id, "query": query.text, "ndcg@10": found["ndcg@10"], "ranking": ranking}


def _run(judged: Judged, scores_N: np.ndarray) -> Iterator[str]:
    """A TREC run: query Q0 text rank score name."""
    for query, names, scores in _by_query(judged.queries, scores_N):
        for rank, at in enumerate(_order(scores), 1):
            yield f"{query.id} Q0 {names[at]} {rank} {float(scores[at])!r} espalier\n"


def _qrels(judged: Judged) -> Iterator[str]:
    """The judgements as trec_eval reads them."""
    for query in judged.queries:
        for name, grade in query.relevance.items():
            yield f"{query.id} 0 {name} {grade}\n"
