"""The command line, end to end: train, pause, resume, fork, generate, and bad input. What begins and ends a process is
the same for every command, so one of each kind runs in a process of its own and the others here."""

import gzip
import json

import jax
import numpy as np
import pytest

from espalier.training.restore import restore_params

ENTRIES = ("mlm", "clm")
QUICK = ("--eval-rows", 8, "--log-every", 1, "--eval-every", 4, "--checkpoint.every", 2, "--json")


def last_json(result) -> dict:
    return json.loads(result.stdout.splitlines()[-1])


def pretrain(run_cli, entry, run_dir, *flags, **options):
    return run_cli(f"{entry}.pretrain", "debug", "--run-dir", run_dir, *QUICK, *flags, **options)


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_paused_run_goes_on_bitwise(request, tmp_path, entry):
    call_cli = request.getfixturevalue("call_cli")
    run_cli = request.getfixturevalue("run_cli") if entry == "mlm" else call_cli
    whole = last_json(pretrain(run_cli, entry, tmp_path / "whole", "--steps", 4))
    assert last_json(pretrain(run_cli, entry, tmp_path / "parts", "--steps", 4, "--stop-at", 2))["step"] == 2
    parts = last_json(pretrain(run_cli, entry, tmp_path / "parts", "--steps", 4))
    assert parts["step"] == whole["step"] == 4
    assert parts["loss"] == whole["loss"] and parts["eval"] == whole["eval"]
    one, two = (restore_params(tmp_path / name) for name in ("whole", "parts"))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    losses = []
    for name in ("whole", "parts"):
        records = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses.append([(record["step"], record["loss"]) for record in records if "loss" in record])
    assert losses[0] == losses[1]

    for name in ("config.json", "tokenizer/tokenizer.json", "samples.json", "summary.json", "report.html"):
        assert (tmp_path / "whole" / name).is_file(), name
    assert list((tmp_path / "whole" / "tensorboard").iterdir())
    keys = {"step", "loss", "eval", "tokens", "tokens_per_second", "first_step_seconds", "run_dir"}
    assert keys <= whole.keys()
    assert whole["tokens"] == 4 * 8 * 64
    expected = {"mlm": {"loss", "perplexity", "accuracy"}, "clm": {"loss", "perplexity", "bits_per_byte"}}
    assert expected[entry] <= whole["eval"].keys()

    other = pretrain(call_cli, entry, tmp_path / "whole", "--steps", 6, code=2)
    assert "steps was 4, now 6" in other.stderr and "--run-dir" in other.stderr

    fork = pretrain(
        call_cli, entry, tmp_path / "fork", "--steps", 2, "--init-from", tmp_path / "whole", "--init-optimizer",
        "--seed", 1,
    )  # fmt: skip
    assert "from the weights of" in fork.stdout
    assert last_json(fork)["loss"] < 6.9


def test_a_run_on_eight_devices_equals_one_on_one(call_cli, tmp_path):
    one = last_json(pretrain(call_cli, "mlm", tmp_path / "one", "--steps", 2, "--mesh.data", 1))
    eight = last_json(pretrain(call_cli, "mlm", tmp_path / "eight", "--steps", 2, "--mesh.data", 4, "--mesh.fsdp", 2))
    assert eight["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_generate_continues_prompts_of_own_text(run_cli, call_cli, tmp_path, shared_data):
    corpus = tmp_path / "corpus.jsonl.gz"
    text = (shared_data / "tinyshakespeare" / "input.txt").read_text()
    with gzip.open(corpus, "wt") as file:
        for start in range(0, 300_000, 3000):
            file.write(json.dumps({"text": text[start : start + 3000]}) + "\n")
    pretrain(call_cli, "clm", tmp_path / "run", "--steps", 3, "--data.files", corpus)
    result = run_cli(
        "clm.generate", "--run-dir", tmp_path / "run", "--prompt", "ROMEO:", "First Citizen", "--json",
        "--sampling.max-new-tokens", 8, "--sampling.top-k", 20, "--sampling.top-p", 0.9,
    )  # fmt: skip
    out = last_json(result)
    assert out["prompts"] == ["ROMEO:", "First Citizen"] and len(out["completions"]) == 2
    assert "ROMEO:" in result.stdout


BAD_INPUT = {
    "glob": ("mlm", ["--data.files", "nothing/*.txt"], "no file matches nothing/*.txt"),
    "empty": ("mlm", ["--data.files", "empty.txt"], "empty.txt: holds no text"),
    "utf8": ("clm", ["--data.files", "latin.txt"], "latin.txt:2: byte 0xef is not valid UTF-8"),
    "json": ("mlm", ["--data.files", "broken.jsonl"], "broken.jsonl:2: not JSON"),
    "field": ("mlm", ["--data.files", "field.jsonl"], "field.jsonl:1: no field 'text'"),
    "batch": ("mlm", ["--batch-size", "10", "--mesh.data", "4"], "try 8 or 12"),
    "mesh": ("clm", ["--mesh.data", "16"], "needs 16 devices and there are 8"),
    "init": ("clm", ["--init-from", "nowhere"], "no checkpoint in"),
    "tokenizer": ("mlm", ["--data.tokenizer", "nowhere"], "no tokenizer at nowhere"),
    "length": ("mlm", ["--data.sequence-length", "128"], "--model.max-position-embeddings 128"),
    "one word": ("mlm", ["--data.files", "word.txt"], "no row of tokens"),
    "warm-up": ("clm", ["--optimizer.warmup", "1000"], "longer than the run"),
    "flag": ("mlm", ["--optimizer.learning-rat", "1"], "--optimizer.learning-rate"),
}
"""name → (entry, flags, what the line must say)"""


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing(request, tmp_path, name):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"fine\nna\xefve\n")
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "word.txt").write_text("word")
    (tmp_path / "field.jsonl").write_text('{"body": "fine"}\n')
    before = sorted(tmp_path.rglob("*"))
    entry, flags, message = BAD_INPUT[name]
    call = request.getfixturevalue("run_cli" if name in ("utf8", "length") else "call_cli")
    result = pretrain(call, entry, tmp_path / "run", *flags, code=2)
    assert message in result.stderr, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert sorted(tmp_path.rglob("*")) == before
