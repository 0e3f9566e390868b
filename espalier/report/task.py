"""What a task adds to the report and the model card of its runs.

The report itself knows curves, settings, speed, environment and evaluation. What only a task can show (hidden words,
generated text, a confusion matrix) and how its model is loaded is in a `TaskReport`, beside the code of the task.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from espalier.report.figures import Bar
from espalier.report.page import Section
from espalier.report.run_files import RunFiles


@dataclass(frozen=True)
class TaskReport:
    """The words and sections of a task. Its functions return nothing where the files of a run are missing."""

    title: Callable[[dict], str] = lambda config: "Run"
    """What was trained, from config.json: the first words under the name of the run."""
    unit: str = "example"
    """What the loss is the mean over: nats per `unit`."""
    sections: Callable[[RunFiles], list[Section]] = lambda run: []
    """Shown after the loss."""
    tiles: Callable[[RunFiles], list[tuple[str, str]]] = lambda run: []
    """Key figures as (name, value), at the head of the page before those of the evaluation."""
    baseline: Callable[[RunFiles], tuple[Bar, str] | None] = lambda run: None
    """A loss to compare with, drawn as a dashed line, and what it means."""

    pipeline: str = "feature-extraction"
    """The pipeline of transformers that the Hub names."""
    loader: str = "AutoModel"
    """The class of transformers that loads an exported model."""
    words: str = "trained"
    """The model is "…, {words}, made with Espalier"."""
    metric_names: Mapping[str, str] = field(default_factory=dict)
    """Metric → its name in the card, where that is more than the name itself."""
    card_settings: Callable[[dict], Mapping[str, object]] = lambda config: {}
    """Further rows of the card's settings, from config.json; None is left out."""


TASKS = {
    "masked_lm": "mlm.report:REPORT",
    "causal_lm": "clm.report:REPORT",
    "sequence_classification": "finetune.tasks.classify_report:REPORT",
}
"""`task` in config.json → module:name of its TaskReport."""

IMPORTED = {
    "token_classification": TaskReport(
        pipeline="token-classification", loader="AutoModelForTokenClassification", words="that classifies tokens"
    ),
    "question_answering": TaskReport(
        pipeline="question-answering", loader="AutoModelForQuestionAnswering", words="that finds answers in a text"
    ),
    "replaced_token_detection": TaskReport(loader="AutoModelForPreTraining", words="that finds replaced tokens"),
    "embedding": TaskReport(words="that embeds texts"),
}
"""Heads with which a model can be imported and exported, though no task here trains them."""


def report_of(task: str) -> TaskReport:
    """The record of the task that config.json names; the plain one for a task that is not known here."""
    if task not in TASKS:
        return IMPORTED.get(task, TaskReport())
    module, _, name = TASKS[task].partition(":")
    return getattr(importlib.import_module(module), name)
