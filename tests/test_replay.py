"""Two runs are one, bit by bit, whatever the task; and `replay` finds the one bit that was not as it should be."""

import dataclasses
import hashlib
import itertools
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import toy
from labelled_words import ENCODER, TEXTS, write_jsonl
from tiny_runs import write_run
from toy import quick_compilation  # noqa: F401

import clm.presets
import clm.pretrain
import finetune.train
import mlm.presets
import mlm.pretrain
from espalier.commands import replay
from espalier.training.config import CheckpointConfig
from espalier.training.manifest import MANIFEST, write_manifest
from espalier.training.replay import Logged
from espalier.training.restore import restore_params
from espalier.training.run import RunDirectory
from finetune.presets import PRESETS
from sharding.mesh import MeshConfig

WORDS = ("old young grey tall".split(), "cat dog bird fish".split(), "tree river house".split(), "sun rain".split())


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A text, labelled rows and an encoder to start from."""
    folder = tmp_path_factory.mktemp("texts")
    lines = (f"the {a} {b} a {c} in the {d}.\n" for a, b, c, d in itertools.product(*WORDS))
    (folder / "text.txt").write_text("".join(lines))
    rows = [{"text": f"the {a} saw it", "label": a} for a in ("crow", "pear") * 12]
    write_jsonl(folder / "rows.jsonl", rows)
    small = dataclasses.replace(ENCODER, num_hidden_layers=1, hidden_size=16, intermediate_size=16)
    write_run(folder / "encoder", small, TEXTS)
    return folder


def train(kind: str, texts, run_dir, **changes) -> None:
    common = dict(
        run_dir=str(run_dir),
        steps=8,
        batch_size=8,
        log_every=3,
        eval_every=4,
        checksum_every=2,
        checkpoint=CheckpointConfig(every=2, keep=9),
        mesh=MeshConfig(data=2),
    )
    common |= changes
    if kind == "classify":
        base, preset = texts / "encoder", PRESETS["classify"]()
        rows = str(texts / "rows.jsonl")
        data = dataclasses.replace(preset.data, train=rows, validation=rows)
        optimizer = dataclasses.replace(preset.optimizer, learning_rate=1e-2)
        config = dataclasses.replace(preset, init_from=str(base), data=data, optimizer=optimizer, **common)
        finetune.train.main(config)
        return
    preset = {"mlm": mlm.presets, "clm": clm.presets}[kind].debug()
    model = dataclasses.replace(preset.model, vocab_size=300, num_hidden_layers=1, hidden_size=32)
    files = dict(files=(str(texts / "text.txt"),), builtin=None, cache=str(texts / "cache"))
    config = dataclasses.replace(
        preset, model=model, data=dataclasses.replace(preset.data, **files), eval_rows=8, **common
    )
    {"mlm": mlm.pretrain, "clm": clm.pretrain}[kind].main(config)


def hashes(run_dir) -> dict[str, str]:
    """SHA-256 of the last state, of what was logged but for speeds, and of the checksums."""
    run = RunDirectory(run_dir)
    records = [
        {name: value for name, value in record.items() if name not in ("tokens_per_second", "mfu")}
        for record in toy.metrics_of(run_dir)
    ]
    params = hashlib.sha256()
    for leaf in jax.tree.leaves(restore_params(run_dir)):
        params.update(leaf.tobytes())
    return {
        "params": params.hexdigest(),
        "metrics": hashlib.sha256(json.dumps(records).encode()).hexdigest(),
        "tensors": hashlib.sha256(run.checksums.read_bytes()).hexdigest(),
    }


def files_of(folder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in pathlib.Path(folder).rglob("*") if path.is_file()}


def asked(capsys, *arguments, code=0) -> str:
    """What `replay` says on its way to this exit code."""
    capsys.readouterr()
    ended = 0
    try:
        replay.command([*map(str, arguments)])
    except SystemExit as end:
        ended = end.code
    out, err = capsys.readouterr()
    assert ended == code, out + err
    return out + err


@pytest.fixture(scope="module")
def run_of(texts, tmp_path_factory):
    """kind → a run of eight steps with checkpoints 2, 4, 6 and 8, made once."""
    made = {}

    def run(kind: str) -> pathlib.Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / "run"
            train(kind, texts, made[kind])
        return made[kind]

    return run


@pytest.mark.parametrize("kind, first", [("clm", 2), ("classify", 0)])
def test_steps_that_are_executed_again_are_equal_and_nothing_is_written(run_of, capsys, kind, first):
    """From the beginning, that is a second run: of the weights that were fine-tuned, too."""
    before = files_of(run_of(kind))
    said = asked(capsys, run_of(kind), "--from", first, "--to", 8)
    compared = {0: "5 lines of checksums and 4", 2: "4 lines of checksums and 3"}[first]
    assert f"steps {first + 1} to 8: {compared} records of the loss as logged" in said
    assert files_of(run_of(kind)) == before


def flip(run_dir, step: int, path: str, bit: int) -> None:
    """Flip a bit of the first value of a parameter in a checkpoint, whose manifest is then that of what is there."""
    folder = pathlib.Path(run_dir) / "checkpoints"
    params = jax.tree.map(np.array, restore_params(run_dir, step=step))
    *outer, name = path.split("/")
    inner = params
    for key in outer:
        inner = inner[key]
    inner[name].view(np.uint32).reshape(-1)[0] ^= np.uint32(1 << bit)
    item = folder / str(step) / "params"
    shutil.rmtree(item)
    with ocp.PyTreeCheckpointer() as writer:
        writer.save(item, params)
    (folder / str(step) / MANIFEST).unlink()
    write_manifest(folder / str(step))


PARAMETER = "embeddings/token/embedding"


def test_a_flipped_bit_in_a_sound_checkpoint_is_found_from_the_one_before(run_of, texts, tmp_path, capsys):
    shutil.copytree(run_of("clm"), tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/8")
    shutil.rmtree(tmp_path / "run/checkpoints/6")
    flip(tmp_path / "run", 4, PARAMETER, bit=3)
    train("clm", texts, tmp_path / "run")
    said = capsys.readouterr().out
    assert "resumed at step 4" in said
    assert f"checkpoint 4 did not come back as the run left it: params/{PARAMETER};" in said
    said = asked(capsys, tmp_path / "run", "--from", 2, "--to", 8, code=1)
    assert f": params/{PARAMETER} differs first (1 of " in said
    assert "the session that began at step 4 began with another than step 4 left" in said
    # The checkpoint itself says so too, and without the two lines of step 4 the steps between the next lines.
    said = asked(capsys, tmp_path / "run", "--from", 4, code=1)
    assert f": params/{PARAMETER} differs first (1 of " in said
    assert "the checkpoint of step 4 is not what was logged at that step" in said
    log = tmp_path / "run/checksums.jsonl"
    lines = [line for line in log.read_text().splitlines(keepends=True) if json.loads(line)["step"] != 4]
    log.write_text("".join(lines))
    said = asked(capsys, tmp_path / "run", "--from", 2, "--json", code=1)
    assert "it arose within steps 3 to 6" in said
    found = json.loads(next(line for line in said.splitlines() if line.startswith("{")))["difference"]
    assert (found["after"], found["step"]) == (2, 6) and f"params/{PARAMETER}" in found["tensors"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["mlm", "clm", "classify"])
def test_two_runs_of_three_hundred_steps_are_equal(texts, tmp_path, kind):
    more = dict(steps=300, log_every=10, eval_every=100, checksum_every=10, checkpoint=CheckpointConfig(every=100))
    for name in "ab":
        train(kind, texts, tmp_path / name, **more)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


HERE = {"jax": "0.10.1", "devices": "2 × cpu", "processes": 1, "mesh": {"data": 2}, "accumulation": 1}


def sums(step: int, wrong: tuple[str, ...] = ()) -> dict[str, str]:
    return {path: f"{step:016x}" if path not in wrong else "f" * 16 for path in ("params/a", "params/b", "optimizer/a")}


def logged_run(folder, lines: dict, losses: dict[int, float], there: dict = HERE) -> RunDirectory:
    """What a run has logged: (step, whether a session began there) → sums, with log_every 2."""
    run = RunDirectory(folder)
    run.path.mkdir()
    records = [
        {"step": step, "sums": found} | ({"began": there, "log_every": 2} if began else {})
        for (step, began), found in lines.items()
    ]
    run.checksums.write_text("".join(json.dumps(record) + "\n" for record in records))
    run.metrics.write_text("".join(json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in losses.items()))
    return run


def compared(run: RunDirectory, here: dict = HERE, last: int = 8) -> Logged:
    """As `replay` does from checkpoint 2 on, where step s has the loss s."""
    log = Logged(run, 2, last, here, 10, {"steps": 1, "sums": {"loss": 9.0}}, restored=True)
    for step in range(2, last + 1):
        if log.has_sums(step):
            log.compare_sums(step, sums(step))
        if step > 2:
            log.compare_loss(step, float(step))
    return log


MEANS = {1: 1.0, 2: 1.5, 4: 3.5, 6: 5.5, 8: 7.5}


def test_what_a_device_got_wrong_is_named_with_its_steps(tmp_path):
    lines = {(0, True): sums(0), (2, False): sums(2), (4, False): sums(4)}
    right = logged_run(tmp_path / "right", lines | {(6, False): sums(6), (8, False): sums(8)}, MEANS)
    found = compared(right)
    assert (found.difference, found.checksums, found.losses, found.apart) == (None, 4, 3, None)
    wrong = {(6, False): sums(6, ("params/b",)), (8, False): sums(8, ("params/a", "params/b", "optimizer/a"))}
    found = compared(logged_run(tmp_path / "wrong", lines | wrong, MEANS | {8: 7.25})).difference
    assert str(found) == "params/b differs first (1 of 3 tensors): it arose within steps 5 to 6"
    # Without checksums, losses tell; their means are over the steps since the last multiple of log_every.
    found = compared(logged_run(tmp_path / "losses", {(0, True): sums(0)}, MEANS | {6: 5.75})).difference
    assert str(found) == "the loss logged at step 6 is 5.75, and here 5.5: it arose within steps 5 to 6"


def test_other_surroundings_are_said_and_losses_compared_within_a_tolerance(tmp_path):
    lines = {(0, True): sums(0), (2, False): sums(2), (4, False): sums(40), (6, True): sums(60), (8, False): sums(80)}
    there = HERE | {"jax": "0.7.2"}
    run = logged_run(tmp_path / "run", lines, MEANS | {4: 3.51}, there)
    found = compared(run)
    assert found.difference is None and found.apart == "jax was 0.7.2 and is 0.10.1"
    assert (found.checksums, found.losses) == (1, 3) and found.furthest == pytest.approx(0.01 / 3.51)
    found = compared(logged_run(tmp_path / "far", lines, MEANS | {4: 3.6}, there)).difference
    assert str(found).startswith("the loss logged at step 4 is 3.6, and here 3.5")
    # A session that began elsewhere began with the same bits.
    lines[4, False], lines[6, True] = sums(4), sums(6, ("params/a",))
    found = compared(logged_run(tmp_path / "there", lines, MEANS)).difference
    assert found and found.began and found.tensors == ("params/a",) and found.step == 6


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--from", 3], "--from 3: .* has no such checkpoint; there are 0, 2, 4, 6, 8"),
        (["--from", 4, "--to", 4], "--from 4 --to 4: .* has logged steps up to 8; --to lies after --from"),
        (["--from", 4, "--to", 9], "has logged steps up to 8"),
    ],
)
def test_steps_that_are_not_there_are_refused(run_of, capsys, arguments, words):
    assert re.search(words, asked(capsys, run_of("clm"), *arguments, code=2))


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert "holds no run (no config.json)" in asked(capsys, tmp_path, code=2)
