"""Checkpoints written; with `restore.py`, which reads them, all that knows Orbax.

    checkpoints/<step>/params      the parameters, a nested dict: enough, with config, to use the model
                       opt_state   the rest of the state, a flat dict of paths: optimizer/…, rates/…, health/…, step,
                                   key
                       data        JSON: where the data goes on
                       config      JSON: the run's configuration, format_version
                       manifest.json   SHA-256 of every file, written last

A checkpoint counts only once its manifest is there, so one whose writer was killed is never read.

With several processes each writes what its devices hold into the same folder, and hashes its share of the files; the
first does the rest. Every wait for the others has its limit.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from espalier import progress
from espalier.errors import MachineError
from espalier.exits import DISK_ADVICE, INTACT
from espalier.files import sync_path, sync_tree
from espalier.training import background
from espalier.training.config import CheckpointConfig
from espalier.training.fallback import set_aside
from espalier.training.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    bytes_in,
    complete_steps,
    is_unfinished,
    step_folders,
    unfinished,
    write_manifest,
)
from espalier.training.restore import by_all, by_path, rest_of
from espalier.training.retention import removal
from espalier.training.run import folder_identity
from espalier.training.state import TrainState
from sharding.processes.coordination import LONG_WAIT, from_first, gather

# At each save Orbax asks TensorStore how many bytes it wrote, for a log that nobody reads; TensorStore (0.1.86) never
# frees its answer, up to 25 kB a save.
with contextlib.suppress(ImportError):
    from orbax.checkpoint._src.serialization import tensorstore_utils

    if hasattr(tensorstore_utils, "get_tensorstore_raw_bytes"):
        tensorstore_utils.get_tensorstore_raw_bytes = lambda direction=None: 0

WRITING = 7200
"""Seconds that a checkpoint may take to be written by all processes."""
GONE = "its folder is gone, or is another one; is the disk still mounted?"


class CheckpointError(OSError, MachineError):
    """A checkpoint could not be written."""

    def __str__(self) -> str:
        return str(self.strerror)


class Checkpoints:
    """The checkpoints of one run: asynchronous saves; which of them stay on disk, `config` says.

    announce: receives a line for each finished save. Among several processes, a save that fails while it is written
    ends the run whatever config.on_failure says, for the others wait. To be made and called by all processes of it.
    """

    def __init__(
        self,
        folder: str | Path,
        config: CheckpointConfig = CheckpointConfig(),  # noqa: B008  # frozen
        announce: Callable[[str], None] = print,
    ):
        self.folder = Path(folder).resolve()
        self._config = config
        self.announce = announce
        self.best: Collection[int] = ()
        """Steps that stay on disk however old they are."""
        self._told = False
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._lost: CheckpointError | None = None
        """What the last save met, where the run went on."""
        self._failed = False
        self._saving = self._size = 0
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._tidy()
        gather("the folder of checkpoints is there")
        self._manager = _manager(self.folder)
        self._disk = folder_identity(self.folder)

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return max(complete_steps(self.folder), default=None)

    def save(self, state: TrainState, config: dict, data: dict, waited_for: bool = False) -> None:
        """Begin to write `state` under its step; returns once it may be donated. Raises what the last save met.

        data: where the data goes on, JSON values. waited_for: no training goes on beside it. Steps only grow:
        ValueError for one that is not after the latest.
        """
        self.wait()
        started, step, latest = time.perf_counter(), int(state.step), self.latest()
        if latest is not None and step <= latest:
            raise ValueError(f"step {step} is not after {latest}, the newest checkpoint in {self.folder}")
        params, rest = state.params, by_path(rest_of(state))
        if not waited_for:
            params, rest = background.held((params, rest))
        items = ocp.args.Composite(
            params=ocp.args.PyTreeSave(params),
            opt_state=ocp.args.PyTreeSave(rest),
            data=ocp.args.JsonSave(data),
            config=ocp.args.JsonSave({"format_version": FORMAT_VERSION} | config),
        )
        self._saving, self._size = step, sum(leaf.nbytes for leaf in jax.tree.leaves((params, rest)))
        missing = from_first("room for a checkpoint", self._make_room(step) if jax.process_index() == 0 else None)
        if missing:
            self._failure = _failure(step, self.folder, missing[0], missing[1])
            self.check(agreed=True)
            return
        before = background.threads()
        try:
            with self._plain_errors(step):
                saved = self._manager.save(step, args=items, force=True)
        except CheckpointError as error:
            self._failure, self._failed = error, True
            self.check()
            return
        assert saved, f"Orbax did not save step {step}"
        yielding = not waited_for and self._size >= background.LARGE
        if yielding:
            background.give_way(before)
        self._writer = threading.Thread(
            target=self._finish, args=(step, started, yielding), name=f"saving step {step}", daemon=True
        )
        self._writer.start()

    def wait(self) -> None:
        """Until the save under way is complete, told of if that is long; raises OSError if it failed."""
        if self._writer is not None:
            with progress.waiting(self._writer.name) as far:
                while self._writer.is_alive():
                    self._writer.join(0.2)
                    written = min(_written(self.folder, self._saving), self._size)
                    far(f"{progress.size(written)} of {progress.size(self._size)}")
            self._writer = None
        self.check()

    def check(self, agreed: bool = False) -> None:
        """Raise the OSError of a save that failed meanwhile; does not wait.

        agreed: all processes know of it.
        """
        if self._failure is None:
            return
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        failure, self._failure = self._failure, None
        if not (
            self._config.on_failure == "continue"
            and isinstance(failure, CheckpointError)
            and (agreed or jax.process_count() == 1)
        ):
            raise failure
        self._lost = failure
        self.announce(f"warning: {failure}; the run goes on, and saves when the next checkpoint is due")
        if self._failed:
            # It would repeat the failure at every call.
            with contextlib.suppress(Exception):
                self._manager.close()
            self._failed = False
            with contextlib.suppress(OSError):
                self._manager = _manager(self.folder)

    def finish(self) -> None:
        """Until the save under way is complete; raises what the last save met, also where the run went on."""
        self.wait()
        if self._lost is not None:
            raise self._lost

    def close(self) -> None:
        """Finish the save under way and let go of the folder; raises as wait()."""
        try:
            self.wait()
        finally:
            # Among several processes, Orbax would wait for the others after a failure; this one is about to end.
            if not (self._failed and jax.process_count() > 1):
                with contextlib.suppress(Exception):  # Orbax repeats the failure that wait() raised
                    self._manager.close()

    def _finish(self, step: int, started: float, yielding: bool) -> None:
        try:
            if yielding:
                background.lower(threading.get_native_id())
            with self._plain_errors(step):
                self._manager.wait_until_finished()
                size = write_manifest(self.folder / str(step))
                if jax.process_index() == 0:
                    sync_tree(self.folder / str(step))
                    sync_path(self.folder)
                    unfinished(self.folder, step).unlink()
                    # Only now may an older checkpoint go.
                    self._clear()
                    self.announce(f"saved step {step} ({size / 1e6:.1f} MB, {time.perf_counter() - started:.1f} s)")
            self._lost = None
        except BaseException as error:  # raised where the loop asks next, in wait()
            self._give_up(step)
            self._failure, self._failed = error, True

    def _clear(self) -> None:
        """Delete what need not stay."""
        gone = removal(self._sizes(), self._config, self.best)
        for step in gone.steps:
            self._remove(step)
        if gone.over and not self._told:
            self._told = True
            more = f"{progress.size(gone.over)} more than checkpoint.budget={self._config.budget}"
            self.announce(f"the checkpoints that must stay, with the next one, take {more}")

    @contextlib.contextmanager
    def _plain_errors(self, step: int) -> Iterator[None]:
        """As `_plain_errors`; whatever is raised where the disk is no more there, is because of that."""
        try:
            with _plain_errors(step, self.folder):
                yield
        except CheckpointError as error:
            if folder_identity(self.folder) != self._disk:
                raise _failure(step, self.folder, errno.ENODEV, GONE) from error
            raise

    def _sizes(self) -> dict[int, int]:
        return {step: bytes_in(self.folder / str(step)) for step in complete_steps(self.folder)}

    def _remove(self, step: int) -> None:
        """Delete a checkpoint; at no moment is there one that is half deleted and looks whole."""
        going = self.folder / f"{step}.removed"
        (self.folder / str(step)).rename(going)
        shutil.rmtree(going)

    def _tidy(self) -> None:
        """Take away what earlier starts left unfinished."""
        for step in step_folders(self.folder):
            if is_unfinished(self.folder, step):
                self.announce(f"removed checkpoint {step}: it was not written to its end")
                shutil.rmtree(self.folder / str(step))
            elif not (self.folder / str(step) / MANIFEST).exists():
                aside = set_aside(self.folder, step)
                self.announce(f"warning: checkpoint {step} has no {MANIFEST} any more and is set aside as {aside.name}")
        for path in self.folder.glob("*.unfinished"):
            path.unlink()
        for path in self.folder.glob("*.removed"):
            shutil.rmtree(path)

    def _give_up(self, step: int) -> None:
        """Take away what a save that failed has written: on a full disk the next one needs the room."""
        if jax.process_index() == 0 and not (self.folder / str(step) / MANIFEST).exists():
            end = time.monotonic() + 2
            # Others of Orbax's threads may still write, and find out a moment later.
            while (left := self._half_written(step)) and time.monotonic() < end:
                for path in left:
                    shutil.rmtree(path, ignore_errors=True)
                time.sleep(0.05)
            with contextlib.suppress(OSError):
                unfinished(self.folder, step).unlink(missing_ok=True)

    def _half_written(self, step: int) -> list[Path]:
        """Folders of a checkpoint that is not complete, under the name that it will have and under those of Orbax."""
        names = (str(step), f"{step}.orbax-checkpoint-tmp")
        return [path for path in self.folder.glob("*") if path.name == names[0] or path.name.startswith(names[1])]

    def _make_room(self, step: int) -> tuple[int, str] | None:
        """Mark the checkpoint of this step as begun, on a disk with room for it; (errno, words) where that fails.

        What it takes is told by the newest one. Where room is short, those that would go after this save go before it,
        but never the newest.
        """
        try:
            if folder_identity(self.folder) != self._disk:
                return errno.ENODEV, GONE
            if sizes := self._sizes():
                newest = max(sizes)
                needed = _occupied(self.folder / str(newest))
                spare = removal(sizes | {step: needed}, self._config, self.best).steps
                spare = [old for old in spare if old not in (newest, step)]
                while (free := shutil.disk_usage(self.folder).free) < needed and spare:
                    self._remove(spare[0])
                    self.announce(f"removed checkpoint {spare.pop(0)}: the disk has no room for {step} beside it")
                if free < needed:
                    needs = f"needs {progress.size(needed)} and {progress.size(free)} are free"
                    return errno.ENOSPC, f"it {needs}; make room, and the same command goes on from step {newest}"
            unfinished(self.folder, step).touch()
            sync_path(self.folder)
        except OSError as error:
            return error.errno or errno.EIO, _words(error)
        return None


def save_params(folder: str | Path, params: Any, config: dict) -> None:
    """Write a checkpoint of step 0 that has parameters and configuration alone: a model that was trained elsewhere.

    To be called by all processes of a run, if several are there.
    """
    folder = Path(folder).resolve()
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    gather("the folder of parameters is there")
    items = ocp.args.Composite(
        params=ocp.args.PyTreeSave(params), config=ocp.args.JsonSave({"format_version": FORMAT_VERSION} | config)
    )
    with _plain_errors(0, folder), contextlib.closing(_manager(folder)) as manager:
        manager.save(0, args=items, force=True)
        manager.wait_until_finished()
        write_manifest(folder / "0")
        if jax.process_index() == 0:
            sync_tree(folder / "0")
            sync_path(folder)
        gather("the parameters are written", timeout=LONG_WAIT)


def _written(folder: Path, step: int) -> int:
    """Bytes on disk of a checkpoint that is being written, whatever its folder is called meanwhile."""
    # Not by a pattern with the step in it, for pathlib and re remember each.
    return sum(bytes_in(root) for root in folder.glob("*") if root.name.partition(".")[0] == str(step))


def _manager(folder: Path) -> ocp.CheckpointManager:
    """For a folder that is there. It keeps every step: Orbax deletes before the new one's manifest is written."""
    options = ocp.CheckpointManagerOptions(
        create=False,
        cleanup_tmp_directories=True,
        max_to_keep=None,
        async_options=ocp.AsyncOptions(timeout_secs=WRITING, barrier_sync_fn=_barrier()),
        multiprocessing_options=by_all(),
    )
    return ocp.CheckpointManager(folder, options=options)


