"""Filters against brute force: true Jaccard similarities, sets, and scripts known beforehand."""

import random
import re
import subprocess
import sys

import numpy as np
import pytest

from espalier.data.config import DataConfig
from espalier.data.filters import HASHES, Decisions, FilterConfig, decide, measure, minhash, script_share
from espalier.data.prepare import prepare
from espalier.errors import UserError


def shingles(text: str) -> set:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[at : at + 5]) for at in range(max(len(words) - 4, 1))}


def jaccard(a: str, b: str) -> float:
    return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


@pytest.fixture(scope="module")
def scenes(shared_data) -> list[str]:
    text = (shared_data / "tinyshakespeare" / "input.txt").read_text()
    return [text[at : at + 1200] for at in range(0, 240_000, 1200)]


def edited(text: str, share: float, seed: int) -> str:
    words = text.split(" ")
    for at in random.Random(seed).sample(range(len(words)), int(share * len(words))):
        words[at] = f"changed{at}"
    return " ".join(words)


def decided(texts, **settings) -> Decisions:
    config = FilterConfig(**settings)
    return decide((measure(text, config) for text in texts), config)


def test_the_estimate_is_that_of_a_binomial(scenes):
    """Of HASHES values each agrees with the probability of the true similarity: five deviations bound them all."""
    for seed, share in enumerate(np.linspace(0, 0.3, 40)):
        other = edited(scenes[seed], share, seed)
        true = jaccard(scenes[seed], other)
        estimate = (minhash(scenes[seed]) == minhash(other)).mean()
        assert abs(estimate - true) <= 5 * np.sqrt(true * (1 - true) / HASHES) + 1e-9


def test_near_duplicates_against_brute_force(scenes):
    texts = []
    for number, scene in enumerate(scenes):
        texts.append(scene)
        if number % 2:
            texts.append(edited(scene, 0.004 if number % 4 == 1 else 0.15, number))
    random.Random(0).shuffle(texts)
    found = set(decided(texts, near=0.8).dropped.tolist())
    clear = 0
    for number, text in enumerate(texts):
        nearest = max((jaccard(text, other) for at, other in enumerate(texts[:number]) if at not in found), default=0)
        # What lies within the error of the estimate around the threshold may fall on either side.
        if abs(nearest - 0.8) > 0.15:
            clear += 1
            assert (number in found) == (nearest > 0.8), (number, nearest)
    assert len(found) >= 40 and clear > 0.9 * len(texts)


def test_case_blanks_and_punctuation_make_no_difference(scenes):
    texts = [scenes[0], "  " + scenes[0].upper().replace(",", " ;") + "!"]
    assert decided(texts, near=0.9).dropped.tolist() == [1]
    assert decided(texts, exact=True).dropped.tolist() == []


def test_text_without_blanks():
    text = "".join(chr(0x4E00 + (number * 7919) % 5000) for number in range(600))
    other = "".join(chr(0x4E00 + (number * 104729) % 5000) for number in range(600))
    assert decided([text, other, text[:590]], near=0.8).dropped.tolist() == [2]


def test_the_first_of_equal_texts_stays():
    texts = [f"text {number % 7}" for number in range(50)]
    result = decided(texts, exact=True)
    assert result.dropped.tolist() == list(range(7, 50)) and result.counts == {"exact duplicate": 43}
    assert result.documents == 50


def test_reasons_are_counted_in_order():
    texts = ["short", "a text of fair length", "a text of fair length", "Текст кириллицей и длинный", "x" * 99]
    result = decided(texts, min_characters=10, max_characters=50, script="latin", exact=True)
    assert result.counts == {"characters": 2, "script": 1, "exact duplicate": 1}
    assert result.dropped.tolist() == [0, 2, 3, 4] and result.reasons.tolist() == [1, 3, 2, 1]


@pytest.mark.parametrize(
    ("text", "script", "share"),
    [
        ("Hello, World 123!", "Latin", 1.0),
        ("Привет abc", "Cyrillic", 6 / 9),
        ("日本語のテ", "Han", 3 / 5),
        ("日本語のテ", "hiragana", 1 / 5),
        ("αβγ", "Latin", 0.0),
        ("12 + 3", "Latin", 0.0),
        ("שלום", "Hebrew", 1.0),
        ("한국어", "Hangul", 1.0),
    ],
)
def test_scripts(text, script, share):
    assert script_share(text, script) == pytest.approx(share)


def test_nothing_and_saved(tmp_path):
    assert decided([], exact=True, near=0.8).documents == 0
    result = decided(["a", "a", "b"], exact=True)
    result.save(tmp_path / "a.npz")
    loaded = Decisions.load(tmp_path / "a.npz")
    assert loaded.dropped.tolist() == [1] and loaded.counts == result.counts and loaded.documents == 3


def test_signatures_are_the_same_in_every_process():
    text = "to be or not to be that is the question"
    code = f"from espalier.data.filters import minhash; print(minhash({text!r})[:4].tolist())"
    outs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
            capture_output=True,
            text=True,
            check=True,
            cwd=__file__.rsplit("/", 2)[0],
        ).stdout
        for seed in ("1", "2")
    }
    assert outs == {f"{minhash('To be, or not to be: that is the question')[:4].tolist()}\n"}


@pytest.mark.parametrize(
    "settings",
    [
        {"near": 1.0},
        {"near": 0.0},
        {"min_characters": 0},
        {"min_characters": 9, "max_characters": 3},
        {"script": "Klingon"},
        {"script_share": 0.0},
        {"max_tokens_per_character": 0.0},
    ],
)
def test_wrong_settings_are_refused(settings):
    with pytest.raises(UserError):
        FilterConfig(**settings)


def test_what_was_dropped_is_not_tokenized(tmp_path, scenes):
    """Duplicates on both sides of the split, and noise that makes a token of each character."""
    noise = "".join(chr(0x4E00 + (number * 7919) % 20_000) for number in range(300))
    lines = [*scenes[:120], *scenes[:30], noise]
    for number, text in enumerate(lines):
        (tmp_path / f"{number:03}.txt").write_text(text)
    filters = FilterConfig(exact=True, max_tokens_per_character=0.9)
    config = DataConfig(files=(f"{tmp_path}/*.txt",), tokenizer_kind="bpe", cache=str(tmp_path / "c"), filters=filters)
    prepared = prepare(config, 500, for_masked_lm=False)
    stores = [*prepared.train.values(), *prepared.validation.values()]
    assert sum(store.manifest["documents"] for store in stores) == 120
    assert prepared.train["text"].manifest["filtered"] == {"exact duplicate": 30}
    assert sum(store.manifest["dropped"].get("tokens per character", 0) for store in stores) == 1


@pytest.mark.parametrize("size", [0, 100, 500])
def test_decisions_that_were_cut_off_are_made_again(scenes, tmp_path, size):
    for number, text in enumerate([*scenes[:20], scenes[3]]):
        (tmp_path / f"{number:02}.txt").write_text(text)
    config = DataConfig(
        files=(f"{tmp_path}/*.txt",),
        tokenizer_kind="bpe",
        filters=FilterConfig(exact=True),
        cache=str(tmp_path / "cache"),
    )
    first = prepare(config, 400, for_masked_lm=False)
    (path,) = (tmp_path / "cache").glob("filters-*.npz")
    path.write_bytes(path.read_bytes()[:size])
    again = prepare(config, 400, for_masked_lm=False)
    assert again.train["text"].manifest == first.train["text"].manifest and Decisions.load(path)
    assert again.train["text"].manifest["filtered"] == {"exact duplicate": 1}
