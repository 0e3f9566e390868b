"""How a tokenizer writes each script: shares of [UNK] against a count by hand, and sentences as tokens."""

import json
from dataclasses import replace

import numpy as np
import pytest

from espalier.data.config import DataConfig
from espalier.data.prepare import prepare
from espalier.data.prepare.__main__ import PrepareConfig, main
from espalier.data.scripts import samples, script_of
from espalier.data.tokenizer import save_tokenizer
from espalier.data.train_tokenizer import train_tokenizer

CHINESE = "我们今天学习自然语言处理。"
JAPANESE = "私たちは今日、自然言語を学ぶ。"
ENGLISH = "We study natural languages today."


@pytest.mark.parametrize(
    ("character", "script"),
    [("a", "Latin"), ("Ａ", "Latin"), ("ß", "Latin"), ("漢", "Han"), ("が", "Japanese"), ("ｶ", "Japanese")]
    + [
        ("ー", "Japanese"),
        ("ก", "Thai"),
        ("ж", "Cyrillic"),
        ("한", "Hangul"),
        ("क", "Devanagari"),
        ("1", None),
        ("。", None),
    ],
)
def test_the_script_of_a_character(character, script):
    assert script_of(character) == script


def test_each_script_has_its_share_of_unknown_tokens_and_a_sentence():
    known = [ENGLISH * 20, JAPANESE * 20]
    tokenizer = train_tokenizer(known, "wordpiece", 400)
    found = {sample.script: sample for sample in samples([f"{ENGLISH} {CHINESE * 3} {JAPANESE * 3}\n"], tokenizer)}
    assert set(found) == {"Latin", "Han", "Japanese"}
    assert found["Latin"].unknown == found["Japanese"].unknown == 0
    ids = tokenizer(CHINESE, add_special_tokens=False)["input_ids"]
    assert (
        found["Han"].unknown == pytest.approx(ids.count(tokenizer.unk_token_id) / len(ids))
        and found["Han"].unknown > 0.3
    )
    assert "[UNK](们)" in found["Han"].tokens and "自" in found["Han"].tokens
    assert "".join(token.removeprefix("##") for token in found["Latin"].tokens) == ENGLISH.replace(" ", "")


def test_bytes_of_a_character_are_shown_as_the_character():
    tokenizer = train_tokenizer(["only plain letters here"] * 5, "bpe", 300)
    (sample,) = samples([CHINESE * 3], tokenizer)
    assert sample.unknown == 0 and "".join(sample.tokens) == (CHINESE * 3)[: len("".join(sample.tokens))]


def test_prepare_shows_scripts_and_a_run_warns_of_unknown_tokens(tmp_path, capsys):
    # No two alike: equal texts are held out together, and with them a script.
    texts = [f"{sentence * 5} {number}" for number in range(40) for sentence in (ENGLISH, CHINESE, JAPANESE)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = DataConfig(files=(f"{tmp_path}/text.jsonl",), cache=str(tmp_path / "cache"), validation_fraction=0.1)
    summary = main(PrepareConfig(data=data, vocab_size=400))
    printed = capsys.readouterr().out
    assert [entry["script"] for entry in summary["scripts"]] == ["Latin", "Japanese", "Han"]
    assert "0.00% [UNK]" in printed and "warning" not in printed
    assert summary["train"]["unknown"] == 0

    save_tokenizer(train_tokenizer([ENGLISH * 20], "wordpiece", 400), tmp_path / "english")
    english = replace(data, tokenizer=str(tmp_path / "english"))
    prepared = prepare(english, 400, for_masked_lm=True)
    assert "of the tokens of train text are [UNK]" in capsys.readouterr().out
    store = prepared.train["text"]
    ids = store.take(np.arange(store.manifest["tokens"]))
    share = main(PrepareConfig(data=english))["train"]["unknown"]
    assert (
        share == np.mean(ids == prepared.tokenizer.unk_token_id) > 0.3
        and f"{share:.3%} [UNK]" in capsys.readouterr().out
    )
