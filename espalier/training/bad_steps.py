"""Steps that change nothing, and the way back to the last checkpoint when they do not end.

A step is bad if its loss or its gradient norm is not finite, or, where the user asks for it, if the norm is many
standard deviations above its running mean. The device decides, so that nobody waits for the host. Where too many come
in a row, the last checkpoint is taken and the batches since then are passed over (Chowdhery et al. 2022, section 5.1).

Which batches were passed over is part of each checkpoint. It is a function of the text and the settings alone: a run
that is killed after it went back, and before it saved, comes to the same place again.

    RUN/skipped.jsonl   one line a batch that was skipped: step, batch, why, and the documents in it
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from espalier.errors import MachineError
from espalier.files import replacing, sync
from espalier.training.config import BadSteps

WINDOW = 100
"""Steps that the running mean looks back, and before which no norm is too large."""


class NonFiniteLoss(MachineError):
    """The loss or the gradient stays NaN, infinite or far too large."""


def new_health() -> dict[str, jax.Array]:
    """What a state remembers of its steps: mean and variance of the gradient norms of the good ones (float32), how many
    there were, and how many bad ones came since the last (int32). Scalars."""
    return {
        "norm_mean": jnp.zeros((), jnp.float32),
        "norm_variance": jnp.zeros((), jnp.float32),
        "good": jnp.zeros((), jnp.int32),
        "bad_in_a_row": jnp.zeros((), jnp.int32),
    }


def judged(
    health: dict[str, jax.Array], loss: jax.Array, norm: jax.Array, deviations: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(whether a step is good: bool scalar, the health after it).

    Mean and variance are exponentially weighted (Finch 2009) with weight max(1/n, 1/WINDOW) of the nth good step, so
    that those of the first WINDOW steps are plain ones.
    """
    mean, variance = health["norm_mean"], health["norm_variance"]
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    if deviations:
        limit = mean + deviations * jnp.sqrt(variance)
        good &= (health["good"] < WINDOW) | (norm <= limit)
    weight = 1 / jnp.minimum(health["good"] + 1, WINDOW).astype(jnp.float32)
    change = norm - mean
    after = {
        "norm_mean": mean + weight * change,
        "norm_variance": (1 - weight) * (variance + weight * change * change),
        "good": health["good"] + 1,
        "bad_in_a_row": jnp.zeros((), jnp.int32),
    }
    return good, chosen(good, after, health | {"bad_in_a_row": health["bad_in_a_row"] + 1})


def chosen(good: jax.Array, after: Any, before: Any) -> Any:
    """The tree `after` where good, else `before`."""
    return jax.tree.map(lambda new, old: jnp.where(good, new, old), after, before)


class Window(NamedTuple):
    """Batches that a run passed over."""

    step: int
    """Steps done when it did."""
    batches: int


def batch_number(step: int, windows: Sequence[Window]) -> int:
    """The number of the batch that step `step` + 1 takes, after `step` steps."""
    return step + sum(window.batches for window in windows if window.step <= step)


class SkippedSteps:
    """The bad steps of a run as the host sees them, one step behind. To be made and called by all processes.

    carried: from the checkpoint at `start`, as `carried` gave it. documents: batch number → what is in it; for the log.
    say: receives a line for each bad step. writes: whether this process keeps the log.
    """

    def __init__(
        self,
        config: BadSteps,
        log: Path,
        start: int,
        carried: dict[str, Any] | None,
        say: Callable[[str], None],
        documents: Callable[[int], Sequence[str]] | None = None,
        writes: bool = True,
    ):
        self._config, self._log, self._say, self._documents, self._writes = config, log, say, documents, writes
        self.in_a_row = 0
        self._last = start
        self._take(carried)
        if writes and log.exists():
            # What comes after the checkpoint comes again.
            lines = log.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if (step := _step_of(line)) is not None and step <= start]
            if kept != lines:
                with replacing(log) as file:
                    file.writelines(line + "\n" for line in kept)

    @property
    def carried(self) -> dict[str, Any]:
        """What a checkpoint stores (JSON)."""
        return {"skipped": {"steps": self.steps, "windows": [list(window) for window in self.windows]}}

    @property
    def batches(self) -> int:
        """How many taught the run nothing until now."""
        return self.steps + sum(window.batches for window in self.windows)

    @property
    def too_many(self) -> bool:
        """Whether the run must go back."""
        return self.in_a_row >= self._config.in_a_row

    def batch(self, step: int) -> int:
        """The number of the batch that comes after `step` steps."""
        return batch_number(step, self.windows)

    def saw(self, step: int, metrics: dict[str, float]) -> bool:
        """Whether this step was bad. Call it for each, with `bad_in_a_row` among its metrics, which is taken out."""
        self.in_a_row, self._last = int(metrics.pop("bad_in_a_row")), step
        if not self.in_a_row:
            return False
        self.steps += 1
        why = f"its loss is {metrics['loss']:.4g} and its gradient norm {metrics['gradient_norm']:.4g}"
        row = f", the {self.in_a_row}th in a row" if self.in_a_row > 3 else ""
        self._say(f"step {step} is skipped: {why}{row}")
        self._write([{"step": step, "batch": self.batch(step - 1), "why": why}])
        return True

    def go_back(self, step: int, carried: dict[str, Any] | None) -> str:
        """Pass over the batches between the checkpoint at `step`, which carries this, and the last step seen; returns
        what happened, in words.

        NonFiniteLoss, saying what to try, where that did not help before.
        """
        last, seen, limit = self._last, self.batch(self._last), self._config.in_a_row
        before = self.windows
        self._take(carried)
        # Those that this session passed over from the same step on are not in its checkpoint.
        self.windows += [window for window in before if window not in self.windows and window.step == step]
        tried = sum(window.step == step for window in self.windows) + 1
        if tried >= self._config.rollbacks:
            raise NonFiniteLoss(
                f"up to step {last}, {limit} in a row had a loss or a gradient that is not finite or far too large, "
                f"for the {_nth(tried)} time since step {step}, the last one saved; try a lower "
                "--optimizer.learning-rate or a longer --optimizer.warmup, and see what the batches in "
                f"{self._log.name} hold"
            )
        first = self.batch(step)
        self.windows.append(Window(step, seen - first))
        bad = f"{limit} bad step{'s' if limit > 1 else ''}"
        why = f"passed over at step {step}, after {bad} in a row"
        self._write([{"step": step + 1, "batch": number, "why": why} for number in range(first, seen)])
        return f"{bad} in a row: back to step {step}, past the {seen - first} batches since then"

    def _take(self, carried: dict[str, Any] | None) -> None:
        carried = carried or {"steps": 0, "windows": []}
        self.steps: int = carried["steps"]
        """Bad steps of the run until now."""
        self.windows = [Window(*window) for window in carried["windows"]]
        self.in_a_row = 0

    def _write(self, records: list[dict[str, Any]]) -> None:
        if not self._writes:
            return
        with self._log.open("a", encoding="utf-8") as file:
            for record in records:
                named = {"documents": list(self._documents(record["batch"]))} if self._documents else {}
                file.write(json.dumps(record | named, ensure_ascii=False) + "\n")
            sync(file)


def _step_of(line: str) -> int | None:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None


def _nth(number: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(number, f"{number}th")
