"""The doors in two processes: the same results, files and reports as in one."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.timeout(400)

KINDS = {"fruit": "apple pear plum", "bird": "crow robin wren", "tool": "saw axe file"}
PRETRAIN = ("--eval-rows", 8, "--log-every", 1, "--eval-every", 4, "--steps", 2, "--json")


def sentences(count: int) -> str:
    kinds = sorted(KINDS)
    rows = []
    for number in range(count):
        kind = kinds[number % 3]
        words = KINDS[kind].split()
        rows.append({"sentence": f"we saw the {words[number % len(words)]} here", "label": kind})
    return "".join(json.dumps(row) + "\n" for row in rows)


def result(group) -> dict:
    return json.loads(group.out(0).splitlines()[-1])


def test_pretraining_then_finetuning_in_two_processes_equals_one(run, tmp_path):
    """mlm and then finetune, parameters split over all devices, with export; the second starts from the first."""
    (tmp_path / "train.jsonl").write_text(sentences(32))
    (tmp_path / "validation.jsonl").write_text(sentences(12))
    outcomes = {}
    for name, count in (("together", 2), ("alone", 1)):
        options = {"devices": 4 // count, "flags": count > 1}
        split = ("--mesh.data", 1, "--mesh.fsdp", 4)
        pretrained = run(
            count, "mlm.pretrain", "debug", "--run-dir", f"{name}-mlm", "--export", f"{name}-hf", *PRETRAIN, *split,
            **options,
        )  # fmt: skip
        tuned = run(
            count, "finetune.train", "classify-debug", "--run-dir", f"{name}-tuned", "--init-from", f"{name}-mlm",
            "--data.train", "train.jsonl", "--data.validation", "validation.jsonl", "--steps", 3, "--batch-size", 8,
            "--export", f"{name}-tuned-hf", "--json", *split, **options,
        )  # fmt: skip
        outcomes[name] = result(pretrained), result(tuned)
        for group in (pretrained, tuned):
            assert all(group.out(number) == "" and group.err(number) == "" for number in range(1, count)), group.told()
    for together, alone in zip(*outcomes.values(), strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert together["eval"] == pytest.approx(alone["eval"], rel=1e-5)
        assert together.get("metrics") == alone.get("metrics")
        assert together["step"] == alone["step"] and together["finished"]
    for folder in ("mlm", "tuned"):
        there = [sorted(path.name for path in (tmp_path / f"{name}-{folder}").iterdir()) for name in outcomes]
        assert there[0] == there[1] and {"report.html", "config.json", "summary.json", "metrics.jsonl"} <= set(there[0])
    for file in ("mlm/samples.json", "tuned/predictions.jsonl", "tuned/confusion.json"):
        folder, _, rest = file.partition("/")
        texts = [(tmp_path / f"{name}-{folder}" / rest).read_text() for name in outcomes]
        assert [len(text.splitlines()) for text in texts][0] > 0
        if file.startswith("tuned/confusion"):
            assert texts[0] == texts[1]
    for folder in ("hf", "tuned-hf"):
        one, two = (load_file(tmp_path / f"{name}-{folder}" / "model.safetensors") for name in outcomes)
        assert one.keys() == two.keys() and all(np.allclose(one[key], two[key], rtol=1e-4, atol=1e-5) for key in one)


def test_caches_of_their_own_and_flags_that_differ(run, tmp_path):
    """Each host prepares its text where there is no common cache; another text on one of them is refused."""

    def cache(number):
        return {"environment": {"ESPALIER_CACHE": str(tmp_path / f"cache-{number}")}}

    (tmp_path / "text.txt").write_text("the crow and the wren saw the plum\n\n" * 300)
    flags = ("--data.files", "text.txt", *PRETRAIN)
    run(2, "clm.pretrain", "debug", "--run-dir", "own", *flags, each=cache)
    assert len(list(tmp_path.glob("cache-*/tokenizer-*"))) == 2

    (tmp_path / "other.txt").write_text("the robin and the crow ate the pear\n\n" * 300)

    def other(number):
        return {"arguments": ["--data.files", ("text.txt", "other.txt")[number]]}

    group = run(2, "clm.pretrain", "debug", "--run-dir", "other", *flags[2:], codes=2, each=other)
    for number in range(2):
        (line,) = group.lines(number)
        assert "process 1 has other settings than process 0: fingerprints." in line
    assert not (tmp_path / "other").exists()
