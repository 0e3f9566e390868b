"""Sentences of words as examples for the model: words cut into pieces, long sentences into windows that overlap.

Every word has pieces of its own, and is answered for in exactly one place: its first piece, in the window that shows
most of what stands around it. So no word of a long sentence is lost, in training as in prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from espalier.data.examples import Example
from espalier.data.token_tables import unspaced
from espalier.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Sentence(NamedTuple):
    words: Sequence[str]
    blanks: Sequence[bool]
    """Whether a blank stands before each word: some tokenizers write them as a part of it."""
    text: str | None = None
    """What the words were found in, if they were."""
    spans: Sequence[tuple[int, int]] = ()
    """The characters begin … end of each word there."""


class Window(NamedTuple):
    """A sentence, or a part of it."""

    example: Example
    sentence: int
    """Its number."""
    words: np.ndarray
    """Numbers of the words that are answered for here."""
    places: np.ndarray
    """Where their first pieces stand."""


def sentence_of_words(words: Sequence[str]) -> Sentence:
    """With blanks between the words, unless most letters are of a script that has none (Chinese, Japanese, Thai)."""
    letters = [character for word in words for character in word if character.isalpha()]
    spaced = 2 * sum(map(unspaced, letters)) <= len(letters)
    return Sentence(words, [spaced and number > 0 for number in range(len(words))])


def sentence_of_text(text: str) -> Sentence:
    """Its words: letters and digits in a row; in scripts without blanks, and of all other signs, each character."""
    from espalier.data.words import segmenter

    begins = np.flatnonzero(segmenter({})(text)).tolist()
    ends = [*begins, len(text)][1:]
    spans = [(begin, end) for begin, end in zip(begins, ends, strict=True) if text[begin:end].strip()]
    blanks = [begin > 0 and text[begin - 1].isspace() for begin, _ in spans]
    return Sentence([text[begin:end] for begin, end in spans], blanks, text, spans)


def encode_words(
    tokenizer: PreTrainedTokenizerFast,
    sentences: Sequence[Sentence],
    max_length: int,
    causal: bool,
    stride: int | None = None,
) -> list[Window]:
    """Windows of at most max_length tokens, those of a sentence one after the other.

    They stand between special tokens as in data.examples.encode_pairs. stride: tokens that neighbouring windows share,
    about; None = a quarter of them. A word of which the tokenizer makes nothing (a control character) is unknown.
    """
    from espalier.data.tokenizer import plain_backend, special_ids

    backend = plain_backend(tokenizer)
    specials = special_ids(tokenizer, need=("bos", "eos") if causal else ("cls", "sep"))
    first, last = (specials.bos, specials.eos) if causal else (specials.cls, specials.sep)
    assert first is not None and last is not None
    room = max_length - 2
    stride = room // 4 if stride is None else stride
    if room < 2 or stride > room // 2:
        raise UserError(
            f"stride={stride} is too large for rows of {max_length} tokens; windows may share at most half of them: "
            f"try {max(room // 4, 0)}"
        )
    unknown = specials.pad if tokenizer.unk_token_id is None else tokenizer.unk_token_id
    blank = _blank(backend)
    given = [
        [f"{blank * before}{word}" for word, before in zip(sentence.words, sentence.blanks, strict=True)]
        for sentence in sentences
    ]
    found = []
    for number, encoding in enumerate(backend.encode_batch(given, is_pretokenized=True, add_special_tokens=False)):
        count = len(sentences[number].words)
        ids_N, word_N = np.array(encoding.ids, np.int64), np.array(encoding.word_ids, np.int64)
        if empty := sorted(set(range(count)) - set(word_N.tolist())):
            at = np.searchsorted(word_N, empty)
            ids_N, word_N = np.insert(ids_N, at, unknown), np.insert(word_N, at, empty)
        # A word that is longer than a row is cut: its first piece is what counts.
        begin_W = np.searchsorted(word_N, np.arange(count))
        kept_N = np.arange(len(word_N)) - begin_W[word_N] < room
        ids_N, word_N = ids_N[kept_N], word_N[kept_N]
        begin_W = np.searchsorted(word_N, np.arange(count + 1))
        spans, owner_W = windows(np.diff(begin_W), room, stride)
        for window, (first_word, end_word) in enumerate(spans):
            begin, end = begin_W[first_word], begin_W[end_word]
            ids = [first, *ids_N[begin:end].tolist(), last]
            words = np.flatnonzero(owner_W == window)
            found.append(Window(Example(ids, [0] * len(ids)), number, words, begin_W[words] - begin + 1))
    return found


def windows(size_W: np.ndarray, room: int, stride: int) -> tuple[list[tuple[int, int]], np.ndarray]:
    """Which words first … end each window shows, and the window that answers for each word.

    size_W: pieces of each word, at most `room`, as many as a window has. stride: at least so many pieces of a window
    are shown again by the next, where words are no longer than that.
    """
    end_W = np.cumsum(size_W)
    begin_W, count = end_W - size_W, len(size_W)
    spans, first = [], 0
    while True:
        end = int(np.searchsorted(end_W, begin_W[first] + room, side="right")) if count else 0
        spans.append((first, end))
        if end == count:
            break
        # Words begin the next window from `stride` pieces before the end, as far as the next word fits into it too.
        shared = np.searchsorted(begin_W, end_W[end - 1] - stride, side="right") - 1
        first = int(max(shared, np.searchsorted(begin_W, end_W[end] - room), first + 1))
    context = np.full((len(spans), count), -1, np.int64)
    for row, (first, end) in enumerate(spans):
        before_W = begin_W[first:end] - begin_W[first] if first else np.full(end, room)
        behind_W = end_W[end - 1] - end_W[first:end] if end < count else np.full(end - first, room)
        context[row, first:end] = np.minimum(before_W, behind_W)
    return spans, context.argmax(0)


def _blank(backend) -> str:
    """What a word has before it where the text has a blank: nothing, if the tokenizer puts it there itself."""
    as_text = backend.encode("to be", add_special_tokens=False).ids
    as_words = backend.encode(["to", "be"], is_pretokenized=True, add_special_tokens=False).ids
    return "" if as_text == as_words else " "
