"""Logging of a run: the progress line, metrics.jsonl and what the trackers get. The only place that logs."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NotRequired, TypedDict, cast

import jax

from espalier import progress
from espalier.files import replacing
from espalier.trackers.contract import PATIENCE, Boards, Session
from espalier.trackers.notify import Notifier
from espalier.training.run import RunDirectory
from espalier.training.sessions import SessionLog


class Interval(TypedDict):
    """The steps since the last multiple of log_every, as a checkpoint stores them (JSON)."""

    steps: int
    sums: dict[str, float]
    """Of each metric over these steps; exact, because float32 values are added up as doubles."""
    skipped: NotRequired[int]
    """Bad steps among those since then, which are not in the sums."""


class Reading(NamedTuple):
    """How far a run is at a time, or what lies between two of them."""

    step: int
    tokens: int
    seconds: float


class Tracker:
    """Logs one run from `start_step` on; speeds exclude the first step (it compiles) and evaluations.

    A training record holds means over the steps since the last multiple of log_every, each step with the same weight
    (loss, accuracy, gradient norm), and the learning rate of its own step. An interval that was cut by a pause is
    continued, so that the log of a resumed run equals that of an uninterrupted one.

    total_steps: of the schedule. last_step: the last of this session, for the time left. interval: from the checkpoint
    at start_step.
    tokens: trained on before this session.
    flops_per_step, peak_flops: of the whole mesh; no MFU if one of them is None.
    quiet: only measure (all processes but the first).
    trackers: names in trackers.contract.TRACKERS. config: what they are told of the run. notify: the webhook.
    """

    def __init__(
        self,
        run: RunDirectory,
        *,
        total_steps: int,
        start_step: int,
        last_step: int,
        tokens: int = 0,
        flops_per_step: float | None = None,
        peak_flops: float | None = None,
        log_every: int = 10,
        quiet: bool = False,
        interval: Interval | None = None,
        trackers: Sequence[str] = ("tensorboard",),
        config: Mapping[str, Any] | None = None,
        notify: Notifier | None = None,
    ):
        self._run, self._quiet = run, quiet
        self._total, self._last, self._log_every = total_steps, last_step, log_every
        self._flops, self._peak = flops_per_step, peak_flops
        self._compiled: set[tuple] = set()
        self._trackers, self._config, self._notify = trackers, config or {}, notify
        self._metrics = self._boards = None
        self._begin(start_step, tokens, interval)

    def begin(self, step: int, tokens: int, interval: Interval | None) -> None:
        """Go back to a step and log from it on; arguments as of the class."""
        self.close()
        self._begin(step, tokens, interval)

    def _begin(self, step: int, tokens: int, interval: Interval | None) -> None:
        self.first_step_seconds: float | None = None
        # An interval that ends here under a new log_every has its record already.
        open_here = interval and (interval["steps"] or interval.get("skipped")) and step % self._log_every
        carried = interval if open_here else None
        self.interval: Interval = carried or {"steps": 0, "sums": {}}
        self._waited, self.tokens = 0.0, tokens
        self._shown = time.perf_counter()
        self._clock = self._mark = self._now = Reading(step, tokens, self._shown)
        self.evaluations: list[tuple[int, dict[str, float]]] = []
        """Those before this step; known to the one who writes."""
        self._evaluated: set[int] = set()
        self.session = SessionLog(None if self._quiet else self._run.sessions, step, self._run.began)
        if not self._quiet:
            kept = cut_metrics(self._run, step, within_interval=carried is not None)
            for record in kept:
                found = {name[len("eval/") :]: value for name, value in record.items() if name.startswith("eval/")}
                if found:
                    self.evaluations.append((record["step"], found))
            self._evaluated = {step for step, _ in self.evaluations}
            self._metrics = self._run.metrics.open("a", encoding="utf-8")
            self._boards = Boards(self._trackers, Session(self._run.path, self._config, step), self.say)

    @property
    def tokens_per_second(self) -> float | None:
        """Mean over this session's steps after the first, up to the last one logged."""
        passed = self._since(self._clock)
        return passed.tokens / passed.seconds if passed else None

    @property
    def mfu(self) -> float | None:
        """Model FLOP/s over the peak of the hardware (PaLM, Chowdhery et al. 2022, app. B), over the same steps."""
        return self._utilisation(self._since(self._clock))

    @property
    def data_wait(self) -> float | None:
        """The fraction of the time spent waiting for batches, over the same steps."""
        passed = self._since(self._clock)
        return self._waited / passed.seconds if passed else None

    @property
    def carried(self) -> dict[str, Any]:
        """What a checkpoint stores, so that log and counts go on from it (JSON)."""
        return {"interval": self.interval, "tokens": self.tokens}

    @contextlib.contextmanager
    def compiling(self, batch: dict) -> Iterator[None]:
        """A context that reports a wait for compilation if this is the first batch with arrays of these shapes."""
        shapes = tuple((path, array.shape) for path, array in jax.tree_util.tree_leaves_with_path(batch))
        if shapes in self._compiled:
            yield
            return
        if not self._compiled:
            self.session.now("compile")
        self._compiled.add(shapes)
        with self.session.within("compile"), self._told("compiling the train step"):
            yield

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent inside counts as waiting for a batch."""
        began = time.perf_counter()
        with self.session.within("data"), jax.profiler.TraceAnnotation("wait for data"):
            yield
        if self.first_step_seconds is not None:
            self._waited += time.perf_counter() - began

    def log(self, step: int, metrics: dict[str, float], tokens: int, skipped: bool = False) -> None:
        """Call it for every step once its metrics and tokens are known; it writes the first, the last and every
        log_every-th. Of a skipped one nothing is known but that it was."""
        self.tokens += 0 if skipped else tokens
        self._now = Reading(step, self.tokens, time.perf_counter())
        first = self.first_step_seconds is None
        if first:
            self.first_step_seconds = self._now.seconds - self._clock.seconds
            self._clock = self._mark = self._now
            self.session.now("training")
        self.session.alive(step)
        means = self._skipped() if skipped else self._means(metrics)
        ends = step % self._log_every == 0
        if ends:
            self.interval = {"steps": 0, "sums": {}}
        written = ends or step in (1, self._last)
        # A terminal shows progress even when records are rare.
        if not (written or first or progress.in_place() and self._now.seconds - self._shown >= 1):
            return
        self._shown = self._now.seconds
        passed = self._since(self._mark)
        speed = passed.tokens / passed.seconds if passed else None
        mfu = self._utilisation(passed)
        if written:
            self._mark = self._now
            timing = {"tokens_per_second": speed, "mfu": mfu}
            self._write(step, means | {name: value for name, value in timing.items() if value is not None})
        line = f"step {step}/{self._total}"
        if "loss" in means:
            line += f"  loss {means['loss']:.3f}"
        if first:
            line += f"  first step {self.first_step_seconds:.1f} s"
        if passed and speed is not None:
            left = (self._last - step) * passed.seconds / passed.step
            line += f"  {_short(speed)} tok/s  {progress.clock(left)} left"
        if mfu is not None:
            line += f"  MFU {mfu:.0%}".replace("%", " %")
        self._show(line, keep=step == self._last)

    def _means(self, metrics: dict[str, float]) -> dict[str, float]:
        """Add the metrics of a step to the interval; returns the means over it."""
        before, steps = self.interval["sums"], self.interval["steps"] + 1
        sums = {name: before.get(name, 0.0) + value for name, value in metrics.items()}
        # A new one each time: a checkpoint may still be writing the last.
        self.interval = cast(Interval, self.interval | {"steps": steps, "sums": sums})
        # A learning rate is a setting of this step, not a measurement.
        return {
            name: metrics[name] if name.endswith("learning_rate") else total / steps for name, total in sums.items()
        } | self._count()

    def _skipped(self) -> dict[str, float]:
        """Count a skipped step; returns the means over the interval, if it has other steps."""
        self.interval = cast(Interval, self.interval | {"skipped": self.interval.get("skipped", 0) + 1})
        steps = self.interval["steps"]
        sums = {name: total for name, total in self.interval["sums"].items() if not name.endswith("learning_rate")}
        return {name: total / steps for name, total in sums.items()} | self._count()

    def _count(self) -> dict[str, float]:
        skipped = self.interval.get("skipped")
        return {"skipped": skipped} if skipped else {}

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of an evaluation after `step`."""
        if step not in self._evaluated:
            self._write(step, {f"eval/{name}": value for name, value in metrics.items()})
            self._evaluated.add(step)
        self._show(f"evaluation at step {step}  " + "  ".join(f"{k} {v:.4g}" for k, v in metrics.items()), keep=True)

    def has_evaluation(self, step: int) -> bool:
        """Whether metrics.jsonl has an evaluation after `step`."""
        return step in self._evaluated

    def say(self, line: str) -> None:
        """Print a line; other threads may call it too."""
        self._show(line, keep=True)

    def tell(self, event: str, line: str, **more: Any) -> None:
        """Print a line, and tell the webhook of it. event: one word for programs. more: JSON values."""
        self.say(line)
        if self._notify:
            self._notify.tell(event, line, **more)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside is excluded from speeds, for it goes to an evaluation."""
        began = time.perf_counter()
        with self.session.within("evaluation"):
            yield
        gap = time.perf_counter() - began
        readings = (self._clock, self._mark, self._now)
        self._clock, self._mark, self._now = (one._replace(seconds=one.seconds + gap) for one in readings)

    def saving(self) -> contextlib.AbstractContextManager[None]:
        """Time spent inside is what the loop waits for a checkpoint."""
        return self.session.within("save")

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        # Whoever interrupts at once does not wait for a network.
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        self.close("failed" if kind else "ended", 0.0 if interrupted else PATIENCE)

    def close(self, how: str = "ended", patience: float = PATIENCE) -> None:
        """how: ended or failed, for the record of the session. patience: seconds for the trackers to take it all."""
        self.session.end(how)
        if not self._quiet:
            progress.end()
        if self._metrics is not None:
            self._metrics.close()
        if self._boards is not None:
            with progress.waiting("sending the last to the trackers"):
                self._boards.close(how, patience)
        self._metrics = self._boards = None

    def _since(self, then: Reading) -> Reading | None:
        """Steps, tokens and seconds since then; None where there was no step."""
        now = self._now
        passed = Reading(now.step - then.step, now.tokens - then.tokens, now.seconds - then.seconds)
        return passed if passed.step > 0 and passed.seconds > 0 else None

    def _utilisation(self, passed: Reading | None) -> float | None:
        if not (passed and self._flops and self._peak):
            return None
        return passed.step / passed.seconds * self._flops / self._peak

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        if self._metrics is not None and self._boards is not None:
            self._metrics.write(json.dumps({"step": step} | metrics) + "\n")
            self._metrics.flush()
            self._boards.log(step, metrics)

    def _told(self, wait: str) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._quiet else progress.waiting(wait)

    def _show(self, line: str, keep: bool) -> None:
        if not self._quiet:
            (progress.say if keep else progress.show)(line)


def cut_metrics(run: RunDirectory, step: int, within_interval: bool = False) -> list[dict]:
    """Drop the lines of metrics.jsonl after `step`, and an incomplete last line; returns the records that stay.

    within_interval: also drop the training record at `step`, within an interval that continues: an uninterrupted run
    has none there.
    """
    if not run.metrics.exists():
        return []
    kept = [(line, record) for line in run.metrics.read_text(encoding="utf-8").split("\n") if (record := _record(line))]
    kept = [(line, record) for line, record in kept if record["step"] <= step]
    if within_interval and step > 1:
        kept = [
            (line, record) for line, record in kept if record["step"] < step or not {"loss", "skipped"} & record.keys()
        ]
    with replacing(run.metrics) as file:
        file.writelines(line + "\n" for line, _ in kept)
    return [record for _, record in kept]


def _record(line: str) -> dict | None:
    try:
        record: Any = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _short(number: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"
