"""What people marked in the examples, as weights of their tokens: words or spans that justify the label."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from espalier.data.examples import Example
from espalier.data.labelled import Labelled
from espalier.errors import UserError
from espalier.models.attention_terms import MARKED

FORM = "a JSON array of words of the text, or of pairs of characters [begin, end]"


def with_marks(texts: Labelled, examples: Sequence[Example], column: str) -> list[Example]:
    """The examples, encoded with offsets, with `marked` of their tokens: 1 where a token touches what is marked.

    Where the file has not the column, or its cell is empty, nothing is marked. UserError for a cell of another form,
    and for words that are not in the text.
    """
    cells = texts.others.get(column, [None] * len(examples))
    places = texts.places or ("",) * len(examples)
    return [
        example._replace(of_tokens={**example.of_tokens, MARKED: token_weights(example, spans_of(cell, text, place))})
        for example, cell, text, place in zip(examples, cells, texts.texts_a, places, strict=True)
    ]


def spans_of(cell: Any, text: str, place: str) -> list[tuple[int, int]]:
    """The characters begin … end of a text that a cell marks; a word is marked wherever it stands."""
    if isinstance(cell, str):
        try:
            cell = json.loads(cell) if cell.strip() else None
        except ValueError:
            cell = {}
    if cell is None:
        return []
    if not isinstance(cell, list):
        raise UserError(f"{place}: marked words are {FORM}")
    spans = []
    for one in cell:
        if isinstance(one, str) and one:
            found = _occurrences(one, text)
            if not found:
                raise UserError(f"{place}: {one!r} is marked and is not in the text; {FORM}")
            spans += found
        elif isinstance(one, list) and len(one) == 2 and all(type(at) is int for at in one):
            begin, end = one
            if not 0 <= begin < end <= len(text):
                raise UserError(f"{place}: characters {begin} to {end} are marked of a text that has {len(text)}")
            spans.append((begin, end))
        else:
            raise UserError(f"{place}: {one!r} marks nothing; accepted is {FORM}")
    return spans


def token_weights(example: Example, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """float32, one for each token: 1 where it is of the first text and touches a span."""
    assert example.offsets is not None, "encode with offsets=True"
    begins, ends = np.where(np.array(example.types)[:, None] == 0, example.offsets, -1).T
    weights = np.zeros(len(example.ids), np.float32)
    for begin, end in spans:
        weights[(begins < ends) & (begins < end) & (ends > begin)] = 1.0
    return weights


def _occurrences(word: str, text: str) -> list[tuple[int, int]]:
    """Where a word stands in a text, not within a longer one; scripts without blanks have no such limits."""
    found = [match.span() for match in re.finditer(re.escape(word), text)]
    return [(begin, end) for begin, end in found if not (_inside(text, begin) or _inside(text, end))]


def _inside(text: str, at: int) -> bool:
    """Whether a word goes on from the character before `at` to the one behind."""
    around = text[max(at - 1, 0) : at + 1] if 0 < at < len(text) else ""
    return len(around) == 2 and all(sign.isalnum() and ord(sign) < 0x2E80 for sign in around)
