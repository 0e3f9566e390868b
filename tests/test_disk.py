"""A disk that is full, read-only or gone ends a run in one line, or is outlived, and never costs what was saved."""

import contextlib
import dataclasses
import errno
import os
import pathlib
import resource
import shutil
import subprocess
import time
import warnings
from typing import Any

import jax
import numpy as np
import pytest
import toy
from toy import quick_compilation  # noqa: F401

from espalier.errors import MachineError
from espalier.trackers.contract import Session
from espalier.trackers.tensorboard import TensorBoard
from espalier.training.checkpoint import CheckpointError, Checkpoints
from espalier.training.config import CheckpointConfig
from espalier.training.manifest import complete_steps, fault
from espalier.training.state import new_state

# Orbax leaves coroutines of a write that failed to the garbage collector, which finds their loop closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Disk:
    """A small disk of its own; `path` is where it is mounted.

    Where nobody may mount one, a limit on the size of files (RLIMIT_FSIZE) stands in for a disk that is full.
    """

    def __init__(self, path: pathlib.Path):
        path.mkdir()
        self.path, self._filler = path, path / "filler"
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=8m", "none", path], capture_output=True, text=True
        )
        self.own = mounted.returncode == 0
        if not self.own:
            warnings.warn(f"no right to mount a disk ({mounted.stderr.strip()}): RLIMIT_FSIZE stands in", stacklevel=2)

    @property
    def words(self) -> str:
        return "no space left|needs .* are free" if self.own else "ulimit -f"

    def leave(self, count: int) -> None:
        """Fill it but for so many bytes."""
        if self.own:
            with self._filler.open("ab") as file:
                os.posix_fallocate(file.fileno(), file.tell(), shutil.disk_usage(self.path).free - count)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))

    def clear(self) -> None:
        if self._filler.exists():
            self._filler.unlink()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def gone(self) -> None:
        """Take it away under those who have files open on it."""
        if self.own:
            subprocess.run(["umount", "-l", self.path], check=True)
        else:
            self.path.rename(self.path.with_name("elsewhere"))
        self.own = False


@pytest.fixture
def disk(tmp_path):
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.clear()
    if disk.own:
        subprocess.run(["umount", "-l", disk.path], check=True)


def settings(disk, **more):
    checkpoint = CheckpointConfig(every=2, **more)
    return toy.config(disk.path / "run", steps=6, checkpoint=checkpoint, eval_every=3)


def events(disk, **at):
    """Batches, before which something happens: `at` is step{N} → what, once the checkpoints before it are complete."""

    def batches_from(step):
        while True:
            if what := at.get(f"step{step + 1}"):
                end = time.monotonic() + 60
                while list(disk.path.glob("run/checkpoints/*.unfinished")) and time.monotonic() < end:
                    time.sleep(0.01)
                what()
            yield toy.batch(step)
            step += 1

    return batches_from


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return toy.run(toy.config(tmp_path_factory.mktemp("whole") / "run", steps=6, eval_every=3))


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def assert_only(disk, *steps):
    """These checkpoints are there and sound, and nothing of any other."""
    folder = disk.path / "run" / "checkpoints"
    assert complete_steps(folder) == list(steps)
    assert not any(fault(folder / str(step)) for step in steps)
    assert sorted(path.name for path in folder.iterdir()) == sorted(map(str, steps))


@pytest.mark.parametrize("room", [10_000, 150_000])
def test_a_full_disk_ends_the_run_in_one_line_and_it_goes_on_from_what_was_saved(disk, whole, room):
    """With 10 kB left nothing is begun; 150 kB are enough for most of a checkpoint, whose first there is none to
    measure by."""
    first = room > 100_000
    with pytest.raises(CheckpointError, match=disk.words) as error:
        toy.run(settings(disk), batches_from=events(disk, **{f"step{1 if first else 4}": lambda: disk.leave(room)}))
    assert str(error.value).startswith(f"checkpoint {2 if first else 4} could not be written: ")
    assert "\n" not in str(error.value)
    disk.clear()
    assert_only(disk, *(() if first else (2,)))
    again = toy.run(settings(disk))
    assert_equal(again.state, whole.state)
    assert_only(disk, 4, 6)


def test_a_run_may_outlive_a_save_that_fails(disk, whole, capsys):
    config = settings(disk, on_failure="continue")
    result = toy.run(config, batches_from=events(disk, step4=lambda: disk.leave(10_000), step5=disk.clear))
    assert_equal(result.state, whole.state)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    (line,) = said
    assert line.startswith("warning: checkpoint 4 could not be written: ")
    assert line.endswith("the run goes on, and saves when the next checkpoint is due")
    assert_only(disk, 2, 6)


