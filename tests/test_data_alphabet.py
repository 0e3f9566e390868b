"""What a trained tokenizer keeps of a text: case, marks and characters, against Unicode's own tables."""

import sys
import unicodedata
from collections import Counter

import pytest
import regex

from espalier.data.config import DataConfig
from espalier.data.tokenizer import plain_backend, save_tokenizer, vocabulary_size
from espalier.data.train_tokenizer import train_tokenizer
from espalier.errors import UserError
from tests.manpages import man_texts

LETTER = regex.compile(r"[[\p{Script=Latin}\p{Script=Greek}\p{Script=Cyrillic}]&&\p{L}]", regex.V1)
HAN = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2FA1F))
SENTENCES = {
    "ja": "がぎぐげご パピプペポ を ヴァイオリン 使用する",
    "de": "Über die Straße läuft ein schöner Bär",
    "vi": "Tiếng Việt có sáu thanh điệu khác nhau",
    "el": "Καλημέρα σας, τι κάνετε;",
    "ru": "Ещё один йод, объём Ёлки",
    "th": "ภาษาไทยเป็นภาษาที่มีเสียงวรรณยุกต์",
    "hi": "हिन्दी में स्वर की मात्राएँ होती हैं",
    "ar": "اللُّغَةُ العَرَبِيَّةُ جميلة",
    "ko": "한국어 문장을 하나 씁니다",
}
STRIPPED = {
    "de": "uber die straße lauft ein schoner bar",
    "vi": "tieng viet co sau thanh đieu khac nhau",
    "el": "καλημερα σας, τι κανετε;",
    "ru": "еще один иод, объем елки",
}


def by_hand(text: str, lowercase: bool) -> list[str]:
    """The words of the text: control characters dropped, Han characters apart, composed; with lowercase without marks
    behind Latin, Greek and Cyrillic letters."""
    text = "".join(map(_cleaned, text))
    if lowercase:
        kept, strip = [], False
        for character in unicodedata.normalize("NFD", text.lower()):
            if unicodedata.category(character) != "Mn":
                strip = bool(LETTER.match(character))
            elif strip:
                continue
            kept.append(character)
        text = "".join(kept)
    return unicodedata.normalize("NFC", text).split()


def _cleaned(character: str) -> str:
    if character.isspace() and unicodedata.category(character)[0] == "Z" or character in "\t\n\r":
        return " "
    if unicodedata.category(character) in ("Cc", "Cf") or character == "\ufffd":
        return ""
    return f" {character} " if any(first <= ord(character) <= last for first, last in HAN) else character


@pytest.mark.parametrize("lowercase", [False, True])
def test_characters_are_normalised_as_unicode_says(lowercase):
    """Every character of Unicode 3.2, which all versions agree about, between letters and marks."""
    normalizer = train_tokenizer(["abc abc"], "wordpiece", 300, lowercase=lowercase).backend_tokenizer.normalizer
    old = [
        chr(code)
        for code in range(sys.maxunicode + 1)
        if unicodedata.ucd_3_2_0.category(chr(code)) not in ("Cn", "Cs", "Co")
        and (code % 16 == 0 or not 0x3400 <= code < 0xD7A4)
    ]
    assert len(old) > 15_000
    for start in range(0, len(old), 500):
        parts = [f"a{c}\u0301z か{c}\u3099\u0301" for c in old[start : start + 500]]
        assert normalizer.normalize_str("\n".join(parts)).split() == by_hand("\n".join(parts), lowercase)


