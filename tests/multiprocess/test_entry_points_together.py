"""The entry points in two processes: the same results, files and reports as in one."""

import dataclasses
import json

import numpy as np
import pytest
from labelled_words import DECODER, ENCODER, TEXTS, sentences, write_jsonl
from safetensors.numpy import load_file
from tiny_runs import write_run

import finetune.train
import mlm.pretrain
from finetune.presets import PRESETS as FINETUNE
from finetune.tasks.classify.record import ClassifyData
from finetune.tasks.reward.record import RewardConfig, RewardData
from mlm.presets import PRESETS as MLM
from sharding.mesh import MeshConfig

pytestmark = pytest.mark.timeout(400)

SPLIT = MeshConfig(data=1, fsdp=4)
FLAGS = ("--mesh.data", 1, "--mesh.fsdp", 4, "--json")


def same_results(together: dict, alone: dict) -> None:
    assert together["finished"] and together["step"] == alone["step"]
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert together["eval"] == pytest.approx(alone["eval"], rel=1e-5)


def same_weights(one, two) -> None:
    one, two = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-4, atol=1e-5)


def spoken(group) -> dict:
    """The --json object of process 0; the other says nothing."""
    assert group.out(1) == "" and group.err(1) == "" == group.err(0), group.told()
    return json.loads(group.out(0).splitlines()[-1])


def names(folder) -> list[str]:
    """What lies in a run directory, but for what libraries said to commands."""
    return sorted(path.name for path in folder.iterdir() if not path.match("log*.txt"))


def test_pretraining_with_a_cache_on_each_host(run, tmp_path):
    """Parameters split over both processes; samples, report and export are written by the first."""

    def cache(number):
        return {"environment": {"ESPALIER_CACHE": str(tmp_path / f"cache-{number}")}}

    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    text.write_text("the crow and the wren saw the plum\n\n" * 300)
    other.write_text("the robin and the crow ate the pear\n\n" * 300)
    shape = ("--model.num-hidden-layers", 1, "--data.sequence-length", 16, "--eval-rows", 8, "--steps", 2)
    flags = ("mlm.pretrain", "debug", *shape, *FLAGS)
    group = run(2, *flags, "--data.files", text, "--run-dir", "both", "--export", "both-hf", flags=True, each=cache)
    together = spoken(group)
    assert len(list(tmp_path.glob("cache-*/tokenizer-*"))) == 2

    config = MLM["debug"]()
    alone = mlm.pretrain.main(
        dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, num_hidden_layers=1),
            data=dataclasses.replace(config.data, files=(str(text),), sequence_length=16),
            eval_rows=8,
            steps=2,
            mesh=SPLIT,
            run_dir=str(tmp_path / "one"),
            export=str(tmp_path / "one-hf"),
        )
    )
    same_results(together, alone)
    same_weights(tmp_path / "both-hf", tmp_path / "one-hf")
    assert names(tmp_path / "both") == names(tmp_path / "one")
    assert {"report.html", "samples.json", "summary.json"} <= set(names(tmp_path / "both"))

    # A host with another text is refused by all, before anything is written.
    def differs(number):
        return cache(number) | {"arguments": ["--data.files", (text, other)[number]]}

    group = run(2, *flags, "--run-dir", "other", codes=2, each=differs)
    for number in range(2):
        line = group.line(number)
        assert "process 1 has other settings than process 0: fingerprints." in line
    assert not (tmp_path / "other").exists()


