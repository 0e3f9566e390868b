"""The entry points in two processes: the same results, files and reports as in one."""

import dataclasses
import json

import numpy as np
import pytest
from labelled_words import ENCODER, TEXTS, sentences, write_jsonl
from safetensors.numpy import load_file
from tiny_runs import write_run

import finetune.train
import mlm.pretrain
from finetune.presets import PRESETS as FINETUNE
from finetune.tasks.classify.record import ClassifyData
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
