"""The run directory: everything a person needs to understand or resume a run is in it."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import os
import platform
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import jax

from espalier import library_log, progress
from espalier.errors import MachineError, UserError
from espalier.exits import DISK, DISK_ADVICE, INTACT
from espalier.files import write_json
from espalier.goodput import goodput, read_sessions
from espalier.redaction import recorded, without_secrets
from espalier.saved_config import SECRET
from espalier.training.config import FINGERPRINTED_FIELDS, HOST_FIELDS, USER_CODE_FIELDS
from espalier.training.identity import Schedule, check_same_run, completed, differences, without
from espalier.training.state import TrainState
from sharding.processes.coordination import LONG_WAIT, from_first, gather

TUNED = "tuned.json"
"""File of a run, and of what is exported from it, with what was chosen after the training for use with the weights (a
threshold): JSON values by name, `saved["tuned"]` of a LoadedModel."""


class RunDirectory:
    """The paths of the files of one run."""

    def __init__(self, path: str | os.PathLike[str], began: float | None = None):
        if "://" in str(path):
            raise UserError(
                f"{path}: a run directory is a local path; mount the bucket (gcsfuse, s3fs) and name the mount"
            )
        self.path = Path(path).expanduser().absolute()
        self.began = time.time() if began is None else began
        """When the session began that trains here, in seconds since 1970."""
        self.config = self.path / "config.json"
        self.tokenizer = self.path / "tokenizer"
        self.metrics = self.path / "metrics.jsonl"
        self.checksums = self.path / "checksums.jsonl"
        self.sessions = self.path / "sessions.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.frozen = self.path / "frozen"
        self.collected = self.path / "collected"
        self.profile = self.path / "profile"
        self.skipped = self.path / "skipped.jsonl"
        self.summary = self.path / "summary.json"
        self.report = self.path / "report.html"
        self.best = self.path / "best.json"
        self.tuned = self.path / TUNED
        self.failure = self.path / "failure.json"

    def check_shared(self) -> None:
        """UserError unless every process sees the same folder."""
        if jax.process_count() == 1:
            return
        there = next(path for path in (self.path, *self.path.parents) if path.is_dir())
        # Hidden, so that the folder still counts as empty.
        token = Path(from_first("a token", str(there / f".seen-by-all-{uuid.uuid4().hex}")))
        if jax.process_index() == 0:
            token.touch()
        try:
            gather("the token is there")
            blind = [number for number, seen in enumerate(gather("the token is seen", _appears(token))) if not seen]
        finally:
            if jax.process_index() == 0:
                token.unlink(missing_ok=True)
        if blind:
            raise UserError(
                f"process {', '.join(map(str, blind[:8]))} does not see what process 0 writes to {token.parent}: the "
                "run directory must be on a disk that all hosts share; give such a --run-dir"
            )

    def check(self, config: dict, defaults: dict, done: int = 0, schedules: Sequence[Schedule] = ()) -> None:
        """UserError if the folder holds another run or other files, or if processes differ in settings; writes nothing.

        config: JSON values, with the fingerprints of tokenizer and data. Its identity must be that of the existing run,
        except for a schedule that is the same so far (training.identity). defaults: the values of fields that the
        existing run lacks because it is older than they are. done: steps of the existing run. schedules: what depends
        on the length of the run besides the learning rate.
        """
        _check_same_everywhere(json.loads(json.dumps(config)))
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; a run needs a folder: give another --run-dir")
        if self.config.exists():
            here, defaults = json.loads(json.dumps([config, defaults]))
            self._check_same_run(here, defaults, done, schedules)
        elif self.path.is_dir() and any(not path.name.startswith(".") for path in self.path.iterdir()):
            raise UserError(f"{self.path} holds other files and no run; give another --run-dir, or an empty folder")

    @contextlib.contextmanager
    def writing(self, config: dict, step: int = 0) -> Iterator[None]:
        """Write config.json and lock the folder against other trainings until the block or this process ends.

        From then on, library output goes to log.txt in the folder, that of further processes to log-1.txt and so on.
        Those who look at the run (espalier.runs) find in `.lock` where it trains and from which step on, and an error
        that ends the block in failure.json. An error of the disk is a MachineError that says so.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        place = folder_identity(self.path)
        first = jax.process_index() == 0
        with self.locked() if first else contextlib.nullcontext() as lock:
            if lock:
                lock.truncate(0)
                lock.write(json.dumps({"host": platform.node(), "step": step}))
                lock.flush()
                self.failure.unlink(missing_ok=True)
                write_json(self.config, config)
            gather("the run directory is ours")
            number = jax.process_index()
            library_log.move_to(self.path / (f"log-{number}.txt" if number else "log.txt"))
            try:
                yield
            except Exception as error:
                of_disk = self._of_disk(error, place)
                # What it is about must not be hidden by a disk that is full or gone.
                with contextlib.suppress(OSError):
                    if first and folder_identity(self.path) == place:
                        write_json(self.failure, {"error": one_line(of_disk or error)})
                if of_disk:
                    raise of_disk from error
                raise

    def _of_disk(self, error: Exception, place: tuple[int, int] | None) -> MachineError | None:
        """What to say of an error that the disk of the run has made; None where it has not.

        place: what the folder was.
        """
        if isinstance(error, MachineError) or not isinstance(error, OSError):
            return None
        if folder_identity(self.path) != place:
            return MachineError(f"{self.path} is gone, or is another folder; is its disk still mounted? {INTACT}")
        if error.errno in DISK:
            where = error.filename or self.path
            words = DISK_ADVICE.get(error.errno or 0, error.strerror or str(error))
            return MachineError(f"{where} could not be written: {words}; {INTACT}")
        return None

    @contextlib.contextmanager
    def locked(self) -> Iterator[IO[str]]:
        """The folder locked against trainings; UserError where one is under way."""
        with (self.path / ".lock").open("a") as lock:
            if not _locked(lock.fileno()):
                raise UserError(
                    f"another process is training in {self.path}; wait for it, stop it, or give another --run-dir"
                )
            yield lock

    def _check_same_run(self, config: dict, defaults: dict, done: int, schedules: Sequence[Schedule]) -> None:
        try:
            there = completed(recorded(json.loads(self.config.read_text(encoding="utf-8"))), defaults)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.config} is damaged ({error}); give another --run-dir") from None
        # A run that failed before its first step has nothing to lose, so its settings may be corrected.
        begun = self.metrics.exists() and self.metrics.stat().st_size or any(self.checkpoints.glob("*"))
        change = check_same_run(self.path, there, config, done, schedules) if begun else None
        if change and jax.process_index() == 0:
            progress.say(change)