def _barrier() -> Callable[..., None]:
    """How Orbax's threads wait for the other processes."""
    wait = ocp.multihost.get_barrier_sync_fn()

    def barrier(*, key: str, timeout_ms: int) -> None:
        # It does so also on its way out of a failure of this process alone, where the others will not come.
        if sys.exception() is None:
            wait(key=key, timeout_ms=timeout_ms)

    return barrier


@contextlib.contextmanager
def _plain_errors(step: int, folder: Path) -> Iterator[None]:
    """Whatever Orbax raises while writing, as an OSError on one line."""
    try:
        yield
    except Exception as error:
        raise _failure(step, folder, _number(error), _words(error)) from error


def _failure(step: int, folder: Path, number: int, words: str) -> CheckpointError:
    return CheckpointError(number, f"checkpoint {step} could not be written: {words}: {folder}", str(folder))


def _number(error: BaseException) -> int:
    """The errno of what Python, TensorStore or Orbax says of the disk."""
    said = re.search(r"os_error_code='?(\d+)", str(error))
    if said:
        return int(said[1])
    if re.search("no space left|RESOURCE_EXHAUSTED", str(error), re.I):
        return errno.ENOSPC
    return getattr(error, "errno", None) or errno.EIO


def _words(error: BaseException) -> str:
    number = _number(error)
    if number in DISK_ADVICE:
        return f"{DISK_ADVICE[number]}; {INTACT}"
    return os.strerror(number) if number != errno.EIO else " ".join(str(error).split())[:300]


def _occupied(folder: Path) -> int:
    """Bytes that the disk gave to the files of a folder: whole blocks, of compressed files less than they hold."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*"))
