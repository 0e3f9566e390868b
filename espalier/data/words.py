"""Where words begin in text, also in scripts without blanks: there by segmenters, which are optional packages.

    Chinese                     rjieba (jieba's dictionary and its model of unknown words)
    Japanese                    SudachiPy, the short units of UniDic (mode A), as Japanese BERT models are trained on
    Thai, Lao, Khmer, Burmese   icu4py (ICU's dictionaries; Unicode Standard Annex 29)

Elsewhere letters, digits and their marks in a row are a word, and every other character is one; in a script without
blanks whose segmenter is not there, each character is, so that each token is.

Tokens follow: a token begins a word where a word begins behind the end of the token before it and not behind its own
first character that is no blank. So words that share a token are hidden together, the tokens of one character belong
together, and a token of nothing but blanks is a word. Words never reach over a line break.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
import unicodedata
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from espalier.data.token_tables import UNSPACED
from espalier.errors import UserError

EACH_TOKEN = "each token"
"""Instead of a segmenter's name: none is installed, and each token is its own word."""
MIN_SHARE = 0.01
"""Of the letters of a text, for a script to count as found."""
KANA_SHARE = 0.1
"""Of Han and kana in a document, from which on it is Japanese."""
MAX_LINE = 4000
"""Characters that a segmenter is given at once; SudachiPy takes at most 49,149 bytes."""

Segment = Callable[[str], np.ndarray]
"""Text → bool [characters]: where words begin."""


class Segmenter(NamedTuple):
    """A package that finds the words of a script."""

    packages: tuple[str, ...]
    """What to install; the versions of all of them decide the words."""
    load: Callable[[], Callable[[str], list[int]]]
    """() → (line → the lengths of its words in characters, which add up to the line)."""


def _rjieba():
    import rjieba

    return lambda line: [len(word) for word in rjieba.cut(line, True)]


def _sudachi():
    import sudachipy

    tokenizer = sudachipy.Dictionary(dict="small").tokenizer(mode=sudachipy.SplitMode.A)
    return lambda line: [word.end() - word.begin() for word in tokenizer.tokenize(line)]


def _icu():
    from icu4py.breakers import WordBreaker

    return lambda line: [len(word) for word in WordBreaker(line, "th")]


CHINESE, JAPANESE, SOUTH_EAST = "Chinese", "Japanese", "Thai, Lao, Khmer, Burmese"
SEGMENTERS = {
    CHINESE: Segmenter(("rjieba",), _rjieba),
    JAPANESE: Segmenter(("SudachiPy", "SudachiDict-small"), _sudachi),
    SOUTH_EAST: Segmenter(("icu4py",), _icu),
}

_HAN = "\u2e80-\u2fdf\u3005-\u3007\u3400-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_KANA = "\u3031-\u3035\u3041-\u30ff\u31f0-\u31ff\uff66-\uff9f\U0001aff0-\U0001b16f"
_SOUTH_EAST = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u19e0-\u19ff\ua9e0-\ua9ff\uaa60-\uaa7f"
# What a character is to the words around it.
BLANK, OTHER, LETTER, HAN, KANA, THAI, ALONE = range(7)


def find_segmenters(samples: Iterable[list[str]], required: bool) -> dict[str, str]:
    """Script without blanks → its segmenter with version, or EACH_TOKEN; {} where there is no such script or segmenter.

    samples: documents of each source. required: UserError where the segmenter of a script is missing; else a line says
    so.
    """
    of_sources = [script_shares(texts) for texts in samples]
    shares = {script: max(of_source[script] for of_source in of_sources) for script in SEGMENTERS}
    found = {script: _version(SEGMENTERS[script]) for script, share in shares.items() if share >= MIN_SHARE}
    if required and not found:
        print("whole words: a sample of the text shows no script without blanks; no segmenter is needed", flush=True)
    for script in (script for script, version in found.items() if version is None):
        advice = f"`./launch.sh python -m pip install {' '.join(SEGMENTERS[script].packages)}`"
        here = f"{script} text ({shares[script]:.0%} of the letters)"
        if required:
            raise UserError(f"{here} needs a segmenter that is not here; {advice}, or leave out --data.words")
        print(f"whole words: {here}: each token will be its own word; {advice} finds the words", flush=True)
    return {script: version or EACH_TOKEN for script, version in found.items()} if any(found.values()) else {}


def check_segmenters(words: dict[str, str]) -> None:
    """UserError unless the segmenters of a resumed run are installed, in the versions it began with."""
    for script, began in words.items():
        here = None if began == EACH_TOKEN else _version(SEGMENTERS[script])
        if began != EACH_TOKEN and here != began:
            packages = " ".join(part.replace(" ", "==") for part in began.split(", "))
            raise UserError(
                f"the run found the words of {script} text with {began}, and {here or 'no segmenter'} is here; "
                f"`./launch.sh python -m pip install {packages}`, or give another --run-dir"
            )


def installed() -> dict[str, str | None]:
    """The segmenters that are here, with their versions."""
    return {script: _version(segmenter) for script, segmenter in SEGMENTERS.items()}


def script_shares(texts: Iterable[str]) -> dict[str, float]:
    """The parts of the letters that are Chinese, Japanese and of South-East Asia."""
    letters, counts = 0, dict.fromkeys(SEGMENTERS, 0)
    for text in texts:
        letters += sum(map(str.isalpha, text))
        han, kana, thai = (len(re.findall(f"[{group}]", text)) for group in (_HAN, _KANA, _SOUTH_EAST))
        counts[JAPANESE if _japanese(han, kana) else CHINESE] += han
        counts[JAPANESE] += kana
        counts[SOUTH_EAST] += thai
    return {script: min(count / max(letters, 1), 1.0) for script, count in counts.items()}


