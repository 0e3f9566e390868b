"""The best checkpoint of a run by a metric of its evaluations, and the end of a run that no longer gets better.

Which it is follows from the evaluations in metrics.jsonl alone, so that a run which goes on knows what it knew. The
file best.json tells those who read the run that its model is the one of that step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax

from espalier.errors import UserError
from espalier.files import write_json
from espalier.training.checkpoint import Checkpoints
from espalier.training.config import TrainConfig
from espalier.training.fallback import best_step
from espalier.training.manifest import complete_steps
from espalier.training.restore import restore_params
from espalier.training.run import RunDirectory
from espalier.training.state import TrainState
from espalier.training.tracker import Tracker
from sharding.processes.coordination import from_first

LOW = ("loss", "perplexity", "bits", "error", "rmse", "mse", "mae", "_kl")
"""What names of metrics hold that are better when low."""


class Best:
    """Follows one metric over the evaluations of a run.

    evaluations: those that are behind it, (step, metrics). there: the steps whose checkpoint can still be the best.
    """

    def __init__(
        self,
        config: TrainConfig,
        evaluations: Collection[tuple[int, Mapping[str, float]]] = (),
        there: Collection[int] = (),
    ):
        stopping = config.early_stopping
        self.metric = stopping.metric or config.keep_best or "loss"
        self.lower = is_low(self.metric) if stopping.mode == "auto" else stopping.mode == "min"
        self.step: int | None = None
        self.metrics: Mapping[str, float] = {}
        """Of the evaluation at this step."""
        self.since = 0
        """Evaluations after it."""
        self._patience = stopping.patience
        self._last = -1
        self._values: dict[int, float] = {}
        """Of the evaluations whose checkpoint was kept."""
        for step, metrics in evaluations:
            if self.metric in metrics:
                self.saw(step, metrics, step in there)

    def saw(self, step: int, metrics: Mapping[str, float], kept: bool = True) -> bool:
        """Whether this evaluation is the best so far. kept: whether its checkpoint is there. The first of equals wins.

        UserError where the metric is not among those measured.
        """
        if self.metric not in metrics:
            raise UserError(
                f"keep_best: the evaluations of this run have no {self.metric!r}; they have "
                f"{', '.join(sorted(metrics))}: with --keep-best and one of these, the run goes on"
            )
        if step <= self._last:
            return False
        self._last = step
        value, before = metrics[self.metric], self.metrics.get(self.metric)
        better = kept and value == value and (before is None or (value < before if self.lower else value > before))
        if kept and value == value:
            self._values[step] = value
        if better:
            self.step, self.metrics, self.since = step, dict(metrics), 0
        else:
            self.since += 1
        return better

    def steps(self, count: int) -> list[int]:
        """The best so many of the steps that it saw, the best of all first; of equals, the earlier."""
        return sorted(self._values, key=lambda step: (self._values[step] * (1 if self.lower else -1), step))[:count]

    @property
    def exhausted(self) -> bool:
        """Whether so many evaluations brought nothing better that the run ends."""
        return self._patience is not None and self.step is not None and self.since >= self._patience

    @property
    def record(self) -> dict[str, Any] | None:
        """JSON values of best.json; None where nothing was measured."""
        if self.step is None:
            return None
        return {"step": self.step, "metric": self.metric, "value": self.metrics[self.metric], "ended": self.exhausted}


class KeptBest:
    """The best checkpoints on the disk of a run that keeps them. To be made and called by all processes."""

    def __init__(self, config: TrainConfig, run: RunDirectory, tracker: Tracker, checkpoints: Checkpoints):
        there = from_first("checkpoints", complete_steps(run.checkpoints))
        self.best = Best(config, from_first("evaluations", tracker.evaluations), there)
        self._run, self._tracker, self._checkpoints = run, tracker, checkpoints
        self._count = config.checkpoint.keep_best
        checkpoints.best = self.best.steps(self._count)
        if jax.process_index() == 0 and best_step(run) not in (None, self.best.step):
            # It was set aside, and so was what was measured after it.
            if record := self.best.record:
                write_json(run.best, record)
            else:
                run.best.unlink()

    @classmethod
    def of(cls, config: TrainConfig, run: RunDirectory, tracker: Tracker, checkpoints: Checkpoints) -> KeptBest | None:
        """None where nobody asked for it; what an earlier session kept is then one checkpoint among others."""
        if config.keep_best is None and config.early_stopping.patience is None:
            if jax.process_index() == 0:
                run.best.unlink(missing_ok=True)
            return None
        return cls(config, run, tracker, checkpoints)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """After each evaluation of a state that is saved, or is being saved."""
        better = self.best.saw(step, metrics)
        self._checkpoints.best = self.best.steps(self._count)
        if better and jax.process_index() == 0:
            write_json(self._run.best, self.best.record)

    @property
    def exhausted(self) -> bool:
        """As Best.exhausted."""
        return self.best.exhausted

    def given(self, state: TrainState, step: int) -> TrainState:
        """The state after `step` with the parameters of the best checkpoint."""
        best = self.best
        if self.exhausted:
            self._tracker.say(f"ended at step {step}: {best.since} evaluations brought nothing better")
        if best.step in (None, step):
            return state
        self._tracker.say(f"the best is kept: {best.metric} {best.metrics[best.metric]:.4g} at step {best.step}")
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state.params)
        return dataclasses.replace(state, params=restore_params(self._run.path, wanted, best.step))


def is_low(metric: str) -> bool:
    """Whether a metric of this name is better when it is low."""
    return any(word in metric.lower() for word in LOW)