@pytest.mark.soak
def test_finetuning(run, tmp_path):
    base = write_run(tmp_path / "base", dataclasses.replace(ENCODER, classifier_pooling="cls"), TEXTS)
    train, validation = (write_jsonl(tmp_path / f"{n}.jsonl", sentences(n)) for n in (32, 13))
    files = ("--data.train", train, "--data.validation", validation, "--init-from", base)
    shape = ("--steps", 3, "--batch-size", 8, "--export", "both-hf")
    group = run(2, "finetune.train", "classify-debug", "--run-dir", "both", *files, *shape, *FLAGS)
    together = spoken(group)
    alone = finetune.train.main(
        dataclasses.replace(
            FINETUNE["classify-debug"](),
            data=ClassifyData(train=train, validation=validation),
            init_from=str(base),
            steps=3,
            batch_size=8,
            mesh=SPLIT,
            run_dir=str(tmp_path / "one"),
            export=str(tmp_path / "one-hf"),
        )
    )
    same_results(together, alone)
    # Of probabilities, which agree to rounding; all others count labels.
    calibration = [found["metrics"].pop("calibration_error") for found in (together, alone)]
    assert calibration[0] == pytest.approx(calibration[1], abs=1e-6)
    assert together["metrics"] == alone["metrics"]
    same_weights(tmp_path / "both-hf", tmp_path / "one-hf")
    assert names(tmp_path / "both") == names(tmp_path / "one")
    for name in ("confusion.json", "predictions.jsonl"):
        one, two = ((tmp_path / run / name).read_text().splitlines() for run in ("both", "one"))
        assert len(one) == len(two)
    assert (tmp_path / "both" / "confusion.json").read_text() == (tmp_path / "one" / "confusion.json").read_text()
    assert len((tmp_path / "both" / "predictions.jsonl").read_text().splitlines()) == 13


@pytest.mark.parametrize(
    "task",
    [pytest.param("prefer", marks=pytest.mark.soak), pytest.param("reward", marks=pytest.mark.soak), "reinforce"],
)
def test_preferences_and_rewards(run, tmp_path, task):
    """The reference is computed by both and written by the first, which alone asks for rewards, of a reward model, too:
    what is drawn, logged and measured is that of one process."""
    model = dataclasses.replace(DECODER, num_hidden_layers=1, max_position_embeddings=64)
    base = write_run(tmp_path / "base", model, TEXTS)
    pairs = [{"prompt": f"we saw {n % 3}", "chosen": f"the {n}", "rejected": "a" * (1 + n % 4)} for n in range(16)]
    files = [write_jsonl(tmp_path / f"{side}.jsonl", pairs[:size]) for side, size in (("train", 16), ("dev", 7))]
    flags = ["--init-from", base, "--data.train", files[0], "--data.validation", files[1], "--batch-size", 8]
    flags += ["--steps", 3, "--eval-every", 3, "--log-every", 1, "--optimizer.learning-rate", "1e-3"]
    if task == "reinforce":
        judge = RewardConfig(
            init_from=str(base), data=RewardData(*files), steps=1, run_dir=str(tmp_path / "judge"), mesh=SPLIT
        )
        finetune.train.main(judge)
        flags += ["--data.reward", "length:4", f"model:{tmp_path / 'judge'}", "--data.validation-samples", 2]
        flags += ["--policy.samples", 4, "--policy.max-new-tokens", 4, "--policy.beta", 0.1, "--policy.cut", "scored"]
        flags += ["--policy.resample", 1]
    group = run(2, "finetune.train", task, "--run-dir", "both", *flags, *FLAGS)
    together = spoken(group)
    # One process with as many devices, by the same command.
    alone = json.loads(
        run(1, "finetune.train", task, "--run-dir", "one", *flags, *FLAGS, devices=4).out(0).splitlines()[-1]
    )
    same_results(together, alone)
    assert together["metrics"] == pytest.approx(alone["metrics"], rel=1e-4, abs=1e-5)
    assert names(tmp_path / "both") == names(tmp_path / "one")
    both, one = ([json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
                 for run in ("both", "one"))  # fmt: skip
    losses = [[row["loss"] for row in rows if "loss" in row] for rows in (both, one)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=1e-6) and len(losses[0]) >= 3
    if task == "reinforce":
        written = [(tmp_path / run / "rollouts.jsonl").read_text().splitlines() for run in ("both", "one")]
        texts = [[json.loads(line)["completion"] for line in lines] for lines in written]
        assert texts[0] == texts[1]
    if task == "prefer":
        arrays = [np.load(tmp_path / run / "reference.npz") for run in ("both", "one")]
        np.testing.assert_allclose(*(file["train"] for file in arrays), rtol=1e-5)
