"""Tokenizers: the same everywhere, exact about bytes and words, and clear about what is missing."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from espalier import progress
from espalier.data.token_tables import CONTINUABLE, CONTINUES, token_bytes, token_texts, word_table
from espalier.data.tokenizer import (
    fingerprint,
    load_tokenizer,
    pieces,
    plain_backend,
    save_tokenizer,
    special_ids,
    vocabulary_size,
)
from espalier.data.train_tokenizer import sample, train_tokenizer
from espalier.errors import UserError

TRAIN = """
import pathlib, sys
from espalier.data.tokenizer import fingerprint
from espalier.data.train_tokenizer import train_tokenizer
text = pathlib.Path(sys.argv[1]).read_text()[:300_000]
print(*(fingerprint(train_tokenizer([text], kind, 1000)) for kind in ("wordpiece", "bpe", "unigram")))
"""


@pytest.fixture(scope="module")
def shakespeare(shared_data) -> str:
    return (shared_data / "tinyshakespeare" / "input.txt").read_text()[:300_000]


@pytest.fixture(scope="module")
def trained(shakespeare):
    return {kind: train_tokenizer([shakespeare], kind, 1000) for kind in ("wordpiece", "bpe", "unigram")}


@pytest.fixture(params=["wordpiece", "bpe"])
def tokenizer(request, trained):
    return trained[request.param]


def encode(tokenizer, text):
    return plain_backend(tokenizer).encode(text, add_special_tokens=False).ids


def words(tokenizer, text) -> list[str]:
    """The text's tokens, joined where the word table says that they are one word."""
    table, ids, found = word_table(tokenizer), encode(tokenizer, text), []
    for at, index in enumerate(ids):
        piece = tokenizer.decode([index]).replace("##", "")
        if at and table[index] & CONTINUES and table[ids[at - 1]] & CONTINUABLE:
            found[-1] += piece
        else:
            found.append(piece)
    return [word.strip() for word in found]


def test_every_process_trains_the_same(trained, shared_data):
    source = str(shared_data / "tinyshakespeare" / "input.txt")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", TRAIN, source]
    other = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    # Before it, a slow machine tells what is being waited for.
    assert other.stdout.splitlines()[-1].split() == [fingerprint(trained[kind]) for kind in trained], other.stderr


