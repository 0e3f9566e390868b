"""Graceful shutdown: on a signal to stop, a run finishes its step, saves and exits."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from espalier import library_log
from sharding.processes.coordination import gather


class StopSignal:
    """Context in which the first SIGTERM, SIGHUP (a lost terminal) or Ctrl-C only requests a stop; a second Ctrl-C
    interrupts at once. A signal that is already ignored (nohup) stays ignored.

    Several processes must all stop at the same step: JAX listens for SIGTERM from the start, passes it on to the other
    processes and names that step (it does nothing of this for a single process).
    """

    def __init__(self):
        self.requested: int | None = None
        """The number of the signal that requested the stop."""
        self._before: dict[int, Any] = {}
        self._alone = jax.process_count() == 1

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            # With several processes, the handler of JAX for SIGTERM must stay.
            numbers = (signal.SIGHUP, signal.SIGINT, *(signal.SIGTERM,) * self._alone)
            for number in numbers:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def reached(self, step: int) -> bool:
        """Whether to stop after this step. Every process must call it at every step."""
        return bool(self.requested) if self._alone else multihost_utils.reached_preemption_sync_point(step)

    def number(self) -> int | None:
        """The signal that ended the loop early, the same in every process. Every process must call it once."""
        asked = [number for number in gather("stopped by", self.requested) if number]
        return asked[0] if asked else signal.SIGTERM

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.requested = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # os.write, because the signal may have interrupted print; a lost terminal takes no message.
        with contextlib.suppress(OSError):
            line = f"\n{signal.Signals(number).name}: saving after this step; press Ctrl-C again to exit at once\n"
            os.write(library_log.terminal(2), line.encode())
        if not self._alone:
            os.kill(os.getpid(), signal.SIGTERM)
