"""Calls on a thread of their own: what is slow, hangs or fails there delays and ends no training."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

MANY = 10_000
"""Calls that may wait; further ones are dropped."""


class Aside:
    """Does calls in their order. The first failure is told in one line, further ones are not.

    what: whom the calls are for, in words. say: takes that line. said: an error in words, where its own say too much.
    """

    def __init__(self, what: str, say: Callable[[str], None], said: Callable[[Exception], str] | None = None):
        self._what, self._say, self._said = what, say, said or _one_line
        self._calls: queue.Queue[Callable[[], Any] | None] = queue.Queue(MANY)
        self._warned = False
        self._thread = threading.Thread(target=self._work, name=f"telling {what}", daemon=True)
        self._thread.start()

    def do(self, call: Callable[[], Any]) -> None:
        """Do it some time; returns at once."""
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._warn("takes nothing any more, what is further said is lost to it")

    def close(self, patience: float) -> None:
        """Wait for at most so many seconds until all calls are done."""
        try:
            self._calls.put_nowait(None)
            self._thread.join(patience)
        except queue.Full:
            pass
        if self._thread.is_alive():
            self._warn("does not answer, what it was told last may be missing there")

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except Exception as error:
                self._warn(self._said(error))

    def _warn(self, words: str) -> None:
        if not self._warned:
            self._warned = True
            self._say(f"warning: {self._what}: {words}; the run goes on")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
