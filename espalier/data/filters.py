"""Quality filters of documents, each optional, with counts of what it dropped.

Duplicates cost a model more than their share (Lee et al. 2022, "Deduplicating training data makes language models
better"). Near-duplicates are found by MinHash (Broder 1997) over word 5-grams, with candidates from bands of hashes
(Leskovec et al., "Mining of massive datasets", ch. 3). Text that a tokenizer cuts into very small pieces is mostly not
natural language (Geiping and Goldstein 2022, "Cramming": at most 0.3 tokens a character).

`measure` looks at one document, `decide` at the measures of all documents in order. The decisions do not depend on how
many machines took the measures.
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from espalier.errors import UserError
from espalier.files import hash_of_text

if TYPE_CHECKING:
    import numpy as np

REASONS = ("", "characters", "script", "exact duplicate", "near-duplicate")
"""Why a document is dropped, in the order of the filters; the first entry stands for documents that are kept."""
SCRIPTS = (
    "Latin Greek Cyrillic Armenian Hebrew Arabic Devanagari Bengali Gurmukhi Gujarati Tamil Telugu Kannada Malayalam "
    "Sinhala Thai Lao Tibetan Myanmar Georgian Ethiopic Khmer Mongolian Hangul Hiragana Katakana Han"
).split()
HASHES = 128
SHINGLE = 5
"""Words that are compared together; characters where a text has hardly a blank."""


@dataclass(frozen=True)
class FilterConfig:
    """Which documents are dropped before tokenization. All filters are off by default."""

    exact: bool = False
    """Keep only the first of equal texts."""
    near: float | None = None
    """Keep only the first of texts whose word 5-grams have this Jaccard similarity or more, for instance 0.8."""
    min_characters: int | None = None
    """Drop shorter documents."""
    max_characters: int | None = None
    """Drop longer documents."""
    script: str | None = None
    """Keep documents whose letters are mostly of this script: Latin, Cyrillic, Han …"""
    script_share: float = 0.5
    """The part of the letters that must be of that script."""
    max_tokens_per_character: float | None = None
    """Drop documents that the tokenizer cuts into more tokens a character, for instance 0.3."""

    def __post_init__(self):
        if self.near is not None and not 0.3 <= self.near < 1:
            raise UserError(f"data.filters.near={self.near} must lie between 0.3 and 1; try 0.8 (exact: --…exact)")
        for name in ("min_characters", "max_characters"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"data.filters.{name}={value} must be at least 1; leave it out to keep all")
        if (self.min_characters or 0) > (self.max_characters or float("inf")):
            raise UserError(
                f"data.filters.min_characters={self.min_characters} is more than max_characters={self.max_characters}"
            )
        if self.script is not None and self.script.title() not in SCRIPTS:
            raise UserError(f"data.filters.script={self.script!r} is not known; there are {', '.join(SCRIPTS)}")
        if not 0 < self.script_share <= 1:
            raise UserError(f"data.filters.script_share={self.script_share} must lie between 0 and 1, for instance 0.5")
        limit = self.max_tokens_per_character
        if limit is not None and limit <= 0:
            raise UserError(f"data.filters.max_tokens_per_character={limit} must be above 0, for instance 0.3")

    @property
    def active(self) -> bool:
        """Whether any filter looks at texts before they are tokenized."""
        return self.exact or any(
            value is not None for value in (self.near, self.min_characters, self.max_characters, self.script)
        )


class Measure(NamedTuple):
    """What the filters need to know about a document."""

    reason: int
    """Index in REASONS: why it is dropped regardless of other documents; 0 = it may be kept."""
    exact: int
    """64 bits of the SHA-256 of its text."""
    signature: np.ndarray | None
    """uint32 [HASHES]: its MinHash, where near-duplicates are looked for."""


class Decisions(NamedTuple):
    """Which documents are dropped."""

    dropped: np.ndarray
    """int64: their numbers among all documents, from 0, rising."""
    reasons: np.ndarray
    """uint8: why each is dropped, index in REASONS."""
    counts: dict[str, int]
    """How many are dropped for each reason."""
    documents: int
    """How many there were."""

    def save(self, file: IO[bytes]) -> None:
        import numpy as np

        np.savez(file, dropped=self.dropped, reasons=self.reasons, documents=self.documents)

    @staticmethod
    def load(path: Path) -> Decisions | None:
        """None where the file is not there or not whole."""
        import zipfile

        import numpy as np

        try:
            with open(path, "rb") as content, np.load(content) as file:
                return _decisions(file["dropped"], file["reasons"], int(file["documents"]))
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
            return None


def measure(text: str, config: FilterConfig) -> Measure:
    """Everything about a document that the decisions need; pure."""
    reason = 0
    if not (config.min_characters or 0) <= len(text) <= (config.max_characters or len(text)):
        reason = REASONS.index("characters")
    elif config.script and script_share(text, config.script) < config.script_share:
        reason = REASONS.index("script")
    exact = hash_of_text(text)
    return Measure(reason, exact, minhash(text) if config.near and not reason else None)


def decide(measures: Iterable[Measure], config: FilterConfig) -> Decisions:
    """Which documents are dropped, alone or as duplicates of an earlier one. Memory: about 600 bytes a document."""
    import numpy as np

    dropped, reasons, number = [], [], -1
    exact: set[int] = set()
    near = _Near(config.near) if config.near else None
    for number, one in enumerate(measures):
        reason = one.reason
        if not reason and config.exact:
            reason = REASONS.index("exact duplicate") if one.exact in exact else 0
        if not reason and near:
            assert one.signature is not None
            reason = REASONS.index("near-duplicate") if near.seen(one.signature) else 0
        if reason:
            dropped.append(number)
            reasons.append(reason)
        elif config.exact:
            exact.add(one.exact)
    return _decisions(np.array(dropped, np.int64), np.array(reasons, np.uint8), number + 1)


def script_share(text: str, script: str) -> float:
    """The part of the letters that is of this script; 0 where there are no letters."""
    import numpy as np

    codes, counts = np.unique(np.frombuffer(text.encode("utf-32-le"), np.uint32), return_counts=True)
    scripts = [_script(code) for code in codes.tolist()]
    letters = sum(count for count, found in zip(counts.tolist(), scripts, strict=True) if found)
    mine = sum(count for count, found in zip(counts.tolist(), scripts, strict=True) if found == script.title())
    return mine / letters if letters else 0.0


def minhash(text: str) -> np.ndarray:
    """uint32 [HASHES]: the least value of each hash function over the text's shingles.

    The part of equal values in two signatures estimates the Jaccard similarity of their shingles. Case, punctuation and
    blanks do not matter.
    """
    import numpy as np

    words = re.findall(r"\w+", text.lower())
    joined = "".join(words)
    # Where blanks are rare, as in Chinese or Thai, words are no measure.
    units = list(joined) if len(joined) > 12 * max(len(words), 1) else words
    codes = np.array([_word_hash(unit) for unit in units] or [0], np.uint64)
    with np.errstate(over="ignore"):
        shingles = np.zeros(max(len(codes) - SHINGLE + 1, 1), np.uint64)
        for at in range(min(SHINGLE, len(codes))):
            shingles = shingles * np.uint64(0x9E3779B97F4A7C15) + codes[at : at + len(shingles)]
        shingles = np.unique(_mixed(shingles))
        least = np.full(HASHES, 2**64 - 1, np.uint64)
        salts = _mixed(np.arange(1, HASHES + 1, dtype=np.uint64))
        for start in range(0, len(shingles), 4096):
            part = shingles[start : start + 4096]
            # Odd factors permute 64-bit numbers; the high half of the product is what is mixed best.
            least = np.minimum(least, ((part[:, None] ^ salts) * (salts | np.uint64(1))).min(axis=0))
    return (least >> np.uint64(32)).astype(np.uint32)


class _Near:
    """The signatures of the documents that stay, by their bands."""

    def __init__(self, threshold: float):
        import numpy as np

        self._threshold = threshold
        # Pairs at the threshold should meet in a band nearly always: 1 - (1 - s^rows)^bands is above 99 %.
        sizes = [rows for rows in (1, 2, 4, 8, 16) if (1 - threshold**rows) ** (HASHES // rows) < 0.01]
        self._rows = max(sizes, default=1)
        self._bands: list[dict[bytes, list[int]]] = [{} for _ in range(HASHES // self._rows)]
        self._kept = np.empty((1024, HASHES), np.uint32)
        self._count = 0

    def seen(self, signature: np.ndarray) -> bool:
        """Whether a text as near as the threshold has stayed; if not, this one stays."""
        import numpy as np

        parts = signature.reshape(len(self._bands), self._rows)
        keys = [part.tobytes() for part in parts]
        candidates = sorted(
            {number for band, key in zip(self._bands, keys, strict=True) for number in band.get(key, ())}
        )
        if candidates and ((self._kept[candidates] == signature).mean(axis=1) >= self._threshold).any():
            return True
        if self._count == len(self._kept):
            self._kept = np.concatenate([self._kept, np.empty_like(self._kept)])
        self._kept[self._count] = signature
        for band, key in zip(self._bands, keys, strict=True):
            band.setdefault(key, []).append(self._count)
        self._count += 1
        return False


def _decisions(dropped: np.ndarray, reasons: np.ndarray, documents: int) -> Decisions:
    counts = {reason: int((reasons == number).sum()) for number, reason in enumerate(REASONS) if number}
    return Decisions(dropped, reasons, {reason: count for reason, count in counts.items() if count}, documents)


@functools.lru_cache(2**16)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def _mixed(z: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014)."""
    import numpy as np

    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@functools.lru_cache(2**16)
def _script(code: int) -> str | None:
    """The script of a letter, by the first word of its Unicode name; None for what is no letter."""
    character = chr(code)
    if not unicodedata.category(character).startswith("L"):
        return None
    name = unicodedata.name(character, "").split(" ")[0].split("-")[0].title()
    return "Han" if name == "Cjk" else name
