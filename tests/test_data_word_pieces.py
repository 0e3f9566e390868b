"""Words as pieces and windows: each word is answered for once, with as much around it as any window shows."""

import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from espalier.data.tokenizer import plain_backend, special_ids
from espalier.data.train_tokenizer import train_tokenizer
from espalier.data.word_pieces import encode_words, sentence_of_text, sentence_of_words, windows
from espalier.errors import UserError

ENGLISH = "the quick brown fox jumps over the lazy dog in 1984, doesn't it? "
CHINESE = "我在北京工作。他住在上海，二〇〇八年来的。"


@functools.cache
def tokenizer(kind: str):
    return train_tokenizer([ENGLISH + CHINESE] * 20, kind, 400, for_masked_lm=kind == "wordpiece")


@given(st.lists(st.integers(1, 6), max_size=30), st.integers(6, 12), st.integers(0, 6))
def test_windows_lose_no_word(sizes, room, stride):
    stride = min(stride, room // 2)
    spans, owner_W = windows(np.array(sizes, int), room, stride)
    begins = np.cumsum([0, *sizes])
    assert spans[0][0] == 0 and spans[-1][1] == len(sizes)
    assert all(a < c and b < d and c <= b for (a, b), (c, d) in zip(spans, spans[1:], strict=False))
    assert all(begins[end] - begins[first] <= room for first, end in spans)
    assert len(spans) == 1 or begins[-1] > room

    def context(word, first, end):
        """Pieces that a window shows on the poorer side of a word; none is missing at the ends of the sentence."""
        before = begins[word] - begins[first] if first else 10**6
        behind = begins[end] - begins[word + 1] if end < len(sizes) else 10**6
        return min(before, behind)

    for word, owner in enumerate(owner_W):
        shown = [context(word, *span) if span[0] <= word < span[1] else -1 for span in spans]
        assert shown[owner] == max(shown) >= 0


def test_neighbouring_windows_share_as_much_as_asked():
    spans, owner_W = windows(np.ones(30, int), 10, 4)
    assert spans == [(0, 10), (6, 16), (12, 22), (18, 28), (24, 30)]
    assert owner_W.tolist() == [0] * 8 + [1] * 6 + [2] * 6 + [3] * 6 + [4] * 4


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
@pytest.mark.parametrize("max_length", [16, 600])
def test_every_word_of_a_sentence_has_a_place(kind, max_length):
    made = tokenizer(kind)
    causal = kind == "bpe"
    words = (ENGLISH * 4).split() + ["", "\x00", "\u200b", "x" * 90, "👍🏽"]
    sentences = [
        sentence_of_words(words),
        sentence_of_words(list(CHINESE)),
        sentence_of_words([]),
        sentence_of_words("a"),
    ]
    found = encode_words(made, sentences, max_length, causal, 4)
    for number, sentence in enumerate(sentences):
        mine = [window for window in found if window.sentence == number]
        assert sorted(word for window in mine for word in window.words) == list(range(len(sentence.words)))
        assert len(mine) == 1 or max_length == 16
    specials = special_ids(made)
    first, last = (specials.bos, specials.eos) if causal else (specials.cls, specials.sep)
    for window in found:
        ids = window.example.ids
        assert len(ids) <= max_length and ids[0] == first and ids[-1] == last
        assert all(0 < place < len(ids) - 1 for place in window.places) and (np.diff(window.places) > 0).all()


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_pieces_are_those_of_the_text(kind):
    """Where a text has blanks between its words, the model sees what it saw in pretraining, and first pieces begin
    where the tokenizer's offsets say that the words do."""
    text = "the quick fox jumps over 1984 dogs"
    (window,) = encode_words(tokenizer(kind), [sentence_of_words(text.split())], 64, kind == "bpe")
    encoding = plain_backend(tokenizer(kind)).encode(text, add_special_tokens=False)
    assert list(window.example.ids[1:-1]) == encoding.ids
    # A piece that is but the blank before a word is that word's first.
    befores = [max(0, text.index(word) - 1) for word in text.split()]
    covering = [next(at for at, (_, end) in enumerate(encoding.offsets) if end > before) for before in befores]
    assert (window.places - 1).tolist() == covering


def test_words_of_a_text():
    sentence = sentence_of_text("Ann, aged 9, n'est pas là!\n在Paris 住。 ไทยค่ะ")
    assert sentence.words[:12] == ["Ann", ",", "aged", "9", ",", "n", "'", "est", "pas", "là", "!", "在"]
    assert sentence.words[12:16] == ["Paris", "住", "。", "ไ"] and sentence.words[-2:] == ["ค่", "ะ"]
    assert sentence.blanks[:6] == [False, False, True, True, False, True]
    assert sentence_of_text(" \n ").words == []


def test_blanks_stand_between_words_of_scripts_that_have_them():
    assert sentence_of_words(["Ann", "lebt"]).blanks == [False, True]
    assert sentence_of_words(list("在北京A1区")).blanks == [False] * 6
    assert sentence_of_words(["서울", "에서"]).blanks == [False, True]


def test_windows_that_share_too_much_are_refused():
    with pytest.raises(UserError, match="stride=10 is too large for rows of 16 tokens; .*try 3"):
        encode_words(tokenizer("wordpiece"), [], 16, False, 10)
