"""metrics.jsonl as it grows: each look reads what was added since the one before."""

from __future__ import annotations

import json
import math
from array import array
from pathlib import Path
from typing import NamedTuple

REMEMBERED = 256
"""Bytes before the place that was read up to, by which a file is known again."""
WHOLE = 32
"""Points at the beginning of a curve that are never left out: a logarithmic axis shows them apart."""


class Series(NamedTuple):
    """The finite values of a metric over the steps."""

    steps: array[float]
    values: array[float]


class MetricsLog:
    """The metrics of a run, in memory. A line that is half written is left for the next look.

    A run that goes on from a checkpoint replaces the file by a shorter one, which is then read anew.
    """

    def __init__(self, path: Path):
        self.path = path
        self._empty()

    def _empty(self) -> None:
        self.series: dict[str, Series] = {}
        self.last: dict[str, float] = {}
        """The newest finite value of each metric."""
        self.step = 0
        self.training_steps: array[int] = array("q")
        """Those of the training records."""
        self.unreadable = 0
        """Lines that are no record."""
        self.changed: float | None = None
        """When the file was last written, in seconds since 1970; None = there is none."""
        self.bytes_read = 0
        """In all looks together."""
        self._offset, self._inode, self._remembered = 0, 0, b""

    def look(self) -> bool:
        """Read what is new; returns whether anything is. OSError where the file cannot be read."""
        try:
            there = self.path.stat()
        except FileNotFoundError:
            had = self.changed is not None
            self._empty()
            return had
        if (there.st_ino, there.st_size, there.st_mtime) == (self._inode, self._offset, self.changed):
            return False
        with self.path.open("rb") as file:
            file.seek(self._offset - len(self._remembered))
            if there.st_size < self._offset or file.read(len(self._remembered)) != self._remembered:
                read = self.bytes_read
                self._empty()
                self.bytes_read = read
                file.seek(0)
            added = file.read()
        complete = added[: added.rfind(b"\n") + 1]
        self._inode, self.changed = there.st_ino, there.st_mtime
        self._offset += len(complete)
        self.bytes_read += len(added)
        self._remembered = (self._remembered + complete)[-REMEMBERED:]
        for line in complete.split(b"\n")[:-1]:
            self._take(line)
        return True

    def _take(self, line: bytes) -> None:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        step = record.get("step") if isinstance(record, dict) else None
        if not isinstance(record, dict) or type(step) is not int or not 0 <= step < 2**53:
            self.unreadable += bool(line.strip())
            return
        self.step = max(self.step, step)
        if "loss" in record:
            self.training_steps.append(step)
        for name, value in record.items():
            if name == "step" or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            try:
                value = float(value)
            except OverflowError:
                continue
            if math.isfinite(value):
                series = self.series.setdefault(name, Series(array("d"), array("d")))
                series.steps.append(step)
                series.values.append(value)
                self.last[name] = value


def thinned(series: Series, most: int) -> tuple[list[float], list[float]]:
    """(steps, values) with about `most` points: the first ones, then of each stretch its least and its greatest value,
    so that a spike of one step stays."""
    steps, values = series
    count = len(steps)
    if count <= most:
        return list(steps), list(values)
    kept = list(range(min(WHOLE, most // 4)))
    first, stretches = len(kept), max(1, (most - len(kept)) // 2)
    for number in range(stretches):
        begin = first + (count - first) * number // stretches
        end = first + (count - first) * (number + 1) // stretches
        if begin < end:
            within = range(begin, end)
            kept += sorted({min(within, key=values.__getitem__), max(within, key=values.__getitem__)})
    if kept[-1] != count - 1:
        kept.append(count - 1)
    return [steps[at] for at in kept], [values[at] for at in kept]
