"""The real command with a tiny model, started as a person starts it, and seen from outside: its lines, its files.

Everything is small and cached, also what is compiled, so that a start takes some seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

from quick import xla_flags

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
STEPS = 24
SHAPE = (
    *("--model.vocab-size", 300, "--model.hidden-size", 32, "--model.num-attention-heads", 2),
    *("--model.num-hidden-layers", 1, "--model.intermediate-size", 64, "--data.sequence-length", 32),
)
OFTEN = ("--eval-rows", 64, "--log-every", 2, "--eval-every", 6, "--checkpoint.every", 3, "--steps", STEPS)
"""Checkpoints also within an interval of the log."""


@dataclasses.dataclass(frozen=True)
class Command:
    """`espalier mlm debug` with this text, in a run directory of its own; count: its processes."""

    folder: pathlib.Path
    text: pathlib.Path
    count: int = 1
    more: tuple = ()
    host: str = "127.0.0.1"
    """Where the other processes reach the first."""

    @property
    def run_dir(self) -> pathlib.Path:
        return self.folder / "run"

    @property
    def cache(self) -> pathlib.Path:
        """Where its tokens go."""
        return self.folder / "cache"

    def arguments(self) -> list[str]:
        words = ["-P", "-m", "espalier", "mlm", "debug", "--data.files", self.text, *SHAPE, *OFTEN]
        words += ["--run-dir", self.run_dir, "--data.cache", self.cache, *self.more]
        return [sys.executable, *map(str, words)]

    def environment(self) -> dict[str, str]:
        return os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": xla_flags(1),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def start(self, each: Callable[[int], list[str]] = lambda number: []) -> Started:
        """each: what the command of a process stands behind, by its number (`ip netns exec far`)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        places = enumerate(self._places())
        return Started(self, [self._popen([*each(number), *self.arguments()], place) for number, place in places])

    def _places(self) -> list[dict[str, str]]:
        if self.count == 1:
            return [{}]
        coordinator = {"JAX_COORDINATOR_ADDRESS": f"{self.host}:{free_port()}", "JAX_NUM_PROCESSES": str(self.count)}
        return [coordinator | {"JAX_PROCESS_ID": str(number)} for number in range(self.count)]

    def _popen(self, command: list[str], place: dict[str, str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            env=self.environment() | place,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Of its own, as in a terminal: a signal to the tests is none to it.
            process_group=0,
        )


class Started:
    """The processes of a command that was started. Lines arrive within a millisecond."""

    def __init__(self, command: Command, processes: list[subprocess.Popen[str]]):
        self.command, self.processes = command, processes
        self.out: list[list[str]] = [[] for _ in processes]
        self.err: list[list[str]] = [[] for _ in processes]
        self._changed = threading.Condition()
        self._readers = [
            threading.Thread(target=self._read, args=(stream, lines), daemon=True)
            for process, out, err in zip(processes, self.out, self.err, strict=True)
            for stream, lines in ((process.stdout, out), (process.stderr, err))
        ]
        for reader in self._readers:
            reader.start()

    def line(self, holds: Callable[[str], bool], timeout: float = 600) -> bool:
        """Wait for a line of process 0 like this; False where it ended without one."""
        seen = 0
        end = time.monotonic() + timeout
        with self._changed:
            while True:
                lines = self.out[0]
                if any(holds(line) for line in lines[seen:]):
                    return True
                seen = len(lines)
                if self.processes[0].poll() is not None and not self._readers[0].is_alive():
                    return False
                assert time.monotonic() < end, self.told()
                self._changed.wait(0.1)

    def sees(self, condition: Callable[[], object], timeout: float = 600, pause: float = 0.0003) -> bool:
        """Wait until a condition on its files holds; False where it ended before that."""
        end = time.monotonic() + timeout
        with _first():
            while not condition():
                if self.processes[0].poll() is not None:
                    return False
                assert time.monotonic() < end, self.told()
                time.sleep(pause)
        return True

    def send(self, number: int, to: int = 0) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.processes[to].send_signal(number)

    def kill(self) -> None:
        for to, process in enumerate(self.processes):
            # Another signal would not reach one that is stopped.
            self.send(signal.SIGKILL, to)
            process.wait()
        for reader in self._readers:
            reader.join(10)

    def ended(self, timeout: float = 150) -> list[int]:
        """Their exit codes, once all have ended and all they wrote is here."""
        end = time.monotonic() + timeout
        for process in self.processes:
            try:
                process.wait(max(end - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                told = self.told()
                self.kill()
                raise AssertionError(f"still running after {timeout:g} s\n{told}") from None
        for reader in self._readers:
            reader.join(10)
        return [process.returncode for process in self.processes]

    def whole(self) -> Started:
        """The same, which ended well."""
        codes = self.ended(900)
        assert codes == [0] * len(codes), self.told()
        return self

    def told(self) -> str:
        codes = [process.poll() for process in self.processes]
        parts = (
            f"--- {number}\n{''.join(out[-30:])}\n{''.join(err[-40:])}"
            for number, (out, err) in enumerate(zip(self.out, self.err, strict=True))
        )
        return f"exit codes {codes}\n" + "\n".join(parts)

    def _read(self, stream, lines: list[str]) -> None:
        with stream:
            for line in stream:
                with self._changed:
                    lines.append(line)
                    self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()


@contextlib.contextmanager
def _first() -> Iterator[None]:
    """This thread before all others, where that is allowed: what it looks for may last for a millisecond."""
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)
    try:
        yield
    finally:
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, 0)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def write_text(path: pathlib.Path, characters: int = 150_000, seed: int = 0) -> pathlib.Path:
    """Words of a small made-up language, in documents of some lines."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("aeioubdfgklmnprst", k=draw.randint(2, 8))) for _ in range(400)]
    size, documents = 0, []
    while size < characters:
        documents.append(" ".join(draw.choices(words, k=draw.randint(20, 200))))
        size += len(documents[-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(documents))
    return path