def test_no_character_is_lost():
    """Of all that this Python knows: letters, marks, numbers, signs; but for U+FFFD, which stands for nothing."""
    normalizer = train_tokenizer(["abc abc"], "wordpiece", 300).backend_tokenizer.normalizer
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        if unicodedata.category(character)[0] in "LMNPS" and character != "\ufffd":
            assert unicodedata.normalize("NFC", character) in normalizer.normalize_str(f" {character} "), hex(code)


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_case_and_marks_are_kept_unless_asked_and_alike_in_transformers(kind, tmp_path):
    from transformers import AutoTokenizer

    for lowercase in (False, True):
        texts = [text * 20 for text in SENTENCES.values()]
        tokenizer = train_tokenizer(texts, kind, 1000, lowercase=lowercase)
        save_tokenizer(tokenizer, tmp_path / str(lowercase))
        theirs = AutoTokenizer.from_pretrained(tmp_path / str(lowercase))
        for language, text in SENTENCES.items():
            composed = STRIPPED.get(language, text).lower() if lowercase else text
            for spelt in (text, unicodedata.normalize("NFD", text)):
                ids = plain_backend(tokenizer).encode(spelt, add_special_tokens=False).ids
                assert tokenizer.unk_token_id not in ids
                written = "".join(tokenizer.convert_ids_to_tokens(ids)).replace("##", "").replace("▁", "")
                form = "NFC" if kind == "wordpiece" else "NFKC"
                assert written == unicodedata.normalize(form, composed.replace(" ", "")), (language, lowercase)
                assert theirs(spelt, add_special_tokens=False)["input_ids"] == ids


@pytest.mark.parametrize("language", ["zh", "ja"])
def test_next_to_no_token_of_chinese_and_japanese_is_unknown(language):
    texts = man_texts(language, 120)
    tokenizer = train_tokenizer(texts, "wordpiece", 8192)
    encodings = plain_backend(tokenizer).encode_batch_fast(texts, add_special_tokens=False)
    ids = [index for encoding in encodings for index in encoding.ids]
    assert ids.count(tokenizer.unk_token_id) / len(ids) < 1e-4
    han = {token for token in tokenizer.get_vocab() if any("\u4e00" <= character <= "\u9fff" for character in token)}
    assert len(han) > 800 and {len(token) for token in han} == {1}  # each by itself, and none twice


def test_a_thai_phrase_without_blanks_is_no_unknown_word():
    phrase = (
        "ภาษาไทยเป็นภาษาที่มีระดับเสียงของคำแน่นอนหรือวรรณยุกต์เช่นเดียวกับภาษาจีนและออกเสียงแยกคำต่อคำซึ่งเป็นลักษณะเด่นของภาษาในตระกูลนี้"
    )
    tokenizer = train_tokenizer([f"{phrase[:70]} {phrase[60:]} " * 20], "wordpiece", 400)
    assert len(phrase) > 100 and tokenizer.unk_token_id not in tokenizer(phrase)["input_ids"]


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_the_alphabet_is_the_share_of_the_text_that_was_asked_for(kind):
    """2,000 Han characters, the n-th of them ⌈2000/n⌉ times; a vocabulary too small names what it has room for."""
    counts = Counter({chr(0x4E00 + n): -(-2000 // (n + 1)) for n in range(2000)})
    texts = [character * count for character, count in counts.items()]
    ranked = [count for _, count in counts.most_common()]
    for share in (0.95, 1.0):
        tokenizer = train_tokenizer(texts, kind, 4000, alphabet=share)
        backend = plain_backend(tokenizer)
        known = {c for c in counts if tokenizer.unk_token_id not in backend.encode(c, add_special_tokens=False).ids}
        wanted = next(n for n in range(2001) if sum(ranked[:n]) >= share * sum(ranked))
        assert sum(counts[c] for c in known) >= share * sum(ranked) and len(known) == max(wanted, 1000)

    with pytest.raises(UserError, match="--data.alphabet 0.[0-9]+, ") as error:
        train_tokenizer(texts, kind, 700)
    fits = float(str(error.value).split("--data.alphabet ")[1].split(",")[0])
    tokenizer = train_tokenizer(texts, kind, 700, alphabet=fits)
    assert 600 < vocabulary_size(tokenizer) <= 700
    needed = int(str(error.value).split("--model.vocab-size ")[1].split()[0])
    assert vocabulary_size(train_tokenizer(texts, kind, needed)) <= needed
    with pytest.raises(UserError):
        train_tokenizer(texts, kind, needed - 1)


def test_settings_that_mean_nothing_are_refused(tmp_path):
    for settings, message in (
        ({"alphabet": 0.0}, "above 0"),
        ({"alphabet": 1.5}, "at most 1"),
        ({"lowercase": True, "tokenizer": str(tmp_path)}, "is for a tokenizer that is trained here"),
        ({"lowercase": True, "tokenizer_kind": "bpe"}, "keeps every byte"),
    ):
        with pytest.raises(UserError, match=message):
            DataConfig(**settings)
