"""Where words begin, against the segmenters themselves, character by character, and what masks make of it."""

import importlib.metadata
import itertools
import json
import re
import unicodedata
from dataclasses import replace

import jax
import numpy as np
import pytest
import rjieba
import sudachipy
from icu4py.breakers import WordBreaker

import espalier.data.words
from espalier.data.config import DataConfig
from espalier.data.documents import Document
from espalier.data.encode import encode
from espalier.data.loader import Rows
from espalier.data.packing import pack_best_fit
from espalier.data.prepare import prepare
from espalier.data.sources import FileSource, sample
from espalier.data.store import Encoded
from espalier.data.token_tables import CONTINUABLE, CONTINUES, token_bytes, token_texts, word_table
from espalier.data.tokenizer import plain_backend, special_ids, vocabulary_size
from espalier.data.train_tokenizer import train_tokenizer
from espalier.data.words import EACH_TOKEN, check_segmenters, find_segmenters, script_shares, segmenter
from espalier.errors import UserError
from mlm.config import MaskingConfig
from mlm.masking import Vocabulary, mask_batch
from tests.manpages import man_texts

THAI = "ภาษาไทยเป็นภาษาที่เขียนติดกันโดยไม่มีช่องว่างระหว่างคำ คอมพิวเตอร์ต้องตัดคำก่อนจึงจะเข้าใจประโยคได้"
MIXED = "使用\u3000 Python 3.12 训练模型，卡拉OK很好听。\n在2021年，“全词掩码”是一种方法!\n\n再来一行😀🇨🇳ok ❤️"


def words_of(text: str, language: str) -> list[list[int]]:
    """The places of the characters of each word, blanks left out."""
    if language == "ja":
        tokenizer = sudachipy.Dictionary(dict="small").tokenizer(mode=sudachipy.SplitMode.A)
    cut = {
        "zh": lambda line: rjieba.cut(line, True),
        "ja": lambda line: [word.surface() for word in tokenizer.tokenize(line)],
        "th": lambda line: list(WordBreaker(line, "th")),
    }[language]
    words, at = [], 0
    for line in text.splitlines(keepends=True):
        for word in itertools.chain(*([cut(part), ["\n"]] if (part := line.rstrip("\n")) != line else [cut(line)])):
            places = range(at, at + len(word))
            at += len(word)
            if any(unspaced(character) for character in word):
                words.append(list(places))
                continue
            for place in places:
                joins = place and words and words[-1][-1] == place - 1 and not unspaced(text[place - 1])
                if joins and (letter(text[place]) and letter(text[place - 1]) or mark(text[place])):
                    words[-1].append(place)
                elif not text[place].isspace():
                    words.append([place])
    assert at == len(text)
    return words


def unspaced(character: str) -> bool:
    name = unicodedata.name(character, "").split()
    return bool(name) and name[0] in ("CJK", "HIRAGANA", "KATAKANA", "HALFWIDTH", "THAI", "KATAKANA-HIRAGANA")


def letter(character: str) -> bool:
    return unicodedata.category(character)[0] in "LNM"


def mark(character: str) -> bool:
    return unicodedata.category(character)[0] == "M"


def spans_of(text: str, ids: list[int], tokenizer) -> list[range]:
    """The characters of each token, found by its bytes or, where blanks are not kept, by its letters."""
    if tokenizer.bos_token == "<|endoftext|>":
        sizes = token_bytes(tokenizer)[ids]
        assert sum(sizes) == len(text.encode())
        of_byte = [at for at, character in enumerate(text) for _ in character.encode()]
        ends = np.cumsum(sizes)
        return [range(of_byte[end - size], of_byte[end - 1] + 1) for end, size in zip(ends, sizes, strict=True)]
    spans, at, texts = [], 0, token_texts(tokenizer)
    for index in ids:
        content = texts[index].strip()
        while content and text[at].isspace():
            at += 1
        assert text[at : at + len(content)] == content
        spans.append(range(at, at + len(content)))
        at += len(content)
    return spans


def expected(text: str, ids: list[int], tokenizer, language: str) -> list[bool]:
    """A token begins a word where none of the words that it has a part of had one in a token before it."""
    word_of = {place: number for number, word in enumerate(words_of(text, language)) for place in word}
    seen, starts = {None}, []
    for span in spans_of(text, ids, tokenizer):
        mine = {word_of.get(place) for place in span} - {None}
        # A token of blanks is a word, and the parts of one blank belong together.
        key = mine or {("blank", place) for place in span}
        starts.append(not key & seen)
        seen |= key
    return starts