def folder_identity(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from another of the same name on another disk; None where there is none."""
    try:
        there = folder.stat()
    except OSError:
        return None
    return there.st_dev, there.st_ino


def _locked(file: int, seconds: float = 1.0) -> bool:
    """Lock an open file; False where another process holds it for longer than those who only ask whether one does."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if time.monotonic() > end:
            return False
        time.sleep(0.05)


def one_line(error: Exception) -> str:
    """What people must know of an error: that of a machine or a user as it is said, else with its type."""
    words = without_secrets(" ".join(str(error).split()))[:500]
    return words if isinstance(error, UserError | MachineError) else f"{type(error).__name__}: {words}"


def _check_same_everywhere(config: dict) -> None:
    """UserError unless every process has the same settings and, by their fingerprints, the same text and tokenizer."""
    # Of code of the user's own, its name and its SHA-256 are compared.
    files = {f"user_code.{what}.file" for what in config.get("user_code", {})}
    config = without(config, HOST_FIELDS, FINGERPRINTED_FIELDS | USER_CODE_FIELDS | files)
    # Hosts with caches of their own may prepare their text at very different speeds.
    first = from_first("settings", config, LONG_WAIT)
    for number, changes in enumerate(gather("settings", list(differences(first, config))[:4], LONG_WAIT)):
        if changes:
            raise UserError(
                f"process {number} has other settings than process 0: {'; '.join(changes)}; start all with the same "
                "flags and files"
            )


def _appears(path: Path, seconds: float = 30) -> bool:
    """Whether a file exists, after the time that network disks take to show what another host wrote."""
    end = time.monotonic() + seconds
    while True:
        # A listing, because network disks cache for a while that a name did not exist.
        with contextlib.suppress(OSError):
            if path.name in os.listdir(path.parent):
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.5)


