"""What a task adds to the report and the model card of its runs.

The report itself knows curves, settings, speed, environment and evaluation. A `TaskReport`, beside the code of
the task, holds what only the task knows: masked words, generated text, a confusion matrix, and how its model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from espalier.report.figures import Bar
from espalier.report.page import Section
from espalier.report.run_files import RunFiles
from espalier.task import TASKS, find


@dataclass(frozen=True)
class TaskReport:
    """The words and sections of a task. Its functions return nothing if the files of a run are missing."""

    title: Callable[[dict], str] = lambda config: "Run"
    """What was trained, from config.json: the first words under the name of the run."""
    unit: str = "example"
    """What the loss is the mean over: nats per `unit`."""
    loss: Callable[[dict], str | None] = lambda config: None
    """What the loss is, from config.json, where it is not in nats."""
    sections: Callable[[RunFiles], list[Section]] = lambda run: []
    """Shown after the loss."""
    tiles: Callable[[RunFiles], list[tuple[str, str]]] = lambda run: []
    """Key figures as (name, value), at the head of the page before those of the evaluation."""
    baseline: Callable[[RunFiles], tuple[Bar, str] | None] = lambda run: None
    """A reference loss, drawn as a dashed line, and its explanation."""

    pipeline: str = "feature-extraction"
    """The pipeline of transformers that the Hub names."""
    loader: str = "AutoModel"
    """The class of transformers that loads an exported model."""
    words: str = "trained"
    """The model is "…, {words}, made with Espalier"."""
    metric_names: Mapping[str, str] = field(default_factory=dict)
    """Metric → its name in the card, where that is more than the name itself."""
    card_settings: Callable[[dict], Mapping[str, object]] = lambda config: {}
    """Further rows for the settings of the card, from config.json; rows of None are omitted."""


IMPORTED = {
    "embedding": TaskReport(words="for text embeddings"),
}
"""Heads with which a model can be imported and exported, though no task here trains them."""


def loss_words(task: TaskReport, config: dict) -> str:
    """What the loss of a run is: "nats per example"."""
    return task.loss(config) or f"nats per {task.unit}"


def report_of(config: Mapping[str, Any]) -> TaskReport:
    """What the task of this config.json adds; of a task that is not known here, the words that the run has kept."""
    name = config.get("task", "")
    if name in TASKS:
        return find(name).report or TaskReport()
    if "report" in config:
        title, words = config["report"]["title"], {key: config["report"][key] for key in KEPT}
        return TaskReport(title=lambda config: title, **words)
    return IMPORTED.get(name, TaskReport())


def kept(report: TaskReport) -> dict[str, Any]:
    """What config.json holds of the report of a task that `report_of` could not find: its words."""
    return {"title": report.title({})} | {key: getattr(report, key) for key in KEPT}


KEPT = ("unit", "pipeline", "loader", "words", "metric_names")
