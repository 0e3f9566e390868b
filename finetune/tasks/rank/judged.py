"""Queries, texts, and which texts are relevant to which query: what every layout of files is read into."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from espalier import progress
from espalier.errors import UserError
from finetune.tasks.rank.bm25 import BM25


class Query(NamedTuple):
    id: str
    text: str
    relevance: Mapping[str, float]
    """Text (its id) → grade, of all that were judged, ranked or not; what was not judged counts as 0. Of clicks, an
    estimate of how likely it is to be clicked where it is looked at."""
    candidates: Sequence[str] | None
    """The texts that are ranked, by id; None = the file does not say, and BM25 finds them."""


class Judged(NamedTuple):
    """The content of a file or folder."""

    path: str
    queries: list[Query]
    texts: Mapping[str, str]
    """By id."""
    paired: bool
    """Whether the file pairs each query with the texts that count: then all its pairs are learnt from."""
    facts: tuple[str, ...]
    """What was found and what it was taken for, a line each."""
    fingerprint: str
    clicks: bool = False
    """Whether the relevance is estimated from clicks (finetune/tasks/rank/clicks.py)."""

    @property
    def highest(self) -> float:
        """The relevance that counts as 1."""
        if self.clicks:
            return 1.0
        return max((grade for query in self.queries for grade in query.relevance.values()), default=1) or 1

    @property
    def candidates(self) -> int:
        return sum(len(query.candidates or ()) for query in self.queries)

    def retrieved(self, depth: int, bm25: BM25 | None = None) -> Judged:
        """With candidates for the queries that have none: the first `depth` of BM25 over all texts.

        A query for which nothing is found ranks nothing.
        """
        if all(query.candidates is not None for query in self.queries):
            return self
        ids = list(self.texts)
        bm25 = bm25 or BM25(list(self.texts.values()))
        with progress.waiting(f"searching {len(ids):,} texts for {len(self.queries):,} queries by BM25"):
            queries = [
                query
                if query.candidates is not None
                else query._replace(candidates=[ids[at] for at in bm25.first(query.text, depth)])
                for query in self.queries
            ]
        return self._replace(queries=queries)


def grade(value: object, place: str) -> int:
    """A relevance: a whole number; below 0 (spam in TREC's files) counts as 0. UserError for another value."""
    written = str(value).strip()
    if isinstance(value, bool):
        written = str(int(value))
    try:
        number = float(written)
    except ValueError:
        number = math.nan
    if not number.is_integer():
        raise UserError(
            f"{place}: the relevance {written[:40]!r} is no whole number; it is 1 or 0, or a grade (0, 1, 2, 3), as in "
            "trec_eval's files"
        )
    return max(int(number), 0)


def checked(judged: Judged) -> Judged:
    """As it is; UserError where nothing can be learnt from it or measured on it."""
    if not any(grade > 0 for query in judged.queries for grade in query.relevance.values()):
        raise UserError(f"{judged.path}: no text is relevant to its query; there is nothing to rank by")
    for name in (*(query.id for query in judged.queries), *judged.texts):
        if not name or any(sign.isspace() for sign in name):
            raise UserError(f"{judged.path}: the id {name!r} is empty or has blanks, which run files cannot hold")
    return judged