def test_unigram_against_the_librarys_own_scores(trained, shakespeare):
    """Its tokens under the scores counted here cut the text into no more pieces than under those of its trainer."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = trained["unigram"]
    assert vocabulary_size(tokenizer) <= 1000 and tokenizer.unk_token_id == 1
    ids = special_ids(tokenizer, need=("cls", "sep", "mask", "bos", "eos"))
    assert len(set(ids.all)) == 5
    text = " ".join(shakespeare[:50_000].split())
    assert tokenizer.decode(encode(tokenizer, text)) == text
    reference = Tokenizer(models.Unigram())
    reference.normalizer, reference.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=1000, special_tokens=["<pad>", "<unk>", "<s>", "</s>", "<mask>"], unk_token="<unk>"
    )
    reference.train_from_iterator(list(pieces(shakespeare)), trainer)
    assert len(encode(tokenizer, text)) < 1.01 * len(reference.encode(text, add_special_tokens=False).ids)


def test_a_vocabulary_too_small_for_unigram_names_the_one_that_is_not():
    """Near the bound the library would also give more tokens than were asked for."""
    texts = ["".join(chr(0x4E00 + (at * step) % 400) for at in range(200)) for step in range(1, 50)]
    least = 0
    for size in (300, 401, 406):
        with pytest.raises(UserError, match="has 400 characters to know .*; give --model.vocab-size") as error:
            train_tokenizer(texts, "unigram", size)
        (least,) = map(int, re.findall(r"vocab-size (\d+) or more", str(error.value)))
        assert least > size
    assert vocabulary_size(train_tokenizer(texts, "unigram", least)) == least


def test_a_long_training_is_told_of_and_ctrl_c_ends_it_at_once(monkeypatch, capsys):
    """The library is silent, and deaf to signals until it is done."""
    monkeypatch.setattr(progress, "PATIENCE", 0.05)

    def train_from_iterator(self, texts, trainer):
        time.sleep(2)

    monkeypatch.setattr(tokenizers.Tokenizer, "train_from_iterator", train_from_iterator)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(["some text"], "unigram", 400)
    assert time.monotonic() - began < 1.5
    assert capsys.readouterr().out.startswith("training a unigram tokenizer …")


def test_sizes_and_special_tokens(trained):
    wordpiece, bpe = trained["wordpiece"], trained["bpe"]
    assert vocabulary_size(wordpiece) == vocabulary_size(bpe) == 1000 == len(token_bytes(bpe)) == len(word_table(bpe))
    assert special_ids(wordpiece, need=("mask",))[:4] == (0, 2, 3, 4)
    ids = special_ids(bpe, need=("mask", "cls", "sep", "bos", "eos"))
    assert ids.bos == ids.eos and len(set(ids.all)) == 5
    causal = train_tokenizer(["some text, some more"] * 9, "bpe", 400, for_masked_lm=False)
    assert vocabulary_size(causal) <= 400
    with pytest.raises(UserError, match=r"no mask token \(its special tokens: <\|endoftext\|>, <\|pad\|>\)"):
        special_ids(causal, need=("mask",))


def test_pairs_are_framed(tokenizer):
    ids = special_ids(tokenizer)
    encoding = tokenizer.backend_tokenizer.encode("first", "second")
    assert encoding.ids[0] == ids.cls and encoding.ids[-1] == ids.sep and encoding.ids.count(ids.sep) == 2
    assert encoding.type_ids == sorted(encoding.type_ids) and set(encoding.type_ids) == {0, 1}


def test_a_text_without_much_in_it_makes_a_small_vocabulary(tokenizer):
    kind = "wordpiece" if "[MASK]" in tokenizer.get_vocab() else "bpe"
    small = train_tokenizer(["abc abc"], kind, 1000)
    assert vocabulary_size(small) < 300
    assert tokenizer.decode(encode(small, "abc")) is not None
    with pytest.raises(UserError, match="at least 300"):
        train_tokenizer(["abc"], kind, 100)


def test_wordpiece_leaves_rare_characters_out_if_asked():
    han = "".join(chr(0x4E00 + number) for number in range(5000))
    tokenizer = train_tokenizer(["the most frequent words " * 50, han], "wordpiece", 500, alphabet=0.2)
    assert vocabulary_size(tokenizer) <= 500
    assert tokenizer.unk_token_id not in encode(tokenizer, "the most frequent words")


def test_markers_in_the_text_are_text(tokenizer):
    marker = tokenizer.sep_token
    assert special_ids(tokenizer).sep not in encode(tokenizer, f"a {marker} b")
    as_it_is = tokenizer.backend_tokenizer.encode(f"a {marker} b", add_special_tokens=False)
    assert special_ids(tokenizer).sep in as_it_is.ids


@given(text=st.text(max_size=60))
def test_byte_level_bytes_are_exact(trained, text):
    tokenizer = trained["bpe"]
    ids = encode(tokenizer, text)
    assert token_bytes(tokenizer)[ids].sum() == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_wordpiece_bytes_are_those_of_the_pieces(trained):
    tokenizer = trained["wordpiece"]
    sizes = token_bytes(tokenizer)
    assert sizes[encode(tokenizer, "the king's unhappiness")].sum() == len("theking'sunhappiness")
    assert not sizes[list(special_ids(tokenizer).all)].any()


def test_words_of_real_text_are_those_of_the_pre_tokenizer(trained, shakespeare):
    """BERT's pre-tokenizer is an independent word splitter for both: letters together, punctuation apart."""
    part = shakespeare[:20_000].lower().replace("'", " ")  # GPT-2 keeps the apostrophe with the letters: 't, 'll
    expected = [word for word, _ in pre_tokenizers.BertPreTokenizer().pre_tokenize_str(part)]
    assert words(trained["wordpiece"], part) == expected
    in_bpe = [word for word in words(trained["bpe"], part) if word]
    only_letters = [word for word in expected if word.isalnum()]
    assert [word for word in in_bpe if word.isalnum()] == only_letters


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("naïve café", ["naïve", "café"]),
        ("don't stop", ["don", "'t", "stop"]),
        ("x=f(y1)", ["x", "=", "f", "(", "y1", ")"]),
        ("Привет мир", ["Привет", "мир"]),
        ("ἀρχή", ["ἀρχή"]),
    ],
)
def test_bytes_of_characters_and_words_belong_together(trained, text, expected):
    tokenizer = trained["bpe"]
    table, ids, groups = word_table(tokenizer), encode(tokenizer, text), []
    for at, index in enumerate(ids):
        if at and table[index] & CONTINUES and table[ids[at - 1]] & CONTINUABLE:
            groups[-1].append(index)
        else:
            groups.append([index])
    found = [tokenizer.decode(group).strip() for group in groups]
    assert [word for word in found if word] == expected


def test_unspaced_scripts_have_one_token_words():
    text = "日本語の文章です。 ภาษาไทย " * 20 + "plain words"
    tokenizer = train_tokenizer([text], "bpe", 400)
    table = word_table(tokenizer)
    for token, index in tokenizer.get_vocab().items():
        content = str(tokenizer.decode([index]))
        if content.startswith("\ufffd"):
            continue  # begins within a character, and must stay with the rest of it
        if any("\u0e00" <= character <= "\u0eff" or "\u3040" <= character <= "\u9fff" for character in content):
            assert not table[index] & CONTINUES, (token, content)
    assert [word for word in words(tokenizer, "plain words") if word] == ["plain", "words"]


