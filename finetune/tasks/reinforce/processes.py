"""A reward function of the user's own, in processes of its own: what hangs is ended, what raises is a line.

A process is `python -m finetune.tasks.reinforce.worker FILE.py:NAME`: a line of JSON with prompts, completions and row
comes in, one with the rewards goes out. What the function prints goes where the log of libraries is.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from espalier.neighbours import HOUSE

if TYPE_CHECKING:
    from finetune.tasks.reinforce.rewards import Group

BEGINS = 60.0
"""Seconds that a process may take to load the user's file, beside those of a call."""


class Processes:
    """Calls the function `name` in at most `count` processes, `timeout` seconds for the completions of a prompt."""

    def __init__(self, name: str, count: int, timeout: float):
        self._name, self._timeout = name, timeout
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="reward")
        self._idle: queue.SimpleQueue[subprocess.Popen | None] = queue.SimpleQueue()
        self._all: set[subprocess.Popen] = set()
        for _ in range(count):
            self._idle.put(None)

    def __call__(self, groups: Sequence[Group]) -> list[list[float] | str]:
        """The rewards of each group, or what went wrong, in a line."""
        return list(self._threads.map(self._one, groups))

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        for process in list(self._all):
            self._end(process)

    def _one(self, group: Group) -> list[float] | str:
        process = self._idle.get()
        fresh = process is None
        try:
            process = self._begun() if process is None else process
            asked = {"prompts": [group.asked.text] * len(group.completions), "completions": list(group.completions)}
            line = json.dumps(asked | {"row": dict(group.asked.row)}, default=str) + "\n"
            answer = _exchanged(process, line.encode(), self._timeout + BEGINS * fresh)
        except (OSError, EOFError):
            answer = None
        if answer is None:
            # Ended or hanging: the next call has another.
            assert process is not None
            took = process.poll() is None
            self._end(process)
            self._idle.put(None)
            return f"took longer than {self._timeout:g} s" if took else f"its process ended ({process.returncode})"
        self._idle.put(process)
        found = json.loads(answer)
        if "error" in found:
            return found["error"]
        rewards = [float("nan") if value is None else float(value) for value in found["rewards"]]
        if len(rewards) != len(group.completions):
            return f"returned {len(rewards)} rewards for {len(group.completions)} completions"
        return rewards

    def _begun(self) -> subprocess.Popen:
        path = os.pathsep.join([HOUSE, *filter(None, [os.environ.get("PYTHONPATH")])])
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "finetune.tasks.reinforce.worker", self._name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=os.environ | {"PYTHONPATH": path},
            # Ctrl-C is for the run, which ends them.
            start_new_session=True,
        )
        self._all.add(process)
        return process

    def _end(self, process: subprocess.Popen) -> None:
        self._all.discard(process)
        with contextlib.suppress(OSError):
            process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()


def _exchanged(process: subprocess.Popen, line: bytes, timeout: float) -> bytes | None:
    """The line that answers a line; None where none comes in time. EOFError where the process ended."""
    assert process.stdin is not None and process.stdout is not None
    end, written, found = time.monotonic() + timeout, 0, b""
    os.set_blocking(process.stdin.fileno(), False)
    while not found.endswith(b"\n"):
        writes = [process.stdin] if written < len(line) else []
        ready, writable, _ = select.select([process.stdout], writes, [], max(0.0, end - time.monotonic()))
        if not ready and not writable:
            return None
        if writable:
            written += os.write(process.stdin.fileno(), line[written:])
        if ready:
            part = os.read(process.stdout.fileno(), 1 << 16)
            if not part:
                process.wait()
                raise EOFError
            found += part
    return found
