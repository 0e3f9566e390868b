"""A grid of learning rates × epochs × seeds of one fine-tuning: run by run, or many in one program."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax

from espalier import assembly, progress
from espalier.files import write_json
from espalier.sweeps import sweep_tasks
from finetune.config import FinetuneConfig


class Run(NamedTuple):
    """A point of the grid, and what came of it."""

    learning_rate: float
    epochs: float
    seed: int
    metrics: dict[str, float]
    folder: Path


def grid(
    config: FinetuneConfig,
    folder: Path,
    learning_rates: Sequence[float],
    epochs: Sequence[float],
    seeds: Sequence[int],
    *,
    at_once: bool = False,
    measured: Callable[[Path, dict[str, float]], dict[str, float]] = lambda folder, metrics: metrics,
) -> Iterator[Run]:
    """Train every point in a folder of its own below `folder`; what has ended before is read and not trained again.

    config: of the task, without rate, epochs, seed and run_dir. at_once: all seeds and rates of a number of epochs in
    one program; such runs keep no weights. measured: (folder, metrics) → metrics with what is measured besides.
    A run that was interrupted ends the grid: KeyboardInterrupt.
    """
    for count in epochs:
        points = {
            (rate, seed): folder / f"rate-{rate:g}-epochs-{count:g}-seed-{seed}"
            for rate in learning_rates
            for seed in seeds
        }
        if at_once and any(_ended(path) is None for path in points.values()):
            _sweep(replace(config, epochs=count), points)
        for (rate, seed), path in points.items():
            if (metrics := _ended(path)) is None:
                optimizer = replace(config.optimizer, learning_rate=rate)
                one = replace(config, optimizer=optimizer, epochs=count, seed=seed, run_dir=str(path))
                progress.say(f"{path.parent.name}: learning rate {rate:g}, {count:g} epochs, seed {seed}")
                summary = assembly.train(one)
                if not summary["finished"]:
                    raise KeyboardInterrupt
                metrics = measured(path, summary["metrics"])
                write_json(path / "grid.json", {"metrics": metrics})
            yield Run(rate, count, seed, metrics, path)


def _ended(folder: Path) -> dict[str, float] | None:
    """The metrics of a run that has ended and was measured."""
    path = folder / "grid.json"
    return json.loads(path.read_text(encoding="utf-8"))["metrics"] if path.is_file() else None


def _sweep(config: FinetuneConfig, points: dict[tuple[float, int], Path]) -> None:
    rates, seeds = (tuple(dict.fromkeys(values)) for values in zip(*points, strict=True))
    progress.say(f"{len(points)} runs in one program: {len(rates)} learning rates × {len(seeds)} seeds")
    swept, tasks, mesh = sweep_tasks(config, seeds=seeds, learning_rates=rates, evaluated=False)
    for s, seed in enumerate(seeds):
        for r, rate in enumerate(rates):
            path = points[rate, seed]
            path.mkdir(parents=True, exist_ok=True)
            params = jax.tree.map(lambda leaf, s=s, r=r: leaf[s, r], swept.params)
            # As a run at its end: what is measured is written where a run of its own would have it.
            trained: Any = SimpleNamespace(run=SimpleNamespace(path=path), params=params, mesh=mesh)
            found = tasks[seed].finish(trained)
            write_json(path / "grid.json", found | {"loss": swept.loss_SRs[s, r].astype(float).tolist()})


def best(runs: Sequence[Run], score: Callable[[Run], float]) -> list[Run]:
    """The runs, by seed, of the rate and epochs whose median score is the highest; of equals, the first."""
    points: dict[tuple[float, float], list[Run]] = {}
    for run in runs:
        points.setdefault((run.learning_rate, run.epochs), []).append(run)
    return max(points.values(), key=lambda chosen: median([score(run) for run in chosen]))
