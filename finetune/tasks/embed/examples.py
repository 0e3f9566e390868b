"""Files of pairs, triplets, queries with positives and negatives, and scored pairs, as texts with numbers.

two columns                                      a text and one that belongs to it
two columns and a label 1 or 0                   of which those with 1 belong together; the others are hard negatives
two columns and a score                          how alike they are (STS)
a column or more of negatives beside the two     triplets
{"query": …, "positives": […], "negatives": […]}   .jsonl
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from espalier import progress
from espalier.data.encodings import codec
from espalier.data.records import Record
from espalier.data.tables import Table, is_number, read_table
from espalier.errors import UserError

if TYPE_CHECKING:
    from finetune.tasks.embed.record import EmbedData

QUERIES = ("query", "anchor", "question", "question1", "sentence1", "#1 String", "text1", "premise", "text_a")
POSITIVES = ("positive", "positives", "pos", "document", "passage", "answer", "question2", "sentence2", "#2 String") + (
    *("text2", "hypothesis", "text_b"),
)
NEGATIVES = r"neg(ative)?s?([_ -]?\d+)?|hard_negatives?"
SCORES = ("score", "similarity_score", "similarity", "relatedness_score")
LABELS = ("label", "Quality", "is_duplicate", "gold_label")


class Query(NamedTuple):
    """A text and what belongs to it, by number of the text."""

    text: int
    positives: tuple[int, ...]
    negatives: tuple[int, ...]


class Pairs(NamedTuple):
    """The content of a file."""

    path: str
    texts: list[str]
    """Each once."""
    queries: list[Query]
    """Each text that has a positive once; empty for scored pairs."""
    pairs_N2: np.ndarray
    """int32: two texts each, in the order of the file. Of queries: with each positive of theirs."""
    scores_N: np.ndarray | None
    """float32 as in the file; None where there are none."""
    known: Mapping[int, tuple[int, ...]]
    """Query → texts that belong to it."""
    negatives: Mapping[int, tuple[int, ...]]
    """Query → hard negatives."""
    columns: tuple[str, ...]
    """Of the two texts."""
    facts: tuple[str, ...]
    """What was found and what it was taken for."""
    fingerprint: str

    @property
    def scored(self) -> bool:
        return self.scores_N is not None


def read_pairs(data: EmbedData, name: str) -> Pairs:
    """The file that is named `train` or `validation`; UserError where it will not do."""
    path = getattr(data, name)
    if path is None:
        raise UserError(f"no --data.{name} FILE given: name pairs of texts (.tsv, .csv, .jsonl, hf:…)")
    return pairs_of(os.path.expanduser(path), data)


def pairs_of(path: str, data: EmbedData) -> Pairs:
    """The pairs of one file."""
    with progress.waiting(f"reading {path}"):
        table = read_table(path, codec(data.encoding))
    columns = Columns.of(table, data)
    numbers: dict[str, int] = {}

    def number(text: str) -> int:
        return numbers.setdefault(text, len(numbers))

    rows = []
    for record in table.records:
        values = dict(zip(record.columns, record.values, strict=True))
        asked = _texts(record, values, columns.query, 1)
        if len(asked) > 1:
            raise UserError(
                f"{record.name}: {len(asked)} texts under {columns.query!r}, and a query is one; write a row for each"
            )
        positives = _texts(record, values, columns.positive, 1)
        negatives = [text for column in columns.negatives for text in _texts(record, values, column, 0)]
        rows.append((record, values, number(asked[0]), [*map(number, positives)], [*map(number, negatives)]))
    facts = list(table.notes)
    if columns.score:
        pairs = [(query, positive) for _, _, query, positives, _ in rows for positive in positives]
        scores = [_score(record, values, columns.score) for record, values, _, positives, _ in rows for _ in positives]
        low, high = min(scores), max(scores)
        if low == high:
            raise UserError(f"{path}: every pair has the score {low:g} in {columns.score!r}; scores must differ")
        facts.append(f"{path}: {len(pairs):,} pairs with a score from {low:g} to {high:g} in {columns.score!r}")
        if unused := sum(len(negatives) for *_, negatives in rows):
            facts.append(
                f"{path}: {unused:,} hard negatives are left out, for pairs with a score have none; for triplets leave "
                f"out the column {columns.score!r}"
            )
        found: dict[str, Any] = {"queries": [], "known": {}, "negatives": {}}
        found |= {"pairs_N2": np.array(pairs, np.int32), "scores_N": np.array(scores, np.float32)}
    else:
        found = _related(path, rows, columns, facts)
    return Pairs(
        path=path,
        texts=list(numbers),
        columns=(columns.query, columns.positive),
        facts=tuple(dict.fromkeys(facts)),
        fingerprint=table.fingerprint,
        **found,
    )


def _related(path: str, rows: Sequence[tuple], columns: Columns, facts: list[str]) -> dict[str, Any]:
    """Queries with all that belongs to them, and with all hard negatives."""
    known: dict[int, dict[int, None]] = {}
    wrong: dict[int, dict[int, None]] = {}
    pairs: dict[tuple[int, int], None] = {}
    apart, same = 0, 0
    for record, values, query, positives, negatives in rows:
        if columns.label and not _label(record, values, columns.label):
            negatives, positives = [*negatives, *positives], []
            apart += 1
        for positive in positives:
            if positive == query:
                same += 1
            else:
                known.setdefault(query, {})[positive] = None
                pairs[query, positive] = None
        wrong.setdefault(query, {}).update(dict.fromkeys(negatives))
    if not pairs:
        raise UserError(f"{path} has no pair of different texts that belong together; there is nothing to learn from")
    negatives = {
        query: tuple(text for text in wrong[query] if text not in known[query] and text != query) for query in known
    }
    negatives = {query: texts for query, texts in negatives.items() if texts}
    counted = sum(map(len, negatives.values()))
    facts.append(
        f"{path}: {len(pairs):,} pairs, {columns.query!r} with {columns.positive!r}, of {len(known):,} queries"
        + (f", with {counted:,} hard negatives" if counted else "")
    )
    if apart:
        facts.append(
            f"{path}: {apart:,} rows with 0 in {columns.label!r} are no pairs; their texts are hard negatives where "
            "the query has a positive"
        )
    if same:
        facts.append(f"{path}: {same:,} pairs of a text with itself are left out")
    queries = [Query(query, tuple(known[query]), negatives.get(query, ())) for query in known]
    return {
        "queries": queries,
        "pairs_N2": np.array(list(pairs), np.int32),
        "scores_N": None,
        "known": {query.text: query.positives for query in queries},
        "negatives": negatives,
    }


class Columns(NamedTuple):
    """Which columns hold what."""

    query: str
    positive: str
    negatives: tuple[str, ...]
    score: str | None
    label: str | None

    @classmethod
    def of(cls, table: Table, data: EmbedData) -> Columns:
        """As asked for, else by their names; of two columns the first is the query. UserError where that fails."""
        names = table.columns
        asked = [data.query, data.positive, *data.negatives, data.score, data.label]
        for name in asked:
            if name is not None and name not in names:
                raise UserError(f"{table.path} has no column {name!r}; its columns are {', '.join(map(repr, names))}")

        def guessed(known: Sequence[str]) -> str | None:
            return next((name for name in known if name in names and name not in asked), None)

        query, positive = data.query or guessed(QUERIES), data.positive or guessed(POSITIVES)
        negatives = data.negatives or tuple(
            name for name in names if re.fullmatch(NEGATIVES, name) and name not in asked
        )
        score = data.score or (None if data.label else guessed(SCORES))
        label = data.label or (None if score else guessed(LABELS))
        if data.score and data.label:
            raise UserError("--data.score and --data.label say the same of a pair in two ways; give one of them")
        rest = [name for name in names if name not in (query, positive, *negatives, score, label)]
        if query is None and positive is None and len(rest) == 2:
            query, positive = rest
        elif len(rest) == 1 and (query is None) != (positive is None):
            query, positive = query or rest[0], positive or rest[0]
        if query is None or positive is None or query == positive:
            raise UserError(
                f"{table.path}: which columns hold the two texts? It has {', '.join(map(repr, names))}; name them with "
                "--data.query and --data.positive"
            )
        return cls(query, positive, negatives, score, label)


def _texts(record: Record, values: Mapping[str, Any], column: str, least: int) -> list[str]:
    """The text of a cell, or the texts of a list; UserError where there are fewer than `least`."""
    value = values.get(column)
    texts = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{record.name}: {column!r} holds {type(value).__name__}; expected a text or a list of texts")
    texts = [text for text in texts if least or text.strip()]
    if len(texts) < least or not all(text.strip() for text in texts):
        raise UserError(f"{record.name}: no text under {column!r}; correct or remove the row")
    return texts


def _score(record: Record, values: Mapping[str, Any], column: str) -> float:
    value = values.get(column)
    written = value.strip() if isinstance(value, str) else str(value)
    if isinstance(value, bool) or not is_number(written) or not np.isfinite(float(written.replace(",", ".", 1))):
        raise UserError(f"{record.name}: {value!r} under {column!r} is not a number; correct or remove the row")
    return float(written.replace(",", ".", 1))


def _label(record: Record, values: Mapping[str, Any], column: str) -> bool:
    value = values.get(column)
    written = str(value).strip().lower().removesuffix(".0")
    if written not in ("0", "1", "true", "false"):
        raise UserError(
            f"{record.name}: {value!r} under {column!r}; pairs are labelled by 1 (they belong together) or 0, and "
            "scores are named by --data.score"
        )
    return written in ("1", "true")
