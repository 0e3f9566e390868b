"""BM25 (Robertson et al. 1994), with the weights of Lucene: the search that a ranker is compared with."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

K1, B = 1.2, 0.75
"""How soon a word said again counts nothing more, and how much long texts are marked down (Lucene's defaults)."""
CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
WORD = re.compile(rf"[{CJK}]+|[^\W{CJK}]+")
"""A run of signs of scripts without blanks, or a word."""
UNSPACED = re.compile(rf"[{CJK}]")


def words(text: str) -> Iterator[str]:
    """Words in lower case; of scripts without blanks (Chinese, Japanese) every two neighbours, as Lucene has them."""
    for found in WORD.findall(text.lower()):
        if UNSPACED.match(found) and len(found) > 1:
            yield from (found[at : at + 2] for at in range(len(found) - 1))
        else:
            yield found


class BM25:
    """The texts by their words: of each, in which texts it is and what it adds to their scores."""

    def __init__(self, texts: Sequence[str]):
        numbers: dict[str, int] = {}
        word_P, text_P, count_P = [], [], []
        sizes_N = np.zeros(len(texts))
        for number, text in enumerate(texts):
            counts = Counter(words(text))
            sizes_N[number] = counts.total()
            word_P += [numbers.setdefault(word, len(numbers)) for word in counts]
            count_P += counts.values()
            text_P += [number] * len(counts)
        word_P, self._text_P = np.array(word_P, np.int64), np.array(text_P, np.int32)
        frequency_P = np.array(count_P, np.float64)
        order_P = np.argsort(word_P, kind="stable")
        texts_W = np.bincount(word_P, minlength=len(numbers))
        idf_W = np.log1p((len(texts) - texts_W + 0.5) / (texts_W + 0.5))
        length_N = sizes_N / max(sizes_N.mean(), 1.0) if len(texts) else sizes_N
        norm_P = K1 * (1 - B + B * length_N[self._text_P])
        weight_P = idf_W[word_P] * frequency_P / (frequency_P + norm_P)
        self._text_P, self._weight_P = self._text_P[order_P], weight_P[order_P]
        self._numbers, self._ends_W, self._count = numbers, np.cumsum(texts_W), len(texts)

    def scores(self, query: str) -> np.ndarray:
        """Of every text, float64 [N]; 0 where it has no word of the query."""
        scores_N = np.zeros(self._count)
        for word, times in Counter(words(query)).items():
            if (number := self._numbers.get(word)) is not None:
                part = slice(self._ends_W[number - 1] if number else 0, self._ends_W[number])
                scores_N[self._text_P[part]] += times * self._weight_P[part]
        return scores_N

    def first(self, query: str, depth: int) -> np.ndarray:
        """Numbers of the best texts that have a word of the query, at most `depth`, the best first."""
        scores_N = self.scores(query)
        found = np.flatnonzero(scores_N > 0)
        if len(found) > depth:
            found = found[np.argpartition(-scores_N[found], depth - 1)[:depth]]
        return found[np.argsort(-scores_N[found], kind="stable")]
