"""Scripts of a text and how a tokenizer writes each: the share of [UNK], and a sentence as tokens.

Python knows no script of a character; its name begins with it (HIRAGANA LETTER KA).
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

READ = 2**24
"""Characters that are looked at."""
SENTENCES = 2000
"""Sentences of each script that are tokenized."""
SHOWN = 24
"""Tokens of a sentence that are shown."""
LEAST = 20
"""Fewer letters of a script are a word in another text."""
SENTENCE = re.compile(r"[^\n.!?。！？।]{8,}[.!?。！？।]?")
NAMES = {"CJK": "Han", "IDEOGRAPHIC": "Han"} | dict.fromkeys(("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"), "Japanese")
WIDTHS = frozenset(("FULLWIDTH", "HALFWIDTH", "MODIFIER", "MATHEMATICAL", "COMBINING", "SUPERSCRIPT", "SUBSCRIPT"))


class ScriptSample(NamedTuple):
    """What a tokenizer makes of the text in one script."""

    script: str
    letters: int
    unknown: float
    """Share of [UNK] among the tokens of its sentences."""
    tokens: list[str]
    """Of one of its sentences, as they stand there; those that share a character are shown once, together."""


def samples(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> list[ScriptSample]:
    """A sample for each script of the first READ characters, the most frequent script first."""
    from espalier.data.tokenizer import plain_backend

    letters: Counter[str] = Counter()
    sentences: dict[str, list[str]] = {}
    for sentence in _sentences(texts):
        counts: Counter[str] = Counter()
        for character, number in Counter(sentence).items():
            if script := script_of(character):
                counts[script] += number
        if not counts:
            continue
        # Japanese is written with Han characters too.
        script = "Japanese" if counts["Japanese"] else counts.most_common(1)[0][0]
        letters[script] += sum(counts.values())
        if len(sentences.setdefault(script, [])) < SENTENCES:
            sentences[script].append(sentence)
    backend = plain_backend(tokenizer)
    unknown = None if tokenizer.unk_token is None else backend.token_to_id(str(tokenizer.unk_token))
    found = []
    for script, count in letters.most_common():
        if count < LEAST:
            continue
        encodings = backend.encode_batch(sentences[script], add_special_tokens=False)
        ids = [index for encoding in encodings for index in encoding.ids]
        shown = max(encodings, key=lambda encoding: min(len(encoding.ids), SHOWN))
        sentence = sentences[script][encodings.index(shown)]
        share = ids.count(unknown) / max(len(ids), 1) if unknown is not None else 0.0
        found.append(ScriptSample(script, count, share, list(_shown(shown, sentence, unknown))[:SHOWN]))
    return found


def _shown(encoding, sentence: str, unknown: int | None) -> Iterator[str]:
    """The tokens as what they stand for in the sentence, WordPiece's ## kept; parts of one character together."""
    last = (-1, -1)
    for index, token, (start, end) in zip(encoding.ids, encoding.tokens, encoding.offsets, strict=True):
        if (start, end) == last and end - start == 1:
            continue
        last = (start, end)
        text = sentence[start:end].strip()
        if index == unknown:
            yield f"[UNK]({text})"
        elif token.startswith("##"):
            yield token
        elif text:
            yield text


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    left = READ
    for text in texts:
        for match in SENTENCE.finditer(text[:left]):
            yield match[0].strip()
        left -= len(text)
        if left <= 0:
            return


@functools.cache
def script_of(character: str) -> str | None:
    """The script of a letter or a mark ("Latin", "Han", "Japanese" for kana, "Thai"); None for anything else."""
    if unicodedata.category(character)[0] not in "LM":
        return None
    words = [word for word in unicodedata.name(character, "").split() if word not in WIDTHS]
    return NAMES.get(words[0], words[0].capitalize()) if words else None
