"""One run as others are compared with: what its files say now, without the weights."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from espalier.redaction import recorded
from espalier.report.task import TaskReport, report_of
from espalier.runs.metrics_log import MetricsLog
from espalier.runs.state import DAMAGED, RUNNING, Facts, State, last_session_ended, lock_held, state_of

MAIN = {
    "sequence_classification": ("accuracy", "spearman", "pearson", "micro_f1", "f1"),
    "token_classification": ("f1",),
    "multiple_choice": ("accuracy",),
    "ranking": ("ndcg@10", "mrr@10"),
    "reward": ("accuracy",),
    "preference": ("accuracy", "margin"),
    "sentence_embedding": ("spearman", "ndcg@10"),
    "question_answering": ("f1", "exact"),
}
"""Task → the metrics of an evaluation by which people compare, the first that is there; of all others the loss."""
NOT_SETTINGS = ("published", "command", "run_dir", "json", "debug", "report", "distributed")
"""What config.json holds and does not make one run another."""
OFTEN = 5.0
"""Seconds between two looks from which the time left is worked out."""
LARGEST = 1e300
"""Beyond, a number is a mistake."""
TEXTS, LONGEST = 4, 600
"""Samples that are shown, and their characters at most."""


class Run:
    """A run directory that is looked at again and again. `problems` are lines for people: what could not be read."""

    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name
        self.log = MetricsLog(path / "metrics.jsonl")
        self.version = 0
        """Counts the looks that found something new."""
        self.problems: list[str] = []
        self.config: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}
        """Flat, by the names that flags have."""
        self.summary: dict[str, Any] = {}
        self.failure: dict[str, Any] = {}
        self.samples: list[str] = []
        self.state = State("")
        self._session: dict[str, Any] = {}
        self._files: dict[str, tuple[float, int]] = {}
        """Name → time and size of what has been read."""
        self._damaged: dict[str, str] = {}
        self._seen: list[tuple[float, int]] = []
        """(seconds, step) of looks at a run that goes on."""

    def look(self) -> None:
        """Read what has changed; never raises because of what is there, or is not there any more."""
        changed = False
        for name, attribute in (("config.json", "config"), ("summary.json", "summary"), ("failure.json", "failure")):
            changed |= self._read(name, attribute)
        changed |= self._read(".lock", "_session")
        try:
            changed |= self.log.look()
        except OSError as error:
            self._damaged["metrics.jsonl"] = f"metrics.jsonl cannot be read ({error.strerror or error})"
        else:
            self._damaged.pop("metrics.jsonl", None)
            if self.log.unreadable:
                lines = "1 line" if self.log.unreadable == 1 else f"{self.log.unreadable} lines"
                self._damaged["metrics.jsonl"] = f"{lines} of metrics.jsonl cannot be read and are left out"
        if self._there("samples.json") != self._files.get("samples.json"):
            self.samples = self._read_samples()
            changed = True
        before = self.state, self.problems
        self.problems = [f"{self.name}: {self._damaged[name]}" for name in sorted(self._damaged)]
        now = time.time()
        self.state = State(DAMAGED) if "config.json" in self._damaged else state_of(self._facts(now), now)
        if self.state.name != RUNNING or self._seen and self.step < self._seen[-1][1]:
            # Another session goes on from an earlier step, and has a speed of its own.
            self._seen = []
        # Before the first line it compiles.
        under_way = self.state.name == RUNNING and self.step > self._first_step()
        if under_way and (not self._seen or self._seen[-1][1] != self.step):
            self._seen = [*self._seen[-60:], (time.monotonic(), self.step)]
        if changed or (self.state, self.problems) != before:
            self.version += 1

    @property
    def step(self) -> int:
        at = self.summary.get("step") if self.log.changed is None else None
        return at if isinstance(at, int) else self.log.step

    @property
    def steps(self) -> int | None:
        value = self.config.get("steps")
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    @property
    def updated(self) -> float:
        """When it last wrote something, in seconds since 1970."""
        times = [self._files[name][0] for name in ("summary.json", "config.json") if name in self._files]
        return max([*times, self.log.changed or 0.0])

    def row(self, now: float) -> dict[str, Any]:
        """What a table shows of it: JSON values, None where it is not known. Times in seconds, rates a second."""
        metric, value = self._main_metric()
        log = self.log.last
        return {
            "name": self.name,
            "path": str(self.path),
            "task": self.config.get("task") if isinstance(self.config.get("task"), str) else None,
            "title": self._title(),
            "state": self.state.name,
            "note": self.state.note,
            "step": self.step,
            "steps": self.steps,
            "loss": log.get("loss", _number(self.summary.get("loss"))),
            "metric": metric,
            "value": value,
            "tokens_per_second": self._speed(),
            "age": max(0.0, now - self.updated),
            "left": self._left(now) if self.state.name == RUNNING else None,
            "parameters": _number(self.summary.get("parameters")),
            "seconds": _number(self.summary.get("seconds")),
            "command": recorded(self.config.get("command")) if isinstance(self.config.get("command"), str) else None,
            "report": (self.path / "report.html").is_file(),
            "problems": self.problems,
        }

    def _speed(self) -> float | None:
        whole = _number(self.summary.get("tokens_per_second"))
        # While it trains, that of the last interval; afterwards the mean of the session.
        live = self.log.last.get("tokens_per_second")
        return (live or whole) if self.state.name == RUNNING else (whole or live)

    def _main_metric(self) -> tuple[str | None, float | None]:
        """Name and value of the metric by which people compare: of the whole evaluation at the end, else the last one
        that was measured meanwhile."""
        final = self.summary.get("metrics")
        final = final if isinstance(final, Mapping) and self._done() else {}
        measured = {
            name.removeprefix("eval/"): value for name, value in self.log.last.items() if name.startswith("eval/")
        }
        held_out = self.summary.get("eval")
        if isinstance(held_out, Mapping) and self._done():
            # The values of the best checkpoint, where the run keeps it.
            measured |= held_out
        task = self.config.get("task")
        stopping = self.config.get("early_stopping")
        chosen = [self.config.get("keep_best"), stopping.get("metric") if isinstance(stopping, Mapping) else None]
        for name in (*chosen, *MAIN.get(task if isinstance(task, str) else "", ()), "loss"):
            for values in (final, measured):
                if isinstance(name, str) and (value := _number(values.get(name))) is not None:
                    return name, value
        return None, None

    def _done(self) -> bool:
        return last_session_ended(self._began(), self._time("summary.json"), self.summary, self.log.step)

    def _title(self) -> str | None:
        try:
            report = report_of(self.config)
            return str(report.title(self.config)) if report.title is not TaskReport().title else None
        except Exception:
            # The settings of another version, or no settings: the name of the task is all there is.
            return None

    def _facts(self, now: float) -> Facts:
        began, ended = self._began(), self._time("summary.json")
        asked = not last_session_ended(began, ended, self.summary, -1) or ended is not None and ended < began
        host = self._session.get("host")
        return Facts(
            step=self.step,
            steps=self.steps,
            began=began,
            line=self.log.changed,
            ended=ended,
            summary=self.summary,
            failure=self.failure,
            interval=self._interval() if asked else None,
            locked=lock_held(self.path / ".lock") if asked else False,
            host=host if isinstance(host, str) else None,
        )

    def _began(self) -> float:
        return self._time("config.json") or 0.0

    def _time(self, name: str) -> float | None:
        found = self._files.get(name)
        return found[0] if found else None

    def _first_step(self) -> int:
        """The step from which this session went on."""
        step = self._session.get("step")
        return step if isinstance(step, int) else 0

    def _interval(self) -> float | None:
        first = self._first_step()
        lines = sum(step > first for step in self.log.training_steps)
        return (self.log.changed - self._began()) / lines if lines and self.log.changed else None

    def _left(self, now: float) -> float | None:
        """Seconds to the last step; None before the first line of this session."""
        if self.steps is None or self.log.changed is None or self.step <= self._first_step():
            return None
        stop = self.config.get("stop_at")
        last = min(self.steps, stop) if isinstance(stop, int) else self.steps
        each = self._seen_seconds_a_step() or self._said_seconds_a_step() or self._session_seconds_a_step()
        if each is None:
            return None
        # Since its last line it has gone on, though not beyond the next.
        passed = min(max(0.0, now - self.log.changed), each * (_number(self.config.get("log_every")) or 1))
        return max(0.0, (last - self.step) * each - passed)

    def _seen_seconds_a_step(self) -> float | None:
        """By what was seen of this run as it went on."""
        (then, before), (now, step) = (self._seen[0], self._seen[-1]) if self._seen else ((0.0, 0), (0.0, 0))
        return (now - then) / (step - before) if now - then >= OFTEN and step > before else None

    def _said_seconds_a_step(self) -> float | None:
        """By its tokens a second, where a step has a known number of tokens: in pretraining, whose rows are full."""
        data = self.config.get("data")
        rows, speed = _number(self.config.get("batch_size")), self.log.last.get("tokens_per_second")
        length = _number(data.get("sequence_length")) if isinstance(data, Mapping) else None
        return rows * length / speed if rows and length and speed else None

    def _session_seconds_a_step(self) -> float | None:
        """By the time since this session began, in which it also compiled."""
        done = self.step - self._first_step()
        return (self.log.changed - self._began()) / done if done > 1 and self.log.changed else None

    def _read(self, name: str, attribute: str) -> bool:
        """Take the object in a file, if it is another than at the last look; returns whether it is."""
        there = self._there(name)
        if there == self._files.get(name):
            return False
        self._damaged.pop(name, None)
        if there is None:
            del self._files[name]
            setattr(self, attribute, {})
        else:
            self._files[name] = there
            try:
                text = (self.path / name).read_text(encoding="utf-8")
                # Older runs have an empty lock.
                value = json.loads(text) if text or name != ".lock" else {}
                if not isinstance(value, dict):
                    raise ValueError("it holds no object")
                setattr(self, attribute, value)
            except (ValueError, RecursionError) as error:
                # `.lock` is written in place, and may be seen half written.
                if name != ".lock":
                    self._damaged[name] = f"{name} is damaged ({error})"
            except OSError as error:
                self._damaged[name] = f"{name} cannot be read ({error.strerror or error})"
                del self._files[name]
        if attribute == "config":
            kept = {key: value for key, value in self.config.items() if key not in NOT_SETTINGS}
            self.settings = flat(recorded(kept))
        return True

    def _there(self, name: str) -> tuple[float, int] | None:
        try:
            there = os.stat(self.path / name)
        except OSError:
            return None
        return there.st_mtime, there.st_size

    def _read_samples(self) -> list[str]:
        """What the run wrote to show: texts of a decoder, and texts of an encoder with its guesses in brackets."""
        there = self._there("samples.json")
        if there is None:
            self._files.pop("samples.json", None)
            return []
        self._files["samples.json"] = there
        with contextlib.suppress(OSError, ValueError, RecursionError, KeyError, TypeError, IndexError, AttributeError):
            held = json.loads((self.path / "samples.json").read_text(encoding="utf-8"))
            texts = held.get("texts") or [_filled(sample) for sample in held.get("samples") or []]
            return [str(text)[:LONGEST] for text in texts[:TEXTS]]
        return []


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by the names that flags have; texts for lists, so that they can be compared."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            found[prefix + name] = json.dumps(value, ensure_ascii=False) if value else None
        else:
            # JSON has neither NaN nor infinity.
            finite = not isinstance(value, float) or math.isfinite(value)
            found[prefix + name] = value if finite else str(value)
    return found


def _filled(sample: Mapping[str, Any]) -> str:
    slots = {slot["index"]: slot for slot in sample["masked"]}
    parts = []
    for at, token in enumerate(sample["tokens"]):
        if at in slots:
            guess, truth = slots[at]["guesses"][0][0], slots[at]["truth"]
            space = " " if guess.startswith(" ") else ""
            parts.append(
                f"{space}[{guess.strip()}]" if guess == truth else f"{space}[{guess.strip()}, not {truth.strip()}]"
            )
        else:
            parts.append(token)
    return "".join(parts).strip()


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
    return value if known else None
