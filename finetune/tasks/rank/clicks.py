"""Clicks as judgements: what was clicked counts the more, the less likely it was to be looked at where it was shown.

A row is an impression: a query, a text, whether it was clicked, and the position at which it was shown (1 = first), or
its propensity, the probability that it was looked at there. Who looks at a text clicks it if it is relevant; where
nobody looked, a missing click says nothing. Clicks divided by propensities mend this (Joachims et al. 2017):

    E[click / propensity] = P(click | looked at),   which is the target of a pair, its mean over the impressions

Losses that are linear in their targets then have the expectation that they have with the relevance itself: the
cross-entropy of pairs (Saito et al. 2020), and softmax over the texts of a query, weighed by the target (Ai et al.
2018). A target may be above 1. Propensities of positions k are (1/k)^η; they are not learnt here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from espalier.data.tables import Table
from espalier.errors import UserError
from finetune.tasks.rank.judged import Judged, Query

if TYPE_CHECKING:
    from finetune.tasks.rank.record import RankData

CLICKS = ("click", "clicked", "clicks")
"""Names of the column."""


def of_clicks(table: Table, data: RankData, query: str, text: str, click: str, text_of: Callable[..., str]) -> Judged:
    """The impressions of a table by pairs; query, text, click: its columns, text_of: (record, values, column) → text.

    UserError for what is no click, position or propensity, and where nothing was clicked.
    """
    queries: dict[str, dict[str, list[float]]] = {}
    ids: dict[str, str] = {}
    clicked = 0
    for record in table.records:
        values = dict(zip(record.columns, record.values, strict=True))
        asked, shown = (text_of(record, values, name) for name in (query, text))
        was = _number(values, click, record.name, "a click is 0 or 1")
        if was not in (0, 1):
            raise UserError(f"{record.name}: {click}={was:g}; a click is 0 or 1, an impression a row")
        clicked += int(was)
        name = ids.setdefault(shown, f"d{len(ids) + 1}")
        queries.setdefault(asked, {}).setdefault(name, []).append(was / propensity(values, data, record.name))
    if not clicked:
        raise UserError(f"{table.path}: nothing was clicked by {click!r}; there is nothing to rank by")
    means = {asked: {name: sum(seen) / len(seen) for name, seen in of.items()} for asked, of in queries.items()}
    found = [Query(f"q{number}", asked, of, list(of)) for number, (asked, of) in enumerate(means.items(), 1)]
    by = f"{data.position!r}, (1/position)^{data.position_bias:g}" if data.position else repr(data.propensity)
    said = (
        f"{table.path}: {len(table.records):,} impressions of {sum(map(len, means.values())):,} pairs of {query!r} and "
        f"{text!r}, {clicked:,} clicked by {click!r}; propensities by {by}"
    )
    texts = {name: shown for shown, name in ids.items()}
    return Judged(table.path, found, texts, True, (*table.notes, said), table.fingerprint, clicks=True)


def propensity(values: Mapping[str, Any], data: RankData, place: str) -> float:
    """The probability that the text of a row was looked at, not below data.propensity_clip."""
    if data.position is not None:
        position = _number(values, data.position, place, "a position is a whole number, 1 the first")
        if position < 1 or position != int(position):
            raise UserError(f"{place}: {data.position}={position:g}; a position is a whole number, 1 the first")
        found = position**-data.position_bias
    else:
        assert data.propensity is not None
        found = _number(values, data.propensity, place, "a propensity is a probability above 0")
        if not 0 < found <= 1:
            raise UserError(f"{place}: {data.propensity}={found:g}; a propensity is a probability above 0, up to 1")
    return max(found, data.propensity_clip)


def _number(values: Mapping[str, Any], name: str, place: str, wanted: str) -> float:
    try:
        return float(values[name])
    except (TypeError, ValueError, KeyError):
        raise UserError(f"{place}: {name}={str(values.get(name))[:40]!r}; {wanted}") from None
