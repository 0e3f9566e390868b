"""Exact match and F1 of answers, as the published evaluations of SQuAD 1.1 and 2.0 compute them, and by characters.

In words: lower case, without ASCII punctuation and the articles a, an, the (Rajpurkar et al. 2016, section 6.1); F1 is
that of the bags of words. Chinese, Japanese, Thai and other scripts have no blanks between words: there each of their
characters counts as a word, other runs of letters as one, and no punctuation of Unicode counts (as in MLQA, Lewis et
al. 2020). Of several right answers the best one counts. CMRC's own F1 (Cui et al. 2019) is that of the longest common
piece of characters: `in_order`.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from espalier.data.scripts import script_of

Unit = Literal["words", "characters"]
UNSPACED = frozenset(("Han", "Japanese", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan", "Yi", "Javanese", "Balinese"))
"""Scripts (data.scripts) written without blanks between words."""
ARTICLES = re.compile(r"\b(a|an|the)\b")
SENTENCE = re.compile(r"[^.!?。！？\n]+[.!?。！？]*")
LOOKED_AT = 2**20
"""Characters by which the unit of a file is told."""


class Scores(NamedTuple):
    """Of each question, from 0 to 1."""

    exact_N: np.ndarray
    f1_N: np.ndarray


def unit_of(texts: Iterable[str]) -> Unit:
    """characters where more than half of the letters are of unspaced scripts."""
    letters: Counter[str] = Counter()
    left = LOOKED_AT
    for text in texts:
        letters.update(text[:left])
        left -= len(text)
        if left <= 0:
            break
    counts = {character: number for character, number in letters.items() if script_of(character)}
    unspaced = sum(number for character, number in counts.items() if script_of(character) in UNSPACED)
    return "characters" if 2 * unspaced > sum(counts.values()) else "words"


def units(text: str, unit: Unit) -> list[str]:
    """The words of an answer, or its characters, as they are compared."""
    text = text.lower()
    if unit == "words":
        text = "".join(character for character in text if character not in string.punctuation)
        return ARTICLES.sub(" ", text).split()
    found: list[str] = []
    for character in text:
        if character in string.punctuation or unicodedata.category(character).startswith("P"):
            continue
        found.append(f" {character} " if script_of(character) in UNSPACED else character)
    return "".join(found).split()


def score(prediction: str, answers: Sequence[str], unit: Unit, version: int) -> tuple[float, float]:
    """(exact match, F1) of an answer, the best over those that are right; none is right where there is none ("").

    version: 1 or 2, of SQuAD: the second one's script leaves out right answers of which nothing is left ("the").
    """
    gold = [units(answer, unit) for answer in answers]
    if version == 2:
        gold = [found for found in gold if found]
    gold, given = gold or [[]], units(prediction, unit)
    return max(float(given == right) for right in gold), max(_f1(given, right, version) for right in gold)


def in_order(prediction: str, answers: Sequence[str], unit: Unit) -> float:
    """F1 by the longest piece that both have, the best over the right answers (the script of CMRC 2018)."""
    given = units(prediction, unit)
    return max((_ratio(_longest_common(given, right := units(a, unit)), given, right) for a in answers), default=0.0)


def _f1(given: list[str], right: list[str], version: int) -> float:
    if version == 2 and not (given and right):
        return float(given == right)
    return _ratio(sum((Counter(given) & Counter(right)).values()), given, right)


def _ratio(same: int, given: list[str], right: list[str]) -> float:
    if not same:
        return 0.0
    precision, recall = same / len(given), same / len(right)
    return 2 * precision * recall / (precision + recall)


def _longest_common(a: list[str], b: list[str]) -> int:
    """Length of the longest run that both have."""
    longest, before = 0, [0] * (len(b) + 1)
    for x in a:
        row = [0] + [before[at] + 1 if x == y else 0 for at, y in enumerate(b)]
        longest, before = max(longest, *row), row
    return longest


def scores(predictions: Sequence[str], answers: Sequence[Sequence[str]], unit: Unit) -> Scores:
    """By the script of SQuAD 2.0 where some questions have no answer, else by that of 1.1."""
    version = version_of(answers)
    pairs = [score(given, right, unit, version) for given, right in zip(predictions, answers, strict=True)]
    exact_N, f1_N = np.array(pairs, np.float64).reshape(-1, 2).T
    return Scores(exact_N, f1_N)


def version_of(answers: Sequence[Sequence[str]]) -> int:
    return 1 if all(answers) else 2


def best_threshold(score_N: np.ndarray, answerable_N: np.ndarray, no_answer_N: np.ndarray) -> tuple[float, float]:
    """(threshold, score): the greatest mean score where no answer is given to what is above the threshold.

    score_N: of the answer to each question, were it given. no_answer_N: how sure it is that there is none. A threshold
    below all of them gives no answers; questions of one value are on one side of it.
    """
    order = np.argsort(no_answer_N, kind="stable")
    value_N = no_answer_N[order]
    # What giving the answer, too, adds to giving none.
    gain_N = np.where(answerable_N, score_N, score_N - 1.0)[order]
    total_N = np.count_nonzero(~answerable_N) + np.append(0.0, np.cumsum(gain_N))
    # Not within equal values.
    possible_N = np.append(True, np.append(value_N[1:] != value_N[:-1], True)) if len(value_N) else np.array([True])
    best = int(np.argmax(np.where(possible_N, total_N, -np.inf)))
    threshold = value_N[best - 1] if best else (value_N[0] - 1.0 if len(value_N) else 0.0)
    return float(threshold), float(total_N[best] / max(len(value_N), 1))


def metrics(predictions: Sequence[str], answers: Sequence[Sequence[str]], unit: Unit) -> dict[str, float]:
    """em and f1; where some questions have no answer, both also of those that have one and (no_answer) of the others.

    By characters also `f1_in_order`, CMRC's.
    """
    found = scores(predictions, answers, unit)
    result = {"em": float(found.exact_N.mean()), "f1": float(found.f1_N.mean())}
    if unit == "characters":
        asked = [(given, right) for given, right in zip(predictions, answers, strict=True) if right]
        result["f1_in_order"] = float(np.mean([in_order(*pair, unit) for pair in asked])) if asked else 0.0
    answerable_N = np.array([bool(right) for right in answers])
    if not answerable_N.all():
        if answerable_N.any():
            result["has_answer_em"] = float(found.exact_N[answerable_N].mean())
            result["has_answer_f1"] = float(found.f1_N[answerable_N].mean())
        result["no_answer_em"] = float(found.exact_N[~answerable_N].mean())
    return result


def at_best_thresholds(
    spans: Sequence[str], answers: Sequence[Sequence[str]], no_answer_N: np.ndarray, unit: Unit
) -> dict[str, float]:
    """best_em and best_f1: with the threshold that is best for the file itself, an upper bound.

    spans: the best span of each question.
    """
    answerable_N = np.array([bool(right) for right in answers])
    # As in the published script, where anything is an answer that is written, be it an article.
    silent_N = np.array([not span for span in spans], np.float64)
    found: dict[str, Any] = {}
    for name, score_N in zip(("em", "f1"), scores(spans, answers, unit), strict=True):
        score_N = np.where(answerable_N, score_N, silent_N)
        found[f"best_{name}_threshold"], found[f"best_{name}"] = best_threshold(score_N, answerable_N, no_answer_N)
    return found


def baseline(questions: Sequence[tuple[str, str]], answers: Sequence[Sequence[str]], unit: Unit) -> Mapping[str, float]:
    """baseline_em, baseline_f1 of what needs no model: the sentence that has the most words of the question.

    Where giving no answer to any question is better (by F1), of that.
    """
    guesses = [_sentence(question, context, unit) for question, context in questions]
    found = [metrics(given, answers, unit) for given in (guesses, [""] * len(guesses))]
    best = max(found, key=lambda each: each["f1"])
    return {f"baseline_{name}": best[name] for name in ("em", "f1")}


def _sentence(question: str, context: str, unit: Unit) -> str:
    """The first of the context's sentences that share the most words (characters) with the question."""
    asked = set(units(question, unit))
    return max(SENTENCE.findall(context) or [context], key=lambda sentence: len(asked & set(units(sentence, unit))))