def tokens_of(text: str, tokenizer, words: dict[str, str]):
    ((encoded,),) = encode([Document(text, "a")], tokenizer, words)
    assert isinstance(encoded, Encoded) and encoded.starts is not None
    assert (
        encoded.ids.tolist() == plain_backend(tokenizer).encode(text, add_special_tokens=False).ids or len(text) > 20000
    )
    return encoded.ids.tolist(), encoded.starts.tolist()


@pytest.fixture(scope="module")
def texts():
    return {"zh": [MIXED, *man_texts("zh", 40)[:6]], "ja": man_texts("ja", 40)[:6], "th": [THAI * 3 + "\n" + THAI]}


def plain(text: str) -> str:
    """Without marks and capitals."""
    return "".join(c for c in unicodedata.normalize("NFD", text) if not mark(c)).lower()


NORMALISED = {"wordpiece": plain, "bpe": str, "bytes": str, "unigram": lambda text: unicodedata.normalize("NFKC", text)}
WORDS = {"zh": {"Chinese": "rjieba"}, "ja": {"Japanese": "sudachi"}, "th": {espalier.data.words.SOUTH_EAST: "icu4py"}}


@pytest.mark.parametrize("language", WORDS)
@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "bytes", "unigram"])
def test_tokens_begin_words_where_the_segmenter_says_so(texts, language, kind):
    # As tokenizers change it themselves, so that a token is found again by its letters.
    texts = [NORMALISED[kind](text) for text in texts[language]]
    learnt = [text[at : at + 7] for text in texts for at in range(0, len(text), 7)]
    # Every character at the beginning of a word and inside of one, so that nothing is [UNK].
    learnt += [f"a{character} {character}" for character in set("".join(texts))]
    # Of 300 tokens, most stand for a part of a character.
    tokenizer = train_tokenizer(learnt, "bpe", 300) if kind == "bytes" else train_tokenizer(learnt, kind, 4000)
    several = 0
    for text in texts:
        ids, starts = tokens_of(text, tokenizer, WORDS[language])
        wanted = expected(text, ids, tokenizer, language)
        different = [at for at, (one, other) in enumerate(zip(starts, wanted, strict=True)) if one != other]
        assert not different, [
            (tokenizer.convert_ids_to_tokens(ids[at - 3 : at + 3]), starts[at]) for at in different[:5]
        ]
        several += sum(not start for start in starts)
    assert several > 20


