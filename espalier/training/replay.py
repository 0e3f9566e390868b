"""Steps of a run, executed once more from a checkpoint and compared with what was logged: `replay`.

The same program on the same devices computes the same bits, so that the first tensor whose checksum is another
(training.checksums) says where the run left its way: by a bit that flipped in memory or on a disk, a device that
miscalculates, data that changed. On other devices, another mesh or another JAX only losses are compared, within
TOLERANCE. Nothing is written into the run.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from espalier import progress
from espalier.contracts import Origin
from espalier.errors import UserError
from espalier.training.bad_steps import Window, batch_number
from espalier.training.checksums import Line, Summed, differing, logged, some, surroundings
from espalier.training.collected import Collector
from espalier.training.config import TrainConfig
from espalier.training.loop import optimization
from espalier.training.manifest import complete_steps
from espalier.training.restore import read_data
from espalier.training.run import RunDirectory
from espalier.training.start import beginning, first_state
from espalier.training.step import jit_train_step
from espalier.training.tracker import Interval
from espalier.training.trainable import Trainable
from sharding.mesh import place_batch

TOLERANCE = 0.01
"""Of a loss, relative, where other surroundings promise no equal bits: rounding grows from step to step."""


@dataclass(frozen=True)
class Difference:
    """Where a run and its replay part."""

    after: int
    """The last step at which all that was logged was the same; that of the checkpoint, where nothing was."""
    step: int
    """The first step at which something was not."""
    tensors: tuple[str, ...] = ()
    """Paths of those that differ."""
    of: int = 0
    """Tensors of the state."""
    began: bool = False
    """Whether it is what a session began with, which is not what the steps before it left."""
    loss: tuple[float, float] | None = None
    """(logged, here), where no checksums tell."""

    def __str__(self) -> str:
        if self.loss:
            what = f"the loss logged at step {self.step} is {self.loss[0]!r}, and here {self.loss[1]!r}"
        else:
            verb = "differs" if len(self.tensors) == 1 else "differ"
            what = f"{some([*self.tensors])} {verb} first ({len(self.tensors)} of {self.of} tensors)"
        if self.began:
            return f"{what}: the session that began at step {self.step} began with another than step {self.step} left"
        if self.after == self.step:
            return f"{what}: the checkpoint of step {self.step} is not what was logged at that step"
        return f"{what}: it arose within steps {self.after + 1} to {self.step}"


@dataclass(frozen=True)
class Replayed:
    """What came of it."""

    first: int
    last: int
    checksums: int
    """Logged lines of checksums that were compared."""
    losses: int
    """Logged losses that were compared."""
    apart: str | None
    """Why bits were not compared somewhere, in words."""
    furthest: float
    """The largest relative difference of a loss."""
    difference: Difference | None


def replay(
    config: TrainConfig,
    task: Trainable,
    run: RunDirectory,
    mesh: Mesh,
    origin: Origin | None,
    last: int,
    settings: Mapping[str, Any],
) -> Replayed:
    """Execute the steps from the origin to `last` and compare; it ends at the first difference.

    settings: of the run, JSON values. UserError where nothing was logged in these steps. All processes call it.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        optimizer, factor, project = optimization(config, task)
        begun = beginning(origin, task.load_params)
        first, interval = begun.step, begun.interval
        restored = origin is not None and origin.resumed
        log = Logged(run, first, last, surroundings(mesh, settings), config.log_every, interval, restored)
        with progress.waiting("loading the first state"):
            state = first_state(config, task.init_params, optimizer, mesh, origin, task.load_params, task.frozen)
        deviations = config.bad_steps.deviations
        train_step = jit_train_step(task.objective, optimizer, factor, config.accumulation, state, project, deviations)
        windows = _windows(run, last)
        collector = Collector(
            task.objective.collect, run.collected, mesh, reading=True, steps=task.objective.collected_for,
            ahead=task.objective.ahead,
        )  # fmt: skip
        following = batch_number(first, windows)
        batches = stack.enter_context(contextlib.closing(task.batches_from(following)))
        summed = Summed(mesh)
        if log.has_sums(first):
            log.compare_sums(first, summed(state).read())
        for step in range(first + 1, last + 1):
            if log.difference:
                break
            if (number := batch_number(step - 1, windows)) != following:
                batches = stack.enter_context(contextlib.closing(task.batches_from(number)))
            batch, _ = collector(state, place_batch(next(batches), mesh), number)
            following = number + 1
            state, metrics = train_step(state, batch)
            if log.has_sums(step):
                log.compare_sums(step, summed(state).read())
            log.compare_loss(step, None if int(metrics["bad_in_a_row"]) else float(metrics["loss"]))
            if progress.in_place() and jax.process_index() == 0:
                progress.show(f"step {step}/{last}")
        progress.end()
    return Replayed(first, last, log.checksums, log.losses, log.apart, log.furthest, log.difference)


