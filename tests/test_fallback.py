"""A damaged checkpoint is set aside, and the run goes on from the newest sound one as if nothing had happened."""

import hashlib
import json
import pathlib
import random
import shutil

import jax
import numpy as np
import pytest
import toy
from toy import quick_compilation  # noqa: F401

from espalier.errors import UserError
from espalier.training import fallback, manifest
from espalier.training.config import CheckpointConfig
from espalier.training.fallback import given_step, resumed_step
from espalier.training.manifest import complete_steps
from espalier.training.restore import read_config, restore_params
from espalier.training.run import RunDirectory

SETTINGS = dict(steps=6, checkpoint=CheckpointConfig(every=2, keep=9), eval_every=2, keep_best="loss")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with frozen parameters, collected arrays and a best checkpoint: steps 2, 4 and 6, and its result."""
    folder = tmp_path_factory.mktemp("whole")
    result = toy.run(toy.config(folder / "run", **SETTINGS), **toy.partly_frozen())
    (folder / "run").rename(folder / "kept")
    return folder / "kept", result


@pytest.fixture
def run(whole):
    """The same run in its own place, to be damaged."""
    path = whole[0].with_name("run")
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(whole[0], path)
    return RunDirectory(path)


def files_of(run: RunDirectory, step: int) -> list[pathlib.Path]:
    return sorted(path for path in (run.checkpoints / str(step)).rglob("*") if path.is_file())


def flip(path: pathlib.Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def damage(run: RunDirectory, step: int, item: str = "opt_state") -> str:
    """Flip a bit in the largest file of an item of a checkpoint; its name."""
    files = [path for path in files_of(run, step) if item in path.parts]
    path = max(files, key=lambda path: path.stat().st_size)
    flip(path, 999)
    return str(path.relative_to(run.checkpoints / str(step)))


def metrics_without_times(run_dir):
    return [{name: x for name, x in one.items() if "second" not in name} for one in toy.metrics_of(run_dir)]


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.mark.parametrize("damaged", [(6,), (6, 4)])
def test_a_run_falls_back_and_goes_on_bit_for_bit(whole, run, damaged, capsys):
    names = {step: damage(run, step) for step in damaged}
    log = run.metrics.read_text()
    again = toy.run(toy.config(run.path, **SETTINGS), **toy.partly_frozen())
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    last = min(damaged) - 2
    assert said == [
        f"warning: checkpoint {step} is damaged ({names[step]} is not as it was written) and set aside as "
        f"{step}.damaged; the run goes on from step {last}"
        for step in damaged
    ]
    assert (again.step, again.eval, again.best) == (6, whole[1].eval, whole[1].best)
    assert_equal(again.state, whole[1].state)
    assert metrics_without_times(run.path) == metrics_without_times(whole[0]) and run.metrics.read_text() != log
    assert json.loads(run.best.read_text()) == json.loads(RunDirectory(whole[0]).best.read_text())
    assert complete_steps(run.checkpoints) == [2, 4, 6]
    for step in damaged:
        aside = run.checkpoints / f"{step}.damaged"
        assert (
            hashlib.sha256((aside / names[step]).read_bytes()).hexdigest()
            != json.loads((aside / "manifest.json").read_text())["sha256"][names[step]]
        )
        assert_equal(restore_params(run.path, step=step), restore_params(whole[0], step=step))


def test_what_was_set_aside_stays_when_it_happens_again(run):
    for number in range(2):
        damage(run, 6)
        assert resumed_step(run) == 4
        if not number:
            shutil.copytree(run.checkpoints / "4", run.checkpoints / "6")
    assert {path.name for path in run.checkpoints.iterdir()} == {"2", "4", "6.damaged", "6.damaged-2"}


def test_every_flip_cut_and_loss_is_found_and_leads_to_the_right_step(run, monkeypatch):
    """200 random bits over all files of all checkpoints; then each file of the newest, cut and gone."""
    monkeypatch.setattr(fallback.progress, "say", lambda line: lines.append(line))
    there, lines, random_bits = [2, 4, 6], [], random.Random(0)
    files = [(step, path) for step in there for path in files_of(run, step)]
    run.best.unlink()

    def check(step: int, path: pathlib.Path) -> None:
        name, content = str(path.relative_to(run.checkpoints / str(step))), whole_files[path]
        said = manifest.fault(run.checkpoints / str(step))
        assert said and (said.startswith(f"{name} ") or name == "manifest.json"), (name, said)
        lines.clear()
        expected = 6 if step < 6 else 4
        assert resumed_step(run) == expected
        assert len(lines) == (step == 6) and all(name.split("/")[0] in line for line in lines)
        if step == 6:
            assert not (run.checkpoints / "6").exists()
            (run.checkpoints / "6.damaged").rename(run.checkpoints / "6")
        path.write_bytes(content)

    whole_files = {path: path.read_bytes() for _, path in files}
    for _ in range(200):
        step, path = random_bits.choice(files)
        flip(path, random_bits.randrange(8 * len(whole_files[path])))
        check(step, path)
    for path in files_of(run, 6):
        path.write_bytes(whole_files[path][: random_bits.randrange(len(whole_files[path]))])
        check(6, path)
        path.unlink()
        check(6, path)
    assert resumed_step(run) == 6


def test_those_who_only_read_fall_back_and_leave_the_folder_as_it_is(run, capsys, tmp_path):
    run.best.write_text(json.dumps({"step": 4}))
    assert given_step(run.path) == 4
    assert capsys.readouterr().out == f"{run.path}: step 4 of 6 is taken, its best\n"
    name = damage(run, 4, "params")
    before = sorted(str(path) for path in run.path.rglob("*"))
    assert given_step(run.path) == 6
    said = f"{run.path}: step 4 is damaged ({name} is not as it was written); step 6 is taken, the newest sound one"
    assert capsys.readouterr().out == f"warning: {said}\n"
    (run.checkpoints / "6" / "config" / "metadata").write_text("{}")
    assert given_step(run.path) == 2
    assert read_config(run.path)["steps"] == 6
    origin = toy.find_origin(toy.config(tmp_path / "new", init_from=str(run.path)), RunDirectory(tmp_path / "new"))
    assert origin is not None and origin.name == f"{run.path} at step 2"
    with pytest.raises(UserError, match=f"4 is damaged: {name} .*there are also 2, 6: `./launch.sh checkpoint verify"):
        restore_params(run.path, step=4)
    damage(run, 2, "params")
    with pytest.raises(
        UserError, match=r"no checkpoint in .* is sound: step 4 is damaged \(.*; step 2 .*copy one back"
    ):
        given_step(run.path)
    assert sorted(str(path) for path in run.path.rglob("*")) == before


def test_a_run_without_a_sound_checkpoint_does_not_begin_anew(whole, run):
    for step in (2, 4, 6):
        damage(run, step)
    config = toy.config(run.path, **SETTINGS, init_from=str(whole[0]))
    with pytest.raises(
        UserError, match=r"had checkpoints and none of them is sound: 6 \(.*\); 4 \(.*\); 2 \("
    ) as error:
        toy.run(config, **toy.partly_frozen())
    assert "\n" not in str(error.value) and complete_steps(run.checkpoints) == [2, 4, 6]
    for step in (2, 4, 6):
        (run.checkpoints / str(step)).rename(run.checkpoints / f"{step}.damaged")
    with pytest.raises(UserError, match="none of them is sound: 2.damaged; 4.damaged; 6.damaged"):
        toy.run(config, **toy.partly_frozen())


def test_the_best_is_set_aside_where_it_is_damaged(run, capsys):
    run.best.write_text(json.dumps({"step": 2}))
    damage(run, 2)
    assert resumed_step(run) == 6
    assert "checkpoint 2 is damaged" in capsys.readouterr().out and complete_steps(run.checkpoints) == [4, 6]


def test_nothing_is_set_aside_under_a_run_that_trains(run):
    damage(run, 6)
    with run.locked(), pytest.raises(UserError, match="another process is training"):
        resumed_step(run)
    assert complete_steps(run.checkpoints) == [2, 4, 6]


def test_a_checkpoint_is_hashed_once_when_its_run_goes_on(run, monkeypatch):
    hashed = []
    digest = hashlib.file_digest
    monkeypatch.setattr(manifest, "SETTLED", 0.0)
    monkeypatch.setattr(
        manifest.hashlib, "file_digest", lambda file, kind: hashed.append(file.name) or digest(file, kind)
    )
    toy.run(toy.config(run.path, **SETTINGS), **toy.partly_frozen())
    counted = [name for name in hashed if "/6/" in str(name)]
    assert len(counted) == len(set(counted)) == len(files_of(run, 6)) - 1
    # Also what was found sound is read again once it changes.
    damage(run, 6)
    assert manifest.fault(run.checkpoints / "6")


def test_a_manifest_of_an_earlier_version_is_still_believed(run):
    path = run.checkpoints / "6" / "manifest.json"
    held = json.loads(path.read_text())
    path.write_text(json.dumps({name: held[name] for name in ("format_version", "sha256")}))
    assert manifest.fault(run.checkpoints / "6") is None
    name = damage(run, 6)
    assert manifest.fault(run.checkpoints / "6") == f"{name} is not as it was written"
    outside = held["sha256"] | {"../../config.json": "0"}
    path.write_text(json.dumps({"format_version": 1, "sha256": outside}))
    assert manifest.fault(run.checkpoints / "6") == "manifest.json is not as it was written"