def test_a_long_text_without_blanks(texts):
    """Cut for the tokenizer behind 20,000 characters, for the segmenter behind 4,000; neither begins a word there."""
    text = "".join(texts["zh"][1:]).replace("\n", "").replace(" ", "")
    text = (text * (45_000 // len(text) + 1))[:45_000]
    tokenizer = train_tokenizer([text[at : at + 7] for at in range(0, 9000, 7)], "bpe", 600)
    ids, starts = tokens_of(text, tokenizer, WORDS["zh"])
    assert starts == expected(text, ids, tokenizer, "zh")


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_decomposed_characters_move_nothing(monkeypatch, kind):
    """An é of two code points is one character to the tokenizer, and offsets are those of the text as it was given."""

    def pairs():
        return lambda line: [len(word) for word in re.findall(r"[\u4e00-\u9fff]{2}|.", line)]

    monkeypatch.setitem(espalier.data.words.SEGMENTERS, "Chinese", espalier.data.words.Segmenter(("pairs",), pairs))
    words = ["中文", "分词", "。", "é", "café", "Việt", "中文", "分词", "naïve"]
    composed = "中文分词。é café Việt中文分词 naïve"
    tokenizer = train_tokenizer([f"a{c} {c}" for c in composed] * 3, kind, 300)
    decomposed = unicodedata.normalize("NFD", composed)
    assert len(decomposed) > len(composed)
    (ids, starts), (others, other_starts) = (tokens_of(text, tokenizer, WORDS["zh"]) for text in (composed, decomposed))
    assert ids == others and starts == other_starts
    found, texts = [""], [token_texts(tokenizer)[index] for index in ids]
    # The ▁ that Unigram puts before the text is no part of its first word.
    assert starts[1] == (not texts[0].strip())
    for text, begins in zip(texts, starts, strict=True):
        found = [*found, text] if begins else [*found[:-1], found[-1] + text]
    assert [plain(word).replace(" ", "") for word in found if word.strip()] == [plain(word) for word in words]


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_in_scripts_with_blanks_it_is_what_the_tokens_say(shared_data, kind):
    text = (shared_data / "tinyshakespeare" / "input.txt").read_text()[:20_000]
    tokenizer = train_tokenizer([text], kind, 600)
    ids, starts = tokens_of(text, tokenizer, {"Chinese": EACH_TOKEN})
    table = word_table(tokenizer)[ids]
    continues = (table[1:] & CONTINUES > 0) & (table[:-1] & CONTINUABLE > 0)
    if kind == "wordpiece":
        assert starts[1:] == (~continues).tolist()
        return
    # A token of several signs and letters ('.\n\nThe') begins as its first sign does, in both.
    different = [at for at in range(1, len(ids)) if starts[at] == bool(continues[at - 1])]
    assert not different, [tokenizer.convert_ids_to_tokens(ids[at - 2 : at + 2]) for at in different[:5]]


def test_a_script_without_its_segmenter_has_a_word_for_each_token(texts):
    text = "使用模型 " + THAI
    tokenizer = train_tokenizer([text], "bpe", 300)
    ids, starts = tokens_of(text, tokenizer, WORDS["th"] | {"Chinese": EACH_TOKEN})
    spans = spans_of(text, ids, tokenizer)
    han = {span.start: begins for span, begins in reversed(list(zip(spans, starts, strict=True))) if span.start < 4}
    assert list(sorted(han.items())) == [(0, True), (1, True), (2, True), (3, True)]
    assert sum(starts[len(ids) - 20 :]) < 12


def test_han_is_read_as_the_document_is():
    """Chinese and Japanese share it; the kana of the document tell."""
    both = segmenter(WORDS["zh"] | WORDS["ja"])
    text = "国家公務員は東京都で働いています"
    places = [0, *itertools.accumulate(map(len, ["国家", "公務", "員", "は", "東京", "都", "で"]))]
    assert np.flatnonzero(both(text))[:8].tolist() == places
    chinese = "研究生命的起源，有一个の"
    cut = [0, *itertools.accumulate(map(len, rjieba.cut(chinese, True)))][:-1]
    assert np.flatnonzero(both(chinese)).tolist() == cut
    heading = "国家公務員"
    assert np.flatnonzero(segmenter(WORDS["ja"])(heading)).tolist() == [0, 2, 4]
    assert np.flatnonzero(both(heading)).tolist() == [0, *itertools.accumulate(map(len, rjieba.cut(heading)))][:-1]


def installed_without(monkeypatch, *missing):
    version = importlib.metadata.version

    def lookup(name):
        if name in missing:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr("importlib.metadata.version", lookup)


def test_segmenters_are_chosen_by_the_text_and_by_what_is_installed(monkeypatch, capsys):
    samples = [["plain English text with words"], ["使用模型来训练"], ["これは日本語の文章です"]]
    here = f"rjieba {importlib.metadata.version('rjieba')}"
    found = find_segmenters(samples, required=False)
    assert found["Chinese"] == here and found["Japanese"].startswith("SudachiPy 0.7") and len(found) == 2
    assert find_segmenters(samples[:1], required=False) == {} and not capsys.readouterr().out
    installed_without(monkeypatch, "rjieba")
    assert find_segmenters(samples, required=False) == {"Chinese": EACH_TOKEN, "Japanese": found["Japanese"]}
    (line,) = capsys.readouterr().out.splitlines()
    assert (
        "Chinese text (100% of the letters): each token will be its own word" in line and "pip install rjieba" in line
    )
    assert find_segmenters(samples[:2], required=False) == {}
    with pytest.raises(UserError, match="Chinese text .* needs a segmenter.*pip install rjieba"):
        find_segmenters(samples, required=True)
    with pytest.raises(UserError, match="Chinese text with rjieba 0.1.9, and no segmenter is here.*rjieba==0.1.9"):
        check_segmenters({"Chinese": "rjieba 0.1.9"})
    check_segmenters({"Chinese": EACH_TOKEN, "Japanese": found["Japanese"]})


def test_shares_of_scripts():
    shares = script_shares(["ab" * 50, "中文" * 25, "日本のかな" * 10])
    assert shares == pytest.approx({"Chinese": 0.25, "Japanese": 0.25, espalier.data.words.SOUTH_EAST: 0})
    assert script_shares([THAI])[espalier.data.words.SOUTH_EAST] == 1 and script_shares([]) == script_shares(["12 !"])


def test_a_sample_is_taken_all_over_the_files(tmp_path):
    for number in range(40):
        (tmp_path / f"{number:02}.txt").write_text(f"{number} " * 5)
    source = FileSource((f"{tmp_path}/*.txt",))
    assert [text.split()[0] for text in sample(source, 4, 40)] == ["0", "10", "20", "30"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Short documents of Chinese, each whole in a row of 64 tokens."""
    folder = tmp_path_factory.mktemp("zh")
    lines = [line.strip() for text in man_texts("zh", 60) for line in text.split("\n")]
    lines = [line for line in lines if 8 < len(line) < 60 and any(map(unspaced, line))][:400]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return DataConfig(
        files=(f"{folder}/a.jsonl",), tokenizer_kind="bpe", sequence_length=64, cache=str(folder / "cache")
    )


def rows_of(prepared, **more):
    store, specials = prepared.train["text"], special_ids(prepared.tokenizer)
    return Rows(store, pack_best_fit(store.offsets, 64), 64, specials, layout="framed", **more)


def test_masks_hide_the_words_of_the_segmenter(corpus, capsys):
    """Text → prepare → rows → the jitted step: a hidden word has all its tokens hidden, but for the last one drawn."""
    prepared = prepare(corpus, 600, for_masked_lm=True, whole_words=True)
    assert f"whole words: Chinese by rjieba {importlib.metadata.version('rjieba')}" in capsys.readouterr().out
    store, tokenizer, specials = prepared.train["text"], prepared.tokenizer, special_ids(prepared.tokenizer)
    wanted = {}
    for begin, end in itertools.pairwise(store.offsets):
        ids = store.take(np.arange(begin, end)).tolist()
        wanted[tuple(ids)] = expected(str(tokenizer.decode(ids)), ids, tokenizer, "zh")
        assert store.word_starts(np.arange(begin, end)).tolist() == wanted[tuple(ids)]
    rows = rows_of(prepared, word_starts=True)
    batch = rows.rows(np.arange(min(len(rows), 40)))
    ordinary_V = ~np.isin(np.arange(vocabulary_size(tokenizer)), specials.all)
    assert specials.mask is not None
    # Nothing may come from the table.
    vocabulary = Vocabulary(specials.mask, ordinary_V, np.zeros(len(ordinary_V), np.uint8))
    config = MaskingConfig(rate=0.3, mask_fraction=1.0, random_fraction=0.0, whole_words=True)
    hidden = np.asarray(
        jax.jit(lambda b: mask_batch(b, jax.random.key(1), 0.3, config, vocabulary))(batch)["input_ids"]
    )
    whole = 0
    for row, ids in enumerate(batch["input_ids"]):
        cut = 0
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            inside = np.flatnonzero(batch["segment_ids"][row] == segment)[1:-1]
            starts = wanted[tuple(ids[inside].tolist())]
            assert batch["word_starts"][row][inside].tolist() == starts
            masked = hidden[row][inside] == specials.mask
            for word in np.split(masked, np.flatnonzero(starts)[1:]):
                if word.any() and not word.all():
                    cut += 1
                    assert word[: word.sum()].all()
                whole += word.all() and len(word) > 1
        assert cut <= 1
    assert whole > 100
    assert batch["word_starts"].dtype == bool and batch["word_starts"][batch["segment_ids"] == 0].all()


def test_tokens_without_word_starts_are_another_entry_of_the_cache(corpus):
    """As an older version wrote them; the batch then is what it was."""
    by_words = prepare(corpus, 600, for_masked_lm=True, whole_words=True)
    plain_store, other = (
        prepare(config, 600, for_masked_lm=True, whole_words=whole).train["text"]
        for config, whole in ((corpus, False), (replace(corpus, words="tokens"), True))
    )
    store = by_words.train["text"]
    assert plain_store.folder == other.folder != store.folder
    assert "words" not in plain_store.manifest and not list(plain_store.folder.glob("starts-*"))
    assert store.manifest["words"] == by_words.words
    every = np.arange(store.offsets[-1])
    np.testing.assert_array_equal(store.take(every), plain_store.take(every))
    size = sum(path.stat().st_size for path in store.folder.glob("starts-*"))
    assert size == -(-len(every) // 8) and not store.damaged()
    assert "word_starts" not in rows_of(by_words).rows(np.arange(2))
    explicit = prepare(replace(corpus, words="segmenter"), 600, for_masked_lm=True)
    assert explicit.train["text"].folder == store.folder
    with pytest.raises(UserError, match="masked LM"):
        prepare(replace(corpus, words="segmenter"), 600, for_masked_lm=False)


def test_a_run_goes_on_as_it_began(corpus, monkeypatch):
    """Without what it began without, and only with the versions that it began with."""
    assert prepare(corpus, 600, for_masked_lm=True, whole_words=True, words={}).words == {}
    began = prepare(corpus, 600, for_masked_lm=True, whole_words=True).words
    assert prepare(corpus, 600, for_masked_lm=True, whole_words=True, words=began).words == began
    with pytest.raises(UserError, match="with rjieba 0.1.9, and rjieba .* is here; .*pip install rjieba==0.1.9"):
        prepare(corpus, 600, for_masked_lm=True, whole_words=True, words={"Chinese": "rjieba 0.1.9"})
