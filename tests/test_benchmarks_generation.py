"""The benchmark of drawing: both draw the same ids from the same weights, and slots take fewer turns than batches."""

import json

import pytest

from benchmarks import generation

TINY = (
    '{"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 500}'
)


def test_both_draw_the_same_and_the_bound_is_by_hand(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generation, "bandwidth", lambda: 10e9)
    monkeypatch.setattr(generation, "product_rate", lambda: 100e9)
    given = ["--model", TINY, "--rows", "3", "--new", "12", "--uneven", "8", "--slots", "2", "--rounds", "1"]
    found = generation.main([*given, "--out", str(tmp_path / "found.json")])
    assert json.loads((tmp_path / "found.json").read_text()) == json.loads(json.dumps(found))
    [alike], uneven = found["alike"], found["uneven"]
    assert alike["same_ids"] == 1.0
    weights = 2 * (64 * 192 + 64 * 64 + 2 * 64 * 128) + 64 * 500
    cache = 2 * 64 * 2 * (32 + 12 / 2) * 3
    memory, arithmetic = 4 * (weights + cache) / 10e9, 2 * 3 * weights / 100e9
    assert memory > arithmetic and alike["bound"] == {
        "tokens_per_second": pytest.approx(3 / memory),
        "by": "memory",
    }
    assert uneven["turns"]["espalier, slots"] < uneven["turns"]["espalier, batches"]
    assert uneven["tokens_per_second"].keys() == uneven["turns"].keys() and len(uneven["turns"]) == 3
    text = capsys.readouterr().out
    assert "| 3 alike | transformers | " in text and "| 8 uneven, 2 at once | bound, by memory | " in text