def _windows(run: RunDirectory, step: int) -> list[Window]:
    """The batches that a run passed over, as its first checkpoint from this step on, else its newest, has them."""
    saved = complete_steps(run.checkpoints)
    there = next((one for one in saved if one >= step), saved[-1] if saved else None)
    skipped = read_data(run.path, there).get("skipped", {}) if there is not None else {}
    return [Window(*window) for window in skipped.get("windows", ())]


def logged_steps(run: RunDirectory) -> int:
    """The last step of which a run has logged something; 0 where there is none."""
    return max((step for step, _ in (*_losses(run), *((line.step, 0.0) for line in logged(run)))), default=0)


class Logged:
    """What a run logged in these steps, and how far it is what is computed here."""

    def __init__(
        self,
        run: RunDirectory,
        first: int,
        last: int,
        here: dict[str, Any],
        log_every: int,
        interval: Interval | None,
        restored: bool,
    ):
        self._restored, self._here, self._log_every = restored, here, log_every
        self._lines: dict[int, list[Line]] = {}
        there: dict[str, Any] | None = None
        for line in logged(run):
            if line.began and line.step <= first:
                there, self._log_every = line.began, line.log_every or log_every
            if first <= line.step <= last:
                self._lines.setdefault(line.step, []).append(line)
        self._losses = {step: loss for step, loss in _losses(run) if first < step <= last}
        if not self._losses and not any(step > first for step in self._lines):
            raise UserError(
                f"{run.path} has logged nothing of steps {first + 1} to {last}; give steps that it has done, and "
                "--checksum-every N to a run whose tensors are to be compared"
            )
        self.checksums = self.losses = 0
        self.furthest = 0.0
        self.difference: Difference | None = None
        self.apart: str | None = None
        self._first = self._same = first
        self._within(there)
        self._interval: Interval = interval or {"steps": 0, "sums": {}}
        if first % self._log_every == 0:
            self._interval = {"steps": 0, "sums": {}}

    def has_sums(self, step: int) -> bool:
        return step in self._lines

    def compare_sums(self, step: int, sums: dict[str, str]) -> None:
        for line in self._lines[step]:
            # A checkpoint has the same bits anywhere.
            if self.difference is None and (self._exact or self._restored and step == self._first):
                others = differing(line.sums, sums)
                self.checksums += 1
                if others:
                    self.difference = Difference(self._same, step, tuple(others), len(sums), line.began is not None)
                else:
                    self._same = step
            if line.began:
                self._within(line.began)
                self._log_every = line.log_every or self._log_every

    def compare_loss(self, step: int, loss: float | None) -> None:
        """loss: None of a bad step, which is not in the means."""
        steps, total = self._interval["steps"], self._interval["sums"].get("loss", 0.0)
        if loss is not None:
            steps, total = steps + 1, total + loss
        self._interval = {"steps": steps, "sums": {"loss": total}}
        if step % self._log_every == 0:
            self._interval = {"steps": 0, "sums": {}}
        if step not in self._losses or self.difference:
            return
        there, here = self._losses[step], total / steps
        self.losses += 1
        apart = abs(there - here) / max(abs(there), 1e-9)
        same = there == here or math.isnan(there) and math.isnan(here)
        self.furthest = self.furthest if same else max(self.furthest, apart)
        if not (same if self._exact else same or apart <= TOLERANCE):
            self.difference = Difference(self._same, step, loss=(there, here))
        elif self._exact and not self._lines:
            self._same = max(self._same, step)

    def _within(self, there: dict[str, Any] | None) -> None:
        """Compare with a session that computed there; None = it is not known where, and taken to be here."""
        if there is None or not self._exact:
            return
        for name in self._here:
            if there.get(name) != self._here[name]:
                self.apart = f"{name} was {_words(there.get(name))} and is {_words(self._here[name])}"
                break

    @property
    def _exact(self) -> bool:
        """Whether all sessions so far computed on what is here."""
        return self.apart is None


def _losses(run: RunDirectory) -> Iterator[tuple[int, float]]:
    """(step, mean training loss) of the records of metrics.jsonl."""
    if not run.metrics.exists():
        return
    for line in run.metrics.read_text(encoding="utf-8").split("\n"):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            yield record["step"], float(record["loss"])


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={inner}" for name, inner in value.items() if inner is not None) or "none"
    return str(value)
