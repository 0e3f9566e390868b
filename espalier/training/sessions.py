"""Where the time of a session goes, kept in RUN/sessions.jsonl so that a kill loses at most its last seconds.

Every line is the whole record of a session so far; the last one counts (espalier/goodput.py reads them). Lines are
appended; when a session begins, and where they become many, the file is replaced by one line a session.
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from espalier.files import replacing
from espalier.goodput import PARTS, last_lines

PAUSE = 1.0
"""Seconds between two lines, at least."""
MANY = 1000
"""Lines after which the file is made short again."""


class SessionLog:
    """The clock of a session. It runs from the start of the process, first for the part `start`.

    start: the step from which the session goes on. began: seconds since 1970; a second session of one process begins
    where the first ended. path: None = only measure. Times go to the part of the innermost `within`, else to the one
    that `now` named last. A disk that takes no line ends no run.
    """

    def __init__(self, path: Path | None, start: int, began: float | None = None):
        self._path, self._start, self.step = path, start, start
        self._name = uuid.uuid4().hex[:12]
        self._seconds = dict.fromkeys((name for name in PARTS if name != "lost"), 0.0)
        self._open = ["start"]
        self._lines = 0
        at, self._mark = time.time(), time.monotonic()
        self._began = min(at if began is None else began, at)
        if path is not None:
            before = self._shorten()
            ends = [session.ended for _, session in before.values() if session.ended <= at]
            self._began = max([self._began, *ends])
        self._seconds["start"] = at - self._began
        self._write()

    def now(self, part: str) -> None:
        """From here on, time outside `within` goes to this part."""
        self._settle()
        self._open[0] = part

    @contextlib.contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Time spent inside goes to this part."""
        self._settle()
        self._open.append(part)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def alive(self, step: int) -> None:
        """The step is done: write a line unless the last one is young."""
        self.step = step
        if self._path is not None and time.monotonic() - self._written >= PAUSE:
            self._write()

    def end(self, how: str) -> None:
        """how: ended or failed."""
        self._write(how)

    def _settle(self) -> None:
        """Give the time since the last call to the part that is open."""
        now = time.monotonic()
        self._seconds[self._open[-1]] += now - self._mark
        self._mark = now

    def _write(self, how: str = "") -> None:
        self._settle()
        self._written = self._mark
        if self._path is None:
            return
        seconds = {name: round(value, 3) for name, value in self._seconds.items()}
        record = {"session": self._name, "began": round(self._began, 3), "start": self._start, "step": self.step}
        record |= {"seconds": seconds} | ({"end": how} if how else {})
        with contextlib.suppress(OSError):
            if self._lines >= MANY:
                self._shorten()
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        self._lines += 1

    def _shorten(self) -> dict:
        """One line a session; returns name → line and session."""
        assert self._path is not None
        self._lines, kept = 0, {}
        with contextlib.suppress(OSError):
            if self._path.exists():
                kept = last_lines(self._path.read_text(encoding="utf-8", errors="replace").split("\n"))
                with replacing(self._path) as file:
                    file.writelines(line + "\n" for line, _ in kept.values())
        return kept