def test_texts_of_tokens_put_together_are_the_text(trained, shakespeare):
    text = "The king's unhappiness, naïvely told"
    trained = trained | {"wordpiece": train_tokenizer([shakespeare], "wordpiece", 1000, lowercase=True)}
    wordpiece, bpe = (
        "".join(token_texts(trained[kind])[index] for index in encode(trained[kind], text))
        for kind in ("wordpiece", "bpe")
    )
    assert bpe.replace("\ufffd", "") == text.replace("ï", "")
    assert wordpiece == " the king ' s unhappiness , naively told"
    assert token_texts(trained["wordpiece"])[2] == " [CLS]"


def test_a_killed_save_leaves_the_old_tokenizer(trained, tmp_path, monkeypatch):
    save_tokenizer(trained["bpe"], tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(type(trained["wordpiece"]), "save_pretrained", full)
        save_tokenizer(trained["wordpiece"], tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    save_tokenizer(trained["wordpiece"], tmp_path)
    assert fingerprint(load_tokenizer(tmp_path)) == fingerprint(trained["wordpiece"])
    assert {path.name for path in tmp_path.iterdir()} == before.keys()


def test_special_tokens_stand_alone(tokenizer):
    special = list(special_ids(tokenizer).all)
    assert not word_table(tokenizer)[special].any() and not token_bytes(tokenizer)[special].any()


def test_save_and_load(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "tokenizer.json").write_bytes((tmp_path / "tokenizer" / "tokenizer.json").read_bytes())
    for path in (tmp_path / "tokenizer", tmp_path / "tokenizer" / "tokenizer.json", tmp_path / "bare"):
        loaded = load_tokenizer(path)
        assert fingerprint(loaded) == fingerprint(tokenizer)
        assert special_ids(loaded) == special_ids(tokenizer)
    settings = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast", "transformers 4 knows no other"


def test_transformers_loads_what_was_saved(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    save_tokenizer(tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("Some text")["input_ids"] == tokenizer("Some text")["input_ids"]
    assert loaded.mask_token == tokenizer.mask_token


def test_fingerprint_follows_what_decides_the_tokens(tokenizer, trained, tmp_path):
    before = fingerprint(tokenizer)
    tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=8)
    assert fingerprint(tokenizer) == before, "using a tokenizer changes nothing"
    assert len(encode(tokenizer, "word " * 50)) >= 50
    assert fingerprint(trained["bpe"]) != fingerprint(trained["wordpiece"])
    save_tokenizer(tokenizer, tmp_path)
    other = load_tokenizer(tmp_path)
    other.sep_token = other.mask_token
    assert fingerprint(other) != before


@pytest.mark.parametrize("content", [None, "{", '{"model": {}}'])
def test_a_folder_without_tokenizer_is_an_error(tmp_path, content):
    if content:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_name_of_the_hub_is_no_path():
    with pytest.raises(UserError, match="no tokenizer at bert-base-uncased"):
        load_tokenizer("bert-base-uncased")


@given(st.text(alphabet="ab \n.", max_size=200), st.integers(2, 30))
def test_pieces_are_the_text(text, limit):
    cut = list(pieces(text, limit))
    assert "".join(cut) == text and all(0 < len(piece) <= limit for piece in cut)


def test_pieces_do_not_change_the_tokens(tokenizer, shakespeare):
    part = shakespeare[:50_000]
    cut = list(pieces(part, 700))
    assert len(cut) > 60
    assert np.concatenate([encode(tokenizer, piece) for piece in cut]).tolist() == encode(tokenizer, part)


def test_pieces_do_not_change_the_words_of_newer_tokenizers(shakespeare):
    """Llama 3 keeps line breaks with the punctuation before them, so a cut at any whitespace would not do."""
    words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    splitter = pre_tokenizers.Split(Regex(words), "isolated")
    part = shakespeare[:50_000]
    found = [word for piece in pieces(part, 61) for word, _ in splitter.pre_tokenize_str(piece)]
    assert found == [word for word, _ in splitter.pre_tokenize_str(part)]


def test_a_sample_is_even_and_keeps_its_order():
    texts = [f"text number {number}" for number in range(2000)]
    assert sample(texts, 10**6) == texts
    some = sample(texts, 8000)
    assert 3000 < sum(map(len, some)) <= 8000
    assert some == [text for text in texts if text in set(some)]
    assert sample(iter(texts), 8000) == some
