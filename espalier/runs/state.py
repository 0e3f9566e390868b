"""Whether a run goes on, as far as its files tell.

A training holds a lock on the file `.lock` of its run directory for as long as it trains, and writes there where it
runs. So on its own machine, and on network disks that share locks (NFS), a held lock says that it runs. A lock that is
free says that it does not, but only on the machine that took it. From elsewhere the last line of metrics.jsonl must
tell: a run whose last line is young counts as running.
"""

from __future__ import annotations

import fcntl
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

RUNNING, FINISHED, STOPPED, FAILED, IMPORTED = "running", "finished", "stopped", "failed", "imported"
DAMAGED = "damaged"
"""Its config.json cannot be read."""

PATIENCE = 120.0
"""Seconds for which a run may at least be silent before it counts as stopped where nothing else tells."""
MANY = 5
"""So many intervals between lines at least, likewise."""
SAME_TIME = 2.0
"""Seconds by which a copy may change the order of two files."""


class State(NamedTuple):
    name: str
    note: str = ""
    """What people must know beside it, in words."""


class Facts(NamedTuple):
    """What the files of a run say. Times in seconds since 1970; None where there is no such file."""

    step: int
    """That of the last line of metrics.jsonl, or of the summary."""
    steps: int | None
    """Of the schedule; None = it was never to be trained."""
    began: float
    """When config.json was written, which the beginning of each session does."""
    line: float | None
    """When metrics.jsonl was last written."""
    ended: float | None
    """When summary.json was written, which is the last thing that a session does."""
    summary: Mapping[str, Any]
    failure: Mapping[str, Any]
    """failure.json: what ended the last session, where that was an error."""
    interval: float | None
    """Seconds between two lines of training of this session."""
    locked: bool | None
    """Whether another process holds the lock; None = that cannot be told."""
    host: str | None
    """The machine that took it last."""


def lock_held(path: Path) -> bool | None:
    """Whether a process trains in the run with this `.lock`; None where there is no lock or it cannot be asked."""
    try:
        with path.open("rb") as file:
            try:
                # Given back at once; a training that begins in this moment tries again (RunDirectory.writing).
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            fcntl.flock(file, fcntl.LOCK_UN)
            return False
    except OSError:
        return None


def last_session_ended(began: float, ended: float | None, summary: Mapping[str, Any], step: int) -> bool:
    """Whether summary.json is of the last session, and not of one before it.

    step: of the last line of metrics.jsonl. A copy of a run may have its files in any order, so that a summary of the
    last step counts too.
    """
    if ended is None or not summary:
        return False
    at = summary.get("step")
    return ended >= began - SAME_TIME or isinstance(at, int) and at >= step


def state_of(facts: Facts, now: float) -> State:
    """now: in seconds since 1970."""
    if facts.steps is None and facts.line is None:
        return State(IMPORTED, "nothing was trained here")
    age = max(0.0, now - max(facts.line or 0.0, facts.began))
    patience = max(PATIENCE, MANY * (facts.interval or 0.0))
    silent = f"no line for {duration(age)}"
    if facts.locked:
        return State(RUNNING, silent if age > patience else "" if facts.line and facts.step else "no step yet")
    if facts.failure:
        return State(FAILED, str(facts.failure.get("error", "")))
    if last_session_ended(facts.began, facts.ended, facts.summary, facts.step):
        return _ended(facts)
    here = facts.host is not None and facts.host == platform.node() and facts.locked is False
    if facts.steps is not None and facts.step >= facts.steps:
        if age <= patience:
            return State(RUNNING, "all steps are done, it writes its results")
        return State(STOPPED, f"all steps are done, but no results were written; {silent}")
    if here:
        return State(FAILED, f"its process is gone and left no word: killed, or out of memory; {silent}")
    where = f"it runs on {facts.host}" if facts.host else "where it runs is not known"
    if age <= patience:
        return State(RUNNING, f"by its last line, {duration(age)} ago; {where}")
    return State(STOPPED, f"{silent}; {where.replace('runs', 'ran')}, and more cannot be told from here")


def _ended(facts: Facts) -> State:
    step, best = facts.summary.get("step"), facts.summary.get("best")
    # A run that was extended later has not reached its steps.
    whole = not isinstance(step, int) or facts.steps is None or step >= facts.steps
    if isinstance(best, Mapping) and best.get("ended") and not whole:
        return State(FINISHED, "ended early, for nothing got better")
    if facts.summary.get("finished", True) and whole:
        return State(FINISHED)
    if number := facts.summary.get("stopped_by"):
        names = {1: "a lost terminal", 2: "Ctrl-C", 15: "SIGTERM"}
        return State(STOPPED, f"by {names.get(number, f'signal {number}')}; the same command goes on")
    return State(STOPPED, "paused; the same command without --stop-at goes on")


def duration(seconds: float) -> str:
    """For people: 40 s, 12 min, 3 h, 2 d."""
    for size, unit, least in ((86400, "d", 2), (3600, "h", 2), (60, "min", 2)):
        if seconds >= least * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
