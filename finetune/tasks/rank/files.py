"""Files and folders of queries and texts, and which of the layouts each is in.

a query, a text and its relevance (0, 1, grades)    .tsv, .csv, .jsonl, .parquet, hf:…, with named columns
{"query": …, "positives": […], "negatives": […]}    .jsonl, .parquet; also columns query, positive, negative
a query, a text, a click and a position             likewise (finetune/tasks/rank/clicks.py)
a query, a relevant and an irrelevant text          .tsv without names: the triples of MS MARCO
a folder with corpus.jsonl or collection.tsv        BEIR's and MS MARCO's (finetune/tasks/rank/folders.py)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from espalier.data.encodings import codec
from espalier.data.records import Record
from espalier.data.tables import Table, read_table, read_text
from espalier.errors import UserError
from finetune.tasks.rank.clicks import CLICKS, of_clicks
from finetune.tasks.rank.folders import collection_of, read_collection
from finetune.tasks.rank.judged import Judged, Query, checked, grade

if TYPE_CHECKING:
    from finetune.tasks.rank.record import RankData

QUERIES = ("query", "question", "anchor", "sentence1", "text_a")
TEXTS = ("text", "passage", "document", "doc", "answer", "sentence", "sentence2", "text_b")
LABELS = ("relevance", "label", "relevant", "score", "grade", "target", "class")
POSITIVES = r"pos(itives?)?|positive_passages?"
NEGATIVES = r"neg(ative)?s?([_ -]?\d+)?|hard_negatives?|negative_passages?"


def read_judged(data: RankData, name: str) -> Judged:
    """What is named `train` or `validation`; UserError where it will not do."""
    clicks = (data.position or data.propensity) if name == "train" else None
    what = "a file of queries and texts (.tsv, .csv, .jsonl, hf:…) or a folder in the layout of BEIR or MS MARCO"
    with data.opening(name, what) as path:
        if collection_of(path):
            _check_pairs(path, clicks)
            return checked(read_collection(path, name, data.run if name == "validation" else None))
        if data.run is not None and name == "validation":
            raise UserError(f"--data.run is for folders with a collection of texts, and {path} is none; leave it out")
        if rows := _triples(path, data.encoding):
            _check_pairs(path, clicks)
            return checked(_of_triples(path, *rows))
        return checked(_of_table(read_table(path, codec(data.encoding)), data, clicks))


def _check_pairs(path: str, clicks: str | None) -> None:
    if clicks:
        raise UserError(
            f"{path} holds no clicks: --data.position and --data.propensity are for files with a column of queries, of "
            "texts and of clicks, an impression a row; leave them out"
        )


class _Gathered:
    """Queries and texts, each once, with what is relevant; ids are numbers in the order of the file."""

    def __init__(self):
        self._queries: dict[str, dict[str, int]] = {}
        self._ids: dict[str, str] = {}
        self.again = 0

    def add(self, query: str, text: str, relevance: int) -> None:
        known = self._queries.setdefault(query, {})
        name = self._ids.setdefault(text, f"d{len(self._ids) + 1}")
        self.again += name in known
        known[name] = max(known.get(name, 0), relevance)

    def judged(self, path: str, paired: bool, facts: Sequence[str], fingerprint: str, ranked: bool = True) -> Judged:
        """ranked: whether the texts of a query in the file are those that it ranks."""
        queries = [
            Query(f"q{number}", query, relevance, list(relevance) if ranked else None)
            for number, (query, relevance) in enumerate(self._queries.items(), 1)
        ]
        facts = list(facts)
        if self.again:
            facts.append(f"{path}: {self.again:,} pairs are there again; each counts once, with its highest relevance")
        texts = {name: text for text, name in self._ids.items()}
        return Judged(path, queries, texts, paired, tuple(facts), fingerprint)


def _triples(path: str, encoding: str) -> tuple[list[list[str]], Sequence[str], str] | None:
    """The lines of a .tsv that has three texts in each and no names of columns; None for another file."""
    if not re.search(r"\.tsv(\.gz|\.zst)?$", path):
        return None
    file = read_text(path, codec(encoding))
    lines = [line.split("\t") for line in file.text.split("\n") if line]
    first = lines[0] if lines else []
    if len(first) != 3 or first[0].strip() in QUERIES or re.fullmatch(r"\s*-?\d+(\.\d+)?\s*", first[2]):
        return None
    # Names of columns are words; what is named by hand must be one.
    if all(len(cell.split()) == 1 for cell in first):
        return None
    for number, line in enumerate(lines, 1):
        if len(line) != 3:
            raise UserError(
                f"{path}:{number}: {len(line)} cells; the first line has three and names no columns, so that each was "
                "taken for a query, a relevant and an irrelevant text, separated by tabs"
            )
    return lines, file.notes, file.fingerprint


def _of_triples(path: str, lines: list[list[str]], notes: Sequence[str], fingerprint: str) -> Judged:
    found = _Gathered()
    for query, relevant, irrelevant in lines:
        found.add(query, relevant, 1)
        found.add(query, irrelevant, 0)
    found.again = 0
    said = f"{path}: {len(lines):,} triples of a query, a relevant and an irrelevant text (no names of columns)"
    return found.judged(path, False, (*notes, said), fingerprint)


def _of_table(table: Table, data: RankData, clicks: str | None = None) -> Judged:
    names = list(dict.fromkeys(name for record in table.records for name in record.columns))
    query = _column(table, names, data.query, QUERIES, "query")
    positives = [name for name in names if re.fullmatch(POSITIVES, name)]
    if positives and data.text is None:
        _check_pairs(table.path, clicks)
        return _of_lists(table, query, positives, [name for name in names if re.fullmatch(NEGATIVES, name)])
    text = _column(table, names, data.text, TEXTS, "text")
    label = _column(table, names, data.label, (*CLICKS, *LABELS) if clicks else LABELS, "label")
    if clicks:
        _column(table, names, clicks, (), "position")
        return of_clicks(table, data, query, text, label, _text)
    found = _Gathered()
    for record in table.records:
        values = dict(zip(record.columns, record.values, strict=True))
        asked, shown = (_text(record, values, name) for name in (query, text))
        value = values.get(label)
        if value is None:
            raise UserError(f"{record.name}: no relevance under {label!r}; it is 0, 1 or a grade")
        found.add(asked, shown, grade(value, record.name))
    said = f"{table.path}: pairs of {query!r} and {text!r}, with the relevance in {label!r}"
    return found.judged(table.path, True, (*table.notes, said), table.fingerprint)


def _of_lists(table: Table, query: str, positives: Sequence[str], negatives: Sequence[str]) -> Judged:
    found, counted = _Gathered(), 0
    for record in table.records:
        values = dict(zip(record.columns, record.values, strict=True))
        asked = _texts(record, values, query)
        good = [text for name in positives for text in _texts(record, values, name)]
        bad = [text for name in negatives for text in _texts(record, values, name)]
        if len(asked) != 1 or not good:
            raise UserError(f"{record.name}: a query and one relevant text are needed; correct or remove the row")
        for texts, relevance in ((good, 1), (bad, 0)):
            for text in texts:
                found.add(asked[0], text, relevance)
        counted += len(bad)
    found.again = 0
    said = f"{table.path}: {query!r} with {' and '.join(map(repr, (*positives, *negatives)))}"
    if not counted:
        said += "; nothing is irrelevant there, so that BM25 finds what a query ranks among all texts of the file"
    return found.judged(table.path, False, (*table.notes, said), table.fingerprint, ranked=counted > 0)


def _column(table: Table, names: Sequence[str], asked: str | None, known: Sequence[str], what: str) -> str:
    if asked is not None and asked not in names:
        raise UserError(f"{table.path} has no column {asked!r}; its columns are {', '.join(map(repr, names))}")
    found = asked or next((name for name in known if name in names), None)
    if found is None:
        raise UserError(
            f"{table.path}: which column holds the {'relevance' if what == 'label' else what}? It has "
            f"{', '.join(map(repr, names))}; name it with --data.{what} (a .tsv of three texts without names of "
            "columns is taken for triples)"
        )
    return found


def _text(record: Record, values: Mapping[str, Any], name: str) -> str:
    """The one text of a cell."""
    texts = _texts(record, values, name)
    if len(texts) != 1:
        raise UserError(f"{record.name}: no text under {name!r}; correct or remove the row")
    return texts[0]


def _texts(record: Record, values: Mapping[str, Any], name: str) -> list[str]:
    """The text of a cell, or the texts of a list, without empty ones; of MS MARCO's objects {"text": …} the text."""
    value = values.get(name)
    texts = value if isinstance(value, list) else [] if value is None else [value]
    texts = [_of_object(text) if isinstance(text, dict) else text for text in texts]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{record.name}: {name!r} holds {type(value).__name__}; expected a text or a list of texts")
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{record.name}: half a surrogate pair (\\ud800 …) is no character; remove it") from error
    return [text for text in texts if text.strip()]


def _of_object(value: Mapping[str, Any]) -> Any:
    """Title and text together; the object itself where they are no texts."""
    parts = [part for name in ("title", "text") if (part := value.get(name)) is not None]
    return " ".join(filter(None, parts)) if all(isinstance(part, str) for part in parts) else value
