"""How much of the time of a run became training that counts, over all its starts. A leaf.

A start of a run is a *session*; it writes where its seconds went into RUN/sessions.jsonl (training/sessions.py). A step
counts once: those that a session did beyond the checkpoint from which a later one went on were done again, and their
time is lost. The share of productive time among all time is what Google calls goodput ("Introducing ML Productivity
Goodput", 2024); the time between two sessions, in which nothing runs, stands apart here, because a file cannot tell a
pause that somebody wanted from one that nobody did.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from espalier import progress

PARTS = {
    "training": "steps that count",
    "lost": "steps that were done again",
    "compile": "until the first step is done, and what new shapes of a batch compile later",
    "save": "what the loop waited for while checkpoints were written",
    "data": "what it waited for batches",
    "evaluation": "evaluations",
    "start": "from the start of the process to the first batch",
}
"""What seconds go to, in the order in which people read it. A session has no part `lost`: later ones tell."""


class Session(NamedTuple):
    """One start of a run, as far as its last sign of life."""

    began: float
    """In seconds since 1970, as the process began."""
    start: int
    """The step from which it went on."""
    step: int
    """The last step that it had done."""
    seconds: Mapping[str, float]
    """By name of PARTS."""
    end: str = ""
    """ended or failed; "" = it was killed, or still runs."""

    @property
    def ended(self) -> float:
        """Its last sign of life, in seconds since 1970."""
        return self.began + sum(self.seconds.values())


class Goodput(NamedTuple):
    """Where the time of a run went."""

    seconds: dict[str, float]
    """By name of PARTS, which are all there."""
    lost_steps: int
    """Steps that were done and done again."""
    starts: int
    killed: int
    """Sessions before the last that left no word of their end."""
    between: float
    """Seconds between the sessions, in which nothing ran."""
    unrecorded: int
    """Steps from before the first record: the run is older than sessions.jsonl."""

    @property
    def total(self) -> float:
        """Seconds in which the run ran."""
        return sum(self.seconds.values())

    @property
    def fraction(self) -> float | None:
        """The part of the time in which the run ran that became training that counts; None where there is no time."""
        return self.seconds["training"] / self.total if self.total > 0 else None

    @property
    def record(self) -> dict[str, Any]:
        """For summary.json."""
        values = {name: getattr(self, name) for name in ("fraction", "seconds", "lost_steps", "starts", "killed")}
        seconds = {name: round(value, 3) for name, value in self.seconds.items()}
        return values | {"seconds": seconds, "between": round(self.between, 3), "unrecorded_steps": self.unrecorded}


def goodput(sessions: Sequence[Session]) -> Goodput | None:
    """What the sessions of a run come to, in their order; None where there are none."""
    if not sessions:
        return None
    seconds = dict.fromkeys(PARTS, 0.0)
    for shares in counted(sessions):
        for name, value in shares.items():
            seconds[name] += value
    gaps = (max(0.0, later.began - earlier.ended) for earlier, later in zip(sessions, sessions[1:], strict=False))
    killed = sum(not session.end for session in sessions[:-1])
    return Goodput(seconds, sum(lost_steps(sessions)), len(sessions), killed, sum(gaps), sessions[0].start)


def counted(sessions: Sequence[Session]) -> Iterator[dict[str, float]]:
    """The seconds of each session by name of PARTS: of its training, what later sessions did again is lost.

    The steps of a session are taken to be equally long, but for the first, whose time is that of its compilation.
    """
    for session, lost in zip(sessions, lost_steps(sessions), strict=True):
        seconds = {name: float(session.seconds.get(name, 0.0)) for name in PARTS}
        timed, training = session.step - session.start - 1, seconds["training"]
        again = training if lost > timed else training * lost / timed if lost else 0.0
        yield seconds | {"training": training - again, "lost": again}


def lost_steps(sessions: Sequence[Session]) -> list[int]:
    """How many steps of each session were done again: those after the first step of any later session."""
    found, kept = [], float("inf")
    for session in reversed(sessions):
        found.append(int(max(0, session.step - max(session.start, kept))) if kept < session.step else 0)
        kept = min(kept, session.start)
    return found[::-1]


def read_sessions(path: Path) -> list[Session]:
    """The sessions in a file of lines, of which the last of each session counts; [] where there is no file. Lines that
    are no record, such as one that was cut by a kill, are left out."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    return [session for _, session in last_lines(lines).values()]


def last_lines(lines: Iterable[str]) -> dict[str, tuple[str, Session]]:
    """Name of a session → its last line, and what that says."""
    found: dict[str, tuple[str, Session]] = {}
    for line in lines:
        try:
            record = json.loads(line)
            seconds = {name: max(0.0, float(record["seconds"].get(name, 0.0))) for name in PARTS}
            start, step, end = int(record["start"]), int(record["step"]), str(record.get("end") or "")
            session = Session(float(record["began"]), start, step, seconds, end)
            name = str(record["session"])
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
            continue
        if math.isfinite(session.ended):
            found[name] = line, session
    return found


def words(found: Goodput) -> str:
    """For the end of a run: "93.1 % of 1:02:03: training 57:46, compile 1:10, …; 3 starts, 5:00 between them"."""
    parts = [f"{name} {short(value)}" for name, value in found.seconds.items() if value >= 0.05 and name != "lost"]
    if found.lost_steps:
        parts.append(f"{progress.plural(found.lost_steps, 'step')} done again {short(found.seconds['lost'])}")
    line = f"{found.fraction or 0:.1%} of {short(found.total)}: ".replace("%", " %") + ", ".join(parts)
    if found.starts > 1:
        line += f"; {found.starts} starts, {short(found.between)} between them"
    if found.unrecorded:
        line += f"; without the first {progress.plural(found.unrecorded, 'step')}, of which no times are known"
    return line


def short(seconds: float) -> str:
    """4.2 s, 1:10, 1:02:03."""
    return f"{seconds:.1f} s" if seconds < 59.95 else progress.clock(seconds)
