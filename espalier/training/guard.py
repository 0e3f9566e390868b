"""Graceful shutdown: on a signal to stop, a run finishes its step, saves and exits."""

from __future__ import annotations

import contextlib
import signal

from espalier import signals
from sharding.processes.coordination import gather, watch


class StopSignal:
    """Context in which the first SIGTERM, SIGHUP (a lost terminal) or Ctrl-C only requests a stop, once a step is made
    that is not saved; a second Ctrl-C ends all at once (espalier/signals.py).

    Several processes stop at the same point, wherever the signal went: they agree on it over the connections of
    sharding/processes/watchdog.py.
    """

    def __init__(self):
        self.requested: int | None = None
        """The number of the signal that requested the stop."""
        self._watch = watch()
        self._begun = False
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> StopSignal:
        self._stack.enter_context(signals.saving(self._ask))
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    def reached(self) -> bool:
        """Whether to stop here. Every process must call it at the same points: after each step, within evaluations."""
        self._begun = True
        return self._watch.reached() if self._watch else self.requested is not None

    def number(self) -> int | None:
        """The signal that ended the session early, the same in every process. Every process must call it once."""
        return next((number for number in gather("stopped by", self.requested) if number), None)

    def _ask(self, number: int) -> bool:
        # Before the first step there is nothing to save, and that may be minutes of compilation away.
        if self._begun:
            self.requested = number
            signals.tell(f"{signal.Signals(number).name}: saving; press Ctrl-C again to exit at once")
            if self._watch:
                self._watch.stop()
        return self._begun
