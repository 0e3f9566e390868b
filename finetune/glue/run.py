"""All of GLUE from one checkpoint: files, grids, the best run of each task, submissions, table and picture.

RUN/data/TASK/…            examples as JSON lines
RUN/TASK/rate-…-seed-…/    a run like any other; of those that were not chosen the weights are removed at the end
RUN/glue.json, glue.md     every run, and the table
RUN/report.html            table and picture
RUN/submission/*.tsv       for the benchmark's server
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import jax

from espalier import progress
from espalier.errors import UserError
from espalier.files import replacing, write_json
from espalier.loading import load
from espalier.predict.loaded import LoadedModel
from espalier.training.config import EXECUTION_FIELDS
from finetune.config import FinetuneOptimizer
from finetune.glue.files import Files, missing_file, write_files
from finetune.glue.grid import Run, best, grid
from finetune.glue.protocols import PROTOCOLS, Point
from finetune.glue.record import GlueConfig
from finetune.glue.report import markdown, write_page
from finetune.glue.submission import write_submissions
from finetune.glue.tasks import BY_KEY, FROM_MNLI, MISMATCHED, GlueTask
from finetune.tasks.classify.record import CLASSIFICATION, ClassifyConfig, ClassifyData

SHARED = (
    *("accumulation", "mesh", "execution", "dropout", "scratch", "lora", "freeze", "log_every", "eval_every"),
    *("keep_best", "early_stopping", "prefetch", "workers", "debug"),
)
"""Settings that every run of the grid has."""
GROWS = frozenset("learning_rates epoch_counts seeds at_once submission data.tasks".split())
"""Settings that a grid may change when it goes on: each run is named by its own, or none depends on them."""


def run(config: GlueConfig, given: Collection[str] = ()) -> dict[str, Any]:
    """Train and measure; returns the `--json` object, which glue.json holds too.

    given: settings of the optimizer that flags have set; they, and those that are not the default, replace the
    protocol's.
    """
    if config.data.folder is None:
        raise UserError("no --data.folder given: name the folder of GLUE's .tsv files, hf:nyu-mll/glue or tfds:glue")
    if not config.init_from:
        raise UserError("no --init-from given: name the run directory that GLUE is to be fine-tuned from, or hf:ID")
    if jax.process_count() > 1:
        raise UserError("glue runs in one process; start it on one host, whose devices share the batches")
    assert config.run_dir is not None
    folder = Path(config.run_dir).expanduser().absolute()
    # MNLI first, for others may go on from it.
    tasks = sorted((BY_KEY[key] for key in dict.fromkeys(config.data.tasks)), key=lambda task: task.key != "mnli")
    missing = {task.name: why for task in tasks if (why := missing_file(config.data.folder, task))}
    tasks = [task for task in tasks if task.name not in missing]
    for name, why in missing.items():
        progress.say(f"{name}: not run, {why}")
    if not tasks:
        raise UserError(f"{config.data.folder} has the files of none of the tasks; see `finetune glue --help`")
    plain = FinetuneOptimizer()
    own = {name for name, value in vars(config.optimizer).items() if name in given or value != getattr(plain, name)}
    _settings_held(folder, config, own)

    results: dict[str, dict[str, Any]] = {}
    chosen: dict[str, list[Run]] = {}
    files: dict[str, Files] = {}
    for task in tasks:
        try:
            with progress.waiting(f"reading {task.name}"):
                files[task.key] = write_files(
                    config.data.folder, task, folder / "data" / task.key, config.data.examples, config.submission
                )
        except UserError as error:
            if not config.data.folder.startswith(("hf:", "tfds:")):
                raise
            missing[task.name] = str(error)
            progress.say(f"{task.name}: not run, {error}")
            continue
        origin = _origin(config, task, chosen, folder / task.key / "origin.json")
        point = _point(config, task)
        runs = list(
            grid(
                _config_of(config, task, files[task.key], point, origin, own),
                folder / task.key,
                point.learning_rates,
                point.epochs,
                point.seeds,
                at_once=config.at_once,
                measured=_mismatched(task, files[task.key]),
            )
        )
        chosen[task.key] = best(runs, lambda run, task=task: score(task, run.metrics))
        results[task.name] = _row(task, runs, chosen[task.key], point, origin)
        progress.say(f"{task.name}: {_words(results[task.name])}")
    if not results:
        raise UserError(f"{config.data.folder} gave none of the tasks: {next(iter(missing.values()))}")
    found = {
        "init_from": config.init_from,
        "protocol": config.protocol,
        "selection": "learning rate and epochs by the highest median over seeds on GLUE's dev set, which is also what "
        "is reported",
        "tasks": results,
        "average": sum(row["median"] for row in results.values()) / len(results),
        "missing": missing,
    }
    if config.submission and not config.at_once:
        found["submitted"] = write_submissions(
            folder / "submission",
            {
                key: (files[key], max(runs, key=lambda run, key=key: score(BY_KEY[key], run.metrics)).folder)
                for key, runs in chosen.items()
            },
        )
    kept = {run.folder for runs in chosen.values() for run in runs} | {
        Path(row["init_from"]) for row in results.values()
    }
    for row in results.values():
        for run in row["runs"]:
            if Path(run["folder"]) not in kept:
                shutil.rmtree(Path(run["folder"]) / "checkpoints", ignore_errors=True)
    write_json(folder / "glue.json", found)
    with replacing(folder / "glue.md") as file:
        file.write(markdown(found))
    page = write_page(folder, found)
    progress.say("\n" + markdown(found))
    progress.say(f"report  {page}")
    return found | {"run_dir": str(folder), "report": str(page)}


def score(task: GlueTask, metrics: dict[str, float]) -> float:
    """The mean of the official metrics that were measured."""
    values = [metrics[name] for name in task.metrics if name in metrics]
    return sum(values) / len(values)


def _settings_held(folder: Path, config: GlueConfig, own: Collection[str]) -> None:
    """UserError where the folder holds a grid with other settings, whose runs would count here.

    own: the settings of the optimizer that are not the protocol's.
    """
    path = folder / "glue-settings.json"
    optimizer = {f"optimizer.{name}": value for name, value in vars(config.optimizer).items() if name in own}
    found = {name: value for name, value in _flat(config).items() if not name.startswith("optimizer.")} | optimizer
    held = json.loads(json.dumps(found))
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if "folder" in before:
            # Of an earlier version, which held four settings.
            before = held | {name if name in held else f"data.{name}": value for name, value in before.items()}
        for name in sorted(before.keys() | held.keys()):
            value = held.get(name)
            if before.get(name) != value:
                raise UserError(
                    f"{folder} holds a GLUE run with {name}={before.get(name)!r}, and this one has {value!r}; "
                    "name another --run-dir"
                )
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} holds other files; name another --run-dir")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, held)


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """The settings by which runs of a grid differ that are named alike, nested ones as `outer.inner`."""
    found: dict[str, Any] = {}
    for name, value in vars(settings).items():
        if name in EXECUTION_FIELDS - {"keep_best", "early_stopping"} or prefix + name in GROWS:
            continue
        found |= _flat(value, f"{prefix}{name}.") if dataclasses.is_dataclass(value) else {prefix + name: value}
    return found


def _point(config: GlueConfig, task: GlueTask) -> Point:
    """The grid of the protocol, with what the flags replace."""
    point = PROTOCOLS[config.protocol].of(task.key)
    return replace(
        point,
        learning_rates=config.learning_rates or point.learning_rates,
        epochs=config.epoch_counts or point.epochs,
        seeds=config.seeds or point.seeds,
        batch_size=config.batch_sizes or point.batch_size,
    )


def _origin(config: GlueConfig, task: GlueTask, chosen: dict[str, list[Run]], path: Path) -> str:
    """What the runs of a task start from. path: the file that remembers it, for another run of MNLI may be the best one
    when the grid goes on, and runs of one task are compared."""
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    wanted = config.from_mnli == "yes" or config.from_mnli == "protocol" and PROTOCOLS[config.protocol].from_mnli
    if wanted and task.key in FROM_MNLI and not config.at_once and not config.scratch and "mnli" in chosen:
        runs = chosen["mnli"]
        found = str(max(runs, key=lambda run: score(BY_KEY["mnli"], run.metrics)).folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
        return found
    assert config.init_from is not None
    return config.init_from


def _config_of(
    config: GlueConfig, task: GlueTask, files: Files, point: Point, origin: str, own: Collection[str]
) -> ClassifyConfig:
    protocol = PROTOCOLS[config.protocol]
    shared: Any = {name: getattr(config, name) for name in SHARED}
    optimizer: Any = {**protocol.optimizer, "weight_decay": point.weight_decay}
    optimizer = {name: value for name, value in optimizer.items() if name not in own}
    pair = len(task.text) == 2
    return ClassifyConfig(
        **shared,
        batch_size=point.batch_size,
        init_from=origin,
        checkpoint=replace(config.checkpoint, keep=1),
        optimizer=replace(config.optimizer, **optimizer),
        data=ClassifyData(
            train=str(files.train),
            validation=str(files.dev),
            text=("text", "text_b") if pair else ("text",),
            label="label",
            label_kind="classes" if task.labels else "numbers",  # type: ignore[arg-type]
            max_length=config.data.max_length or protocol.max_length,
            examples_per_row=0,
        ),
    )


def _mismatched(task: GlueTask, files: Files) -> Callable[[Path, dict[str, float]], dict[str, float]]:
    """MNLI is measured on texts of other genres too."""

    def measured(folder: Path, metrics: dict[str, float]) -> dict[str, float]:
        if task.key != "mnli" or MISMATCHED[0] not in files.more:
            return metrics
        model: LoadedModel = load(folder)
        data = ClassifyData(
            validation=str(files.more[MISMATCHED[0]]), text=("text", "text_b"), label="label", label_kind="classes"
        )
        return metrics | {"accuracy_mismatched": CLASSIFICATION.evaluate(model, data).metrics["accuracy"]}

    return measured


def _row(task: GlueTask, runs: list[Run], chosen: list[Run], point: Point, origin: str) -> dict[str, Any]:
    scores = [score(task, run.metrics) for run in chosen]
    return {
        "metrics": [name for name in task.metrics if name in chosen[0].metrics],
        "median": median(scores),
        "min": min(scores),
        "max": max(scores),
        "by_metric": {
            name: median([run.metrics[name] for run in chosen]) for name in task.metrics if name in chosen[0].metrics
        },
        "baseline": chosen[0].metrics.get("majority"),
        "learning_rate": chosen[0].learning_rate,
        "epochs": chosen[0].epochs,
        "seeds": [run.seed for run in chosen],
        "batch_size": point.batch_size,
        "init_from": origin,
        "runs": [{**run._asdict(), "folder": str(run.folder), "score": score(task, run.metrics)} for run in runs],
    }


def _words(row: dict[str, Any]) -> str:
    return (
        f"{100 * row['median']:.1f} ({100 * row['min']:.1f} to {100 * row['max']:.1f} over {len(row['seeds'])} seeds) "
        f"at rate {row['learning_rate']:g}, {row['epochs']:g} epochs"
    )