def test_a_failure_while_it_is_written_is_outlived_too(disk, whole, capsys):
    """The limit is on files, so that the room is there and the write fails."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))

    config = settings(disk, on_failure="continue")
    result = toy.run(config, batches_from=events(disk, step4=limit, step6=disk.clear))
    assert_equal(result.state, whole.state)
    assert (
        "warning: checkpoint 4 could not be written: a file would be larger than is allowed" in capsys.readouterr().out
    )
    assert_only(disk, 2, 6)


def test_a_run_whose_last_save_failed_fails_at_its_end(disk):
    config = settings(disk, on_failure="continue")
    with pytest.raises(CheckpointError, match="checkpoint 6 could not be written"):
        toy.run(config, batches_from=events(disk, step4=lambda: disk.leave(10_000)))
    disk.clear()
    assert_only(disk, 2)
    assert [record["step"] for record in toy.metrics_of(config.run_dir) if "loss" in record] == [1, 2, 3, 4, 5, 6]


def saves(disk, monkeypatch, keep, checkpoints):
    """Six saves with room for so many checkpoints in all; what is said."""
    folder, said = disk.path / "run" / "checkpoints", []

    def state(step):
        kernel = np.random.default_rng(step).normal(size=(256, 256)).astype(np.float32)
        params = {"layer": {"kernel": jax.numpy.asarray(kernel)}}
        made = new_state(params, lambda params: {}, toy.OptimizerConfig(), jax.random.key(0))
        return dataclasses.replace(made, step=jax.numpy.asarray(step, made.step.dtype))

    with contextlib.closing(Checkpoints(folder, CheckpointConfig(keep=keep), said.append)) as saved:
        saved.save(state(1), {}, {})
        saved.wait()
        size = sum(path.stat().st_blocks * 512 for path in (folder / "1").rglob("*"))
        room = size * (checkpoints - 1) + size // 4
        if disk.own:
            disk.leave(room)
        else:
            usage = shutil.disk_usage(disk.path)
            total = room + size

            def left(path):
                return usage._replace(free=total - sum(x.stat().st_blocks * 512 for x in folder.rglob("*")))

            monkeypatch.setattr(shutil, "disk_usage", left)
        for step in range(2, 7):
            saved.save(state(step), {}, {})
            saved.wait()
    assert complete_steps(folder) == list(range(7 - keep, 7))
    return said


@pytest.mark.parametrize("keep", [1, 2])
def test_with_room_for_one_more_than_stay_nothing_fails(disk, monkeypatch, keep):
    said = saves(disk, monkeypatch, keep, keep + 1)
    assert len(said) == 6 and all(line.startswith("saved step") for line in said)


def test_with_less_room_the_oldest_goes_before_the_save_but_never_the_newest(disk, monkeypatch):
    said = saves(disk, monkeypatch, 2, 2)
    assert "removed checkpoint 1: the disk has no room for 3 beside it" in said
    with pytest.raises(CheckpointError, match=r"it needs .*B and .*B are free; make room, and .* goes on from step 1"):
        shutil.rmtree(disk.path / "run")
        disk.clear()
        saves(disk, monkeypatch, 1, 1)


def test_a_disk_that_is_gone_is_told_of_in_one_line(disk):
    with pytest.raises(MachineError, match="gone, or is another") as error:
        toy.run(settings(disk), batches_from=events(disk, step4=disk.gone))
    assert "\n" not in str(error.value) and "still mounted?" in str(error.value)
    assert not list(disk.path.glob("run/*")) if disk.path.exists() else True


def test_a_disk_that_turns_read_only_is_told_of_in_one_line(disk, tmp_path):
    """Under a run, and under one that is to go on."""
    if not disk.own:
        pytest.fail("turning a disk read-only needs the right to mount; run as root, or in `unshare -rm`")

    def turn():
        subprocess.run(["mount", "-o", "remount,ro", disk.path], check=True)

    # A disk with files that are open for writing does not turn.
    run, settings = tmp_path / "run", {"steps": 6, "checkpoint": CheckpointConfig(every=2), "eval_every": 3}
    toy.run(toy.config(run, stop_at=2, **settings))
    (run / "checkpoints").rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", disk.path / "run" / "checkpoints")
    (run / "checkpoints").symlink_to(disk.path / "run" / "checkpoints")
    with pytest.raises(CheckpointError, match="checkpoint 4 could not be written: the disk is read-only now") as error:
        toy.run(toy.config(run, **settings), batches_from=events(disk, step4=turn))
    assert "\n" not in str(error.value)
    assert_only(disk, 2)
    with pytest.raises(OSError) as refused:
        toy.run(toy.config(disk.path / "another", **settings))
    assert refused.value.errno == errno.EROFS


def test_a_log_that_cannot_be_written_is_told_of_in_one_line(disk, whole):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))

    with pytest.raises(
        MachineError, match="could not be written: a file would be larger than is allowed .ulimit -f.; raise"
    ) as error:
        toy.run(settings(disk), batches_from=events(disk, step3=limit))
    assert "\n" not in str(error.value)
    disk.clear()
    assert_equal(toy.run(settings(disk)).state, whole.state)


def test_a_writer_of_event_files_that_has_ended_holds_up_nobody(disk):
    board = TensorBoard(Session(disk.path, {}, 0))
    board.log(1, {"loss": 1.0})
    writer: Any = board._writer.file_writer
    writer.event_writer._worker.stop()
    with pytest.raises(MachineError, match="its writer has ended; make room on the disk"):
        board.log(2, {f"metric {number}": 1.0 for number in range(50)})
    board.close("failed")
