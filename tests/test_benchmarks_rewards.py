"""The benchmarks of preferences, rewards and clicks: their data and figures by hand, and each run whole, tiny."""

import argparse
import dataclasses
import json
import math
import pathlib
import random
import sys

import jax
import numpy as np
import pytest
from tiny_models import LLAMA
from tiny_runs import write_run

import espalier
from benchmarks import clicks, reinforce, steering
from finetune.tasks.reinforce.rewards import arithmetic

GOOD, BAD = "a moving and very funny film of number {} in all", "a dull and tedious film that is number {} of all"
BOOK = "He said so. " + " ".join(
    f"The {word} man walked slowly along the river until he came to the old house in the evening." for word in
    ("tall", "old", "young", "poor", "rich", "kind", "blind", "brave", "sad", "quiet", "proud", "small")
)  # fmt: skip


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    root = tmp_path_factory.mktemp("steering")
    rows = [f"{(BAD, GOOD)[number % 2].format(number)} \t{number % 2}" for number in range(1200)]
    (root / "sst.tsv").write_text("\n".join(["sentence\tlabel", *rows]))
    (root / "book.txt").write_text(BOOK)
    write_run(root / "base", LLAMA, [BOOK, *rows])
    return root


def test_sentences_and_openings_are_each_used_once(there):
    pairs = steering.sentiment_pairs(there / "sst.tsv", 100, 0)
    assert all(pair["chosen"].startswith("a moving") and pair["rejected"].startswith("a dull") for pair in pairs)
    assert len({text for pair in pairs for text in pair.values()}) == 200
    found = steering.openings(there / "book.txt", 20, 0)
    assert sorted(found)[:2] == ["The blind man walked slowly", "The brave man walked slowly"] and len(found) == 12


def test_the_divergence_is_that_of_the_texts_token_by_token(there):
    """Another model with other weights; the end of a text is left out, the prompt too."""
    base = espalier.load(there / "base")
    tuned = dataclasses.replace(base, params=jax.tree.map(lambda x: x * 1.1, base.params))
    prompts, texts = ["The old", "He said"], [" man walked", " so in the evening"]

    def logprob(model, prompt, text):
        ids = [model.tokenizer.bos_token_id, *model.tokenizer(prompt + text, add_special_tokens=False).input_ids]
        before = len(model.tokenizer(prompt, add_special_tokens=False).input_ids) + 1
        tokens = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), int)}
        scores = np.float64(np.asarray(model.logits(tokens)[0]))
        logs = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
        return sum(logs[at - 1, ids[at]] for at in range(before, len(ids)))

    expected = np.mean([logprob(tuned, *two) - logprob(base, *two) for two in zip(prompts, texts, strict=True)])
    assert steering.divergence(tuned, base, prompts, texts) == pytest.approx(expected, abs=1e-4)
    assert steering.divergence(base, base, prompts, texts) == 0


def test_steering_runs_whole_and_its_control_has_the_same_pairs(there, tmp_path, capsys):
    given = dict(
        base=str(there / "base"), sst=there / "sst.tsv", text=there / "book.txt", folder=tmp_path, no_judge=False,
        losses=["simpo", "reinforce"], pairs=150, reward_steps=2, prompts=8, held_out=2, samples=3, steps=2, dev=2,
        rate=1e-3, beta=0.1,
    )  # fmt: skip
    steering.run(argparse.Namespace(**given))
    said = capsys.readouterr().out
    for words in ("reward models prefer the positive sentence in", "base: mean score", "simpo (scored): preferred to",
                  "reinforce (scored): preferred to", "dpo (lot): preferred to the base in"):  # fmt: skip
        assert words in said
    made, lot = (
        [json.loads(line) for line in (tmp_path / f"{name}.train.jsonl").read_text().splitlines()]
        for name in ("scored", "lot")
    )
    assert [{row["chosen"], row["rejected"]} for row in made] == [{row["chosen"], row["rejected"]} for row in lot]
    assert (tmp_path / "judge" / "summary.json").exists()


@pytest.fixture
def commands(monkeypatch):
    """Processes find the house, as from launch.sh."""
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parent.parent))


@pytest.mark.soak
def test_reinforcement_and_preferences_on_sums_stand_side_by_side(commands, tmp_path, monkeypatch, capsys):
    """One step of each; pairs are a right and a wrong answer to the same sum."""
    monkeypatch.setattr(reinforce, "DRAWN", 64)
    monkeypatch.setattr(reinforce, "LARGEST", 4)
    monkeypatch.setattr(reinforce, "HELD_OUT", 5)
    words = [str(tmp_path), "--variants", "rloo", "dpo", "--pretrain", "60", "--steps", "1"]
    monkeypatch.setattr(sys, "argv", ["reinforce", *words])
    reinforce.main()
    said = capsys.readouterr().out
    assert set(reinforce.results(tmp_path)) == {"imitation", "rloo-0", "dpo-0"}
    assert "rloo           seeds 1  pass@1 0." in said and "dpo            seeds 1" in said
    rows = [json.loads(line) for line in (tmp_path / "pairs-0.train.jsonl").read_text().splitlines()]
    for row in rows:
        result = row["prompt"].removesuffix("=")
        assert arithmetic(row["chosen"], result) == 1 and arithmetic(row["rejected"], result) == 0


def test_clicks_are_those_of_the_model_of_looking():
    """Of 2,000 lists, clicks at each place are 1/k of what is relevant, and a tenth of that of the others."""
    draw = random.Random(0)
    sentences = [(f"{'x' * (number % 50)} {number}", number % 2) for number in range(2000 * clicks.SIZE)]
    shown = clicks.lists(sentences, 2000, draw)
    assert len({text for _, texts in shown for text, _ in texts}) == len(sentences)
    rows = [row for one in shown for row in clicks.clicks(one, draw)]
    relevant = {(query, text): grade for query, texts in shown for text, grade in texts}
    for position in (1, 2, 5):
        at = [row for row in rows if row["position"] == position]
        for grade, rate in ((1, 1.0), (0, clicks.NOISE)):
            found = [row["click"] for row in at if relevant[row["query"], row["text"]] == grade]
            chance = rate / position
            assert abs(np.mean(found) - chance) < 5 * math.sqrt(chance / len(found))
    first = [len(row["text"]) for row in rows if row["position"] == 1]
    assert np.mean(first) < np.mean([len(text) for text, _ in sentences]) / 2
    with_short = [("q", [("a", 1), ("bb", 0)]), ("q", [("a", 0), ("bb", 1)])]
    assert clicks.short_first(with_short) == pytest.approx((1 + 1 / math.log2(3)) / 2)


@pytest.mark.soak
def test_rankers_of_clicks_run_whole(commands, there, tmp_path, monkeypatch, capsys):
    words = [str(there / "sst.tsv"), str(there / "sst.tsv"), str(tmp_path), "--lists", "8", "--pretrain", "1"]
    monkeypatch.setattr(sys, "argv", ["clicks", *words, "--steps", "1", "--variants", "ips", "supervised"])
    clicks.main()
    said = capsys.readouterr().out
    for name in ("short first ", "ips ", "supervised "):
        assert f"\n{name}" in "\n" + said
