"""How good predicted tags are: entities found, or words tagged right; and a baseline beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from espalier.intervals import ratio_interval
from espalier.predict.tags import Entity, entities, strict_entities

Tags = Sequence[Sequence[str]]
"""Of each sentence, of each of its words."""
STRICT = ("IOB2", "IOBES", "IOB1")
"""Schemes that can be demanded strictly."""


def metrics(right: Tags, predicted: Tags, scheme: str | None) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Figures of the whole, and a row for each type of entity, or each tag, sorted.

    Of entities: precision, recall and f1 as conlleval counts them (predict.tags), micro-averaged; strict_f1, where the
    scheme can be demanded; accuracy over words. Else: accuracy, and macro_f1 over the tags that are there. Rows: name,
    precision, recall, f1, right (how many there are) and predicted. What has nothing to be divided by is 0.
    """
    total = sum(map(len, right))
    correct = sum(
        a == b for ours, theirs in zip(right, predicted, strict=True) for a, b in zip(ours, theirs, strict=True)
    )
    accuracy = correct / max(total, 1)
    if scheme is None:
        rows = _rows(right, predicted, lambda tags: [Entity(tag, at, at + 1) for at, tag in enumerate(tags)])
        macro = sum(row["f1"] for row in rows) / max(len(rows), 1)
        return {"accuracy": accuracy, "macro_f1": macro}, rows
    rows = _rows(right, predicted, entities)
    found = _whole(rows)
    if scheme in STRICT:
        found["strict_f1"] = _whole(_rows(right, predicted, lambda tags: strict_entities(tags, scheme)))["f1"]
    return found | {"accuracy": accuracy}, rows


def intervals(right: Tags, predicted: Tags, scheme: str | None) -> dict[str, list[float]]:
    """95 % intervals, over sentences drawn anew, of accuracy and, of entities, of f1; none of a single sentence."""
    if len(right) < 2:
        return {}
    pairs = list(zip(right, predicted, strict=True))
    correct_N = [sum(a == b for a, b in zip(*pair, strict=True)) for pair in pairs]
    found = {"accuracy": ratio_interval(correct_N, [len(ours) for ours in right])}
    if scheme is not None:
        sets = [(set(entities(ours)), set(entities(theirs))) for ours, theirs in pairs]
        with np.errstate(invalid="ignore"):
            found["f1"] = ratio_interval(
                [2 * len(ours & theirs) for ours, theirs in sets], [len(ours) + len(theirs) for ours, theirs in sets]
            )
    # Where there is no entity at all, F1 has none.
    return {f"{name}_interval": list(bounds) for name, bounds in found.items() if np.isfinite(bounds).all()}


class MostFrequent:
    """The baseline: each word gets the tag that it has most often in training, a new word the most frequent of all."""

    def __init__(self, words: Sequence[Sequence[str]], tags: Tags):
        counts: dict[str, Counter[str]] = {}
        for sentence, its in zip(words, tags, strict=True):
            for word, tag in zip(sentence, its, strict=True):
                counts.setdefault(word, Counter())[tag] += 1
        every = Counter(tag for its in tags for tag in its)
        self._tags = {word: _first(count) for word, count in counts.items()}
        self._other = _first(every)

    def tags(self, words: Sequence[Sequence[str]]) -> list[list[str]]:
        return [[self._tags.get(word, self._other) for word in sentence] for sentence in words]


def one_tag(right: Tags, predicted: Tags) -> str | None:
    """A warning where every word gets the same tag, though there are others; None else."""
    found = {tag for tags in predicted for tag in tags}
    if len(found) > 1 or len({tag for tags in right for tag in tags}) < 2:
        return None
    return (
        f"warning: every validation word is tagged {found.pop()!r}: nothing was learnt; try more steps, another "
        "learning rate (--optimizer.learning-rate) or more training sentences"
    )


def _rows(right: Tags, predicted: Tags, spans: Callable[[Sequence[str]], list[Entity]]) -> list[dict[str, Any]]:
    there, guessed, hit = Counter[str](), Counter[str](), Counter[str]()
    for ours, theirs in zip(right, predicted, strict=True):
        wanted, found = set(spans(ours)), set(spans(theirs))
        for counter, group in ((there, wanted), (guessed, found), (hit, wanted & found)):
            counter.update(entity.type for entity in group)
    return [{"name": name, **_scores(hit[name], guessed[name], there[name])} for name in sorted(there | guessed)]


def _whole(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    hit = sum(row["hit"] for row in rows)
    found = _scores(hit, sum(row["predicted"] for row in rows), sum(row["right"] for row in rows))
    return {name: found[name] for name in ("f1", "precision", "recall")}


def _scores(hit: int, predicted: int, right: int) -> dict[str, Any]:
    return {
        "precision": hit / predicted if predicted else 0.0,
        "recall": hit / right if right else 0.0,
        "f1": 2 * hit / (predicted + right) if hit else 0.0,
        "right": right,
        "predicted": predicted,
        "hit": hit,
    }


def _first(counts: Counter[str]) -> str:
    """The most frequent tag; of equals the first by name."""
    return min(counts, key=lambda tag: (-counts[tag], tag))
