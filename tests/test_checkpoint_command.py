"""`checkpoint list|verify|show`, and what commands say that take another step than the newest."""

import contextlib
import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import pytest
from tiny_models import GPT, same
from tiny_runs import write_run
from toy import quick_compilation  # noqa: F401

from espalier.commands import checkpoint
from espalier.commands.convert import ExportConfig, export_model
from espalier.loading import load
from espalier.training.checkpoint import Checkpoints
from espalier.training.config import CheckpointConfig, OptimizerConfig
from espalier.training.manifest import complete_steps
from espalier.training.restore import read_config, restore_params
from espalier.training.run import RunDirectory
from espalier.training.state import new_state

TEXTS = ["the cat sat on the mat", "a dog ran over the green field"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A decoder of steps 0, 1 and 2, each with other weights."""
    run = RunDirectory(write_run(tmp_path_factory.mktemp("made") / "run", GPT, TEXTS))
    config = read_config(run.path)
    first = new_state(restore_params(run.path), lambda params: {}, OptimizerConfig(), jax.random.key(0))
    with contextlib.closing(Checkpoints(run.checkpoints, CheckpointConfig(keep=9), lambda line: None)) as checkpoints:
        for step in (1, 2):
            params = jax.tree.map(lambda leaf, step=step: jnp.asarray(leaf * (1 + step)), first.params)
            state = dataclasses.replace(first, params=params, step=jnp.asarray(step, first.step.dtype))
            checkpoints.save(state, config, {"step": step, "tokens": 100 * step})
            checkpoints.wait()
    return run.path


@pytest.fixture
def run(made, tmp_path):
    shutil.copytree(made, tmp_path / "run")
    return RunDirectory(tmp_path / "run")


def asked(capsys, *arguments, code=0) -> tuple[list[str], dict]:
    """(lines, the JSON object) of the command; of one that is refused, what it says."""
    capsys.readouterr()
    ended = 0
    try:
        checkpoint.command([*map(str, arguments), "--json"])
    except SystemExit as exit:
        ended = exit.code
    out, err = capsys.readouterr()
    assert ended == code, out + err
    lines = out.splitlines()
    return (lines[:-1], json.loads(lines[-1])) if code != 2 else (err.splitlines(), {})


def cut(run, step, item="params"):
    path = max((run.checkpoints / str(step) / item).rglob("d/*"), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[:-5])
    return str(path.relative_to(run.checkpoints / str(step))), path.stat().st_size


def test_list_shows_what_is_there_by_its_looks(run, capsys):
    name, size = cut(run, 1)
    run.best.write_text('{"step": 0}')
    shutil.copytree(run.checkpoints / "1", run.checkpoints / "1.damaged")
    (run.checkpoints / "7").mkdir()
    (run.checkpoints / "7.unfinished").touch()
    lines, found = asked(capsys, "list", run.path)
    rows = {line.split()[0]: line for line in lines}
    assert list(rows) == ["step", "0", "1", "1.damaged", "2", "7"]
    assert rows["0"].endswith("  complete, the best") and rows["2"].endswith("  complete")
    assert f"damaged: {name} has {size:,} bytes of {size + 5:,}" in rows["1"]
    assert rows["1.damaged"].endswith("  set aside") and rows["7"].endswith("  unfinished")
    states = [(row["step"], row["state"], row["best"]) for row in found["checkpoints"]]
    assert states[:2] == [(0, "complete", True), (1, "damaged", False)]


def test_verify_reads_every_file_and_fails_where_one_is_damaged(run, capsys):
    lines, found = asked(capsys, "verify", run.path)
    assert [line.split(" (")[0] for line in lines] == ["step 0: sound", "step 1: sound", "step 2: sound"]
    assert found["damaged"] == 0
    path = next((run.checkpoints / "2" / "data").glob("metadata"))
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 2]) + content[1:])
    lines, found = asked(capsys, "verify", run.path, code=1)
    assert lines[2] == "step 2: damaged: data/metadata is not as it was written" and found["damaged"] == 1
    lines, _ = asked(capsys, "verify", run.path, "--step", 1)
    assert len(lines) == 1


def test_show_lists_tensors_totals_and_where_data_goes_on(run, capsys):
    lines, found = asked(capsys, "show", run.path)
    params = restore_params(run.path)
    assert found["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert found["parameter_bytes"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    by_path = {one["path"]: one for one in found["tensors"] if one["item"] == "params"}
    embedding = by_path["embeddings/token/embedding"]
    assert embedding["shape"] == list(params["embeddings"]["token"]["embedding"].shape)
    assert (embedding["type"], found["step"], found["data"]) == ("float32", 2, {"step": 2, "tokens": 200})
    assert any("data goes on" in line and "tokens 200" in line for line in lines)
    assert asked(capsys, "show", run.path, "--step", 1)[1]["data"]["step"] == 1


def test_what_is_not_there_is_refused(run, capsys, tmp_path):
    for arguments, words in (
        (("show", run.path, "--step", 5), "no checkpoint of step 5 .*there are 0, 1, 2"),
        (("list", tmp_path / "nothing"), "no checkpoint in .*nothing.*give the folder of a run"),
        (("repair", run.path), "'repair' is not one of 'list', 'verify', 'show'"),
    ):
        (line,), _ = asked(capsys, *arguments, code=2)
        assert re.search(words, line), line


def test_load_and_export_take_the_newest_sound_step_and_say_which(run, tmp_path, capsys):
    name, size = cut(run, 2)
    warning = f"warning: {run.path}: step 2 is damaged ({name} has {size:,} bytes of {size + 5:,}); step 1 is taken"
    capsys.readouterr()
    model = load(run.path)
    assert capsys.readouterr().out.startswith(f"{warning}, the newest sound one\n")
    same(model.params, restore_params(run.path, step=1))
    found = export_model(ExportConfig(str(run.path), str(tmp_path / "exported")))
    out = capsys.readouterr().out
    assert found["step"] == 1 and warning in out and out.endswith(", float32, step 1\n")
    assert complete_steps(run.checkpoints) == [0, 1, 2]