@dataclass(frozen=True)
class Result:
    """How a session ended."""

    state: TrainState
    step: int
    finished: bool
    """Whether the schedule was completed, or ended because nothing got better; not paused or stopped."""
    loss: float | None
    """Training loss of the last step; None if there was nothing left to do."""
    eval: dict[str, float]
    """Metrics of the last evaluation, or of that of the best checkpoint where the run keeps it."""
    tokens: int
    """Tokens trained on since step 0, padding not counted."""
    tokens_per_second: float | None
    """The first step and evaluations excluded."""
    seconds: float | None
    """From the initialisation to the last checkpoint; None if there was nothing left to do."""
    first_step_seconds: float | None
    """Compilation included."""
    mfu: float | None
    data_wait: float | None
    """The fraction of time in which the device waited for batches, at most; first step and evaluations excluded."""
    stopped_by: int | None
    """The number of the signal that ended the session early."""
    skipped_batches: int = 0
    """Batches of bad steps, which changed nothing, and those that the run passed over."""
    best: dict[str, Any] | None = None
    """Step, metric and value of the best checkpoint, whose parameters are in `state`; None where the last is given."""


def summarise(run: RunDirectory, result: Result, **more: Any) -> dict:
    """The `--json` object of a training session; summary.json holds it and the environment.

    A session without a step keeps what the session before it measured.
    more: what the task adds (the metrics of a classifier).
    """
    names = ("step", "loss", "eval", "tokens", "tokens_per_second", "first_step_seconds", "mfu", "data_wait")
    names += ("seconds", "finished")
    summary = {name: getattr(result, name) for name in (*names, "stopped_by")} | more | {"run_dir": str(run.path)}
    if result.best:
        summary["best"] = result.best
    if result.skipped_batches:
        summary["skipped_batches"] = result.skipped_batches
    if result.loss is None and run.summary.is_file():
        with contextlib.suppress(ValueError):
            before = json.loads(run.summary.read_text(encoding="utf-8"))
            summary |= {name: before[name] for name in names if summary[name] is None and name in before}
    if found := goodput(read_sessions(run.sessions)):
        summary["goodput"] = found.record
    summary = recorded(summary)
    if jax.process_index() == 0:
        write_json(run.summary, summary | {"environment": environment()})
    return summary


def tuned_file(run: RunDirectory) -> dict[str, Any]:
    """TUNED → its values, to be exported beside the weights; empty where nothing was chosen."""
    return {TUNED: json.loads(run.tuned.read_text(encoding="utf-8"))} if run.tuned.is_file() else {}


def environment() -> dict[str, str]:
    """Versions and hardware of this process, in words."""
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    devices = {
        "devices": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "processes": str(jax.process_count()),
    }
    system = {"system": f"{platform.system()} {platform.machine()}", "CPU cores": str(os.cpu_count())}
    return {"Python": platform.python_version()} | versions | devices | system


def settings(config: Any, model: Any, **more: Any) -> tuple[dict, dict]:
    """A run's settings as JSON values: dataclasses `config` and `model`, and `more`; and the defaults for `check`.

    A field that was added after a run has the default of its class there, never what a preset says today. Secrets of
    URLs are in neither (espalier/redaction.py).
    """

    def written(config: Any) -> dict:
        return {name: value for name, value in dataclasses.asdict(config).items() if name not in SECRET}

    values = written(config) | {"model": dataclasses.asdict(model)} | more
    return recorded(values), written(type(config)()) | {"model": dataclasses.asdict(type(model)())}