def segmenter(words: dict[str, str]) -> Segment:
    """Where the words of a document begin. words: of `find_segmenters`."""
    loaded = {script: SEGMENTERS[script].load() for script, version in words.items() if version != EACH_TOKEN}

    def starts(text: str) -> np.ndarray:
        kind_C, mark_C = _kinds(text)
        starts_C = np.ones(len(text), bool)
        starts_C[1:] = (kind_C[1:] != LETTER) | (kind_C[:-1] != LETTER)
        han, kana = (int(np.count_nonzero(kind_C == kind)) for kind in (HAN, KANA))
        # Where no Chinese text was found, a Japanese heading without kana is no Chinese one.
        of_han = JAPANESE if _japanese(han, kana) or CHINESE not in words else CHINESE
        for script, kinds in ((of_han, (HAN, KANA)), (SOUTH_EAST, (THAI,))):
            mine_C = np.isin(kind_C, kinds)
            if script in loaded and mine_C.any():
                # Letters right behind are a part of the word where the segmenter says so (卡拉OK).
                touched_C = mine_C.copy()
                touched_C[1:] |= mine_C[:-1] & (kind_C[1:] == LETTER)
                found_C = _segmented(text, kind_C, mine_C, loaded[script])
                starts_C[touched_C] = found_C[touched_C]
        starts_C[1:][mark_C[1:] & (kind_C[:-1] != BLANK)] = False
        return starts_C

    return starts


def token_starts(text: str, ids: np.ndarray, offsets: np.ndarray, segment: Segment, blank_V: np.ndarray) -> np.ndarray:
    """bool [N]: which tokens of a document begin a word.

    offsets: [N,2] characters of the text that each token stands for. blank_V: data.token_tables.blank_table.
    """
    if not len(ids):
        return np.zeros(0, bool)
    size = len(text)
    kind_C, _ = _kinds(text)
    place_C = np.where(kind_C == BLANK, size, np.arange(size))
    letter_C = np.append(np.minimum.accumulate(place_C[::-1])[::-1], size)
    begin_N, end_N = offsets.T
    first_N = letter_C[begin_N]
    blank_N = first_N >= end_N
    first_N = np.where(blank_N, begin_N, first_N)
    # The ▁ that is put before a text has the place of the first letter, and takes nothing of it.
    added_N = blank_V[ids] & ~blank_N
    before_N = np.maximum.accumulate(np.concatenate([[0], np.where(added_N, 0, end_N)]))[:-1]
    sums = np.concatenate([[0], np.cumsum(segment(text))])
    starts_N = sums[np.minimum(first_N + 1, size)] > sums[np.minimum(before_N, size)]
    starts_N[0] = True
    return starts_N


def _segmented(text: str, kind_C: np.ndarray, mine_C: np.ndarray, lengths: Callable[[str], list[int]]) -> np.ndarray:
    """Where words begin, by the segmenter in each line that holds any of its characters."""
    found_C = np.ones(len(text), bool)
    sums = np.concatenate([[0], np.cumsum(mine_C)])
    for line in re.finditer(r"[^\n]+", text):
        begin, end = line.span()
        while begin < end:
            cut = min(end, begin + MAX_LINE)
            if cut < end:
                between = np.flatnonzero(kind_C[begin:cut] <= OTHER)
                cut = begin + int(between[-1]) + 1 if len(between) else cut
            if sums[cut] > sums[begin]:
                ends = np.cumsum(lengths(text[begin:cut]))
                assert ends[-1] == cut - begin
                found_C[begin:cut] = False
                found_C[begin] = True
                found_C[begin + ends[:-1]] = True
            begin = cut
    return found_C


def _japanese(han: int, kana: int) -> bool:
    return kana > 0 and kana >= KANA_SHARE * (han + kana)


def _version(segmenter: Segmenter) -> str | None:
    """The packages with their versions; None where one is missing."""
    try:
        return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in segmenter.packages)
    except importlib.metadata.PackageNotFoundError:
        return None


def _kinds(text: str) -> tuple[np.ndarray, np.ndarray]:
    """What each character is, and which are marks; those are what the character before them is."""
    kinds, marks = _tables()
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    mark_C = marks[codes]
    base_C = np.maximum.accumulate(np.where(mark_C, 0, np.arange(len(codes))))
    return kinds[codes[base_C]], mark_C


@functools.lru_cache(maxsize=1)
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """uint8 and bool, by code point: BLANK … ALONE; whether it is a mark."""
    categories = [unicodedata.category(chr(code)) for code in range(0x110000)]
    kinds = np.array([LETTER if category[0] in "LMN" else OTHER for category in categories], np.uint8)
    kinds[[code for code in range(0x3001) if chr(code).isspace()]] = BLANK
    for first, last in UNSPACED:
        kinds[first : last + 1] = ALONE
    for kind, group in ((HAN, _HAN), (KANA, _KANA), (THAI, _SOUTH_EAST)):
        for first, last in re.findall("(.)-(.)", group):
            kinds[ord(first) : ord(last) + 1] = kind
    return kinds, np.array([category[0] == "M" for category in categories])
