"""What can be fine-tuned: one file a task, with a class that is a `Task`, named in TASKS and by a preset."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh
    from transformers import PreTrainedTokenizerFast

    from espalier.models.config import ModelConfig
    from espalier.training.run import RunDirectory
    from espalier.training.step import Objective
    from finetune.presets import FinetuneConfig

TASKS = {"sequence_classification": ("finetune.tasks.classify", "Classification")}
"""Name in FinetuneConfig.task → module and class."""


class Task(Protocol):
    """The labelled data of a task, what is learnt from it, and what is written at the end."""

    model: ModelConfig
    """With the labels of this task."""
    settings: dict
    """JSON values that make the run what it is besides its flags (the labels)."""
    fingerprints: dict[str, str]
    """SHA-256 of the files."""
    facts: Sequence[str]
    """What was read and what it was taken for, a line each, for people."""
    objective: Objective
    examples: int
    """Training examples; an epoch."""
    tokens_per_row: float
    """Of an average training example."""
    eval_batches: Sequence[dict]
    about: dict[str, str]
    """Rows on the files and what is to be learnt, for the introduction."""

    def __init__(self, config: FinetuneConfig, model: ModelConfig, tokenizer: PreTrainedTokenizerFast, mesh: Mesh):
        """Read the files of config.data; UserError where they will not do."""
        ...

    def init_params(self, key: jax.Array) -> dict:
        """Fresh parameters with the head of this task."""
        ...

    def batch(self, step: int) -> dict:
        """This process's rows of a step's batch."""
        ...

    def finish(self, run: RunDirectory, params: Any, mesh: Mesh) -> dict[str, float]:
        """Measure the trained parameters on the validation file and write what a person looks at; the metrics."""
        ...


def open_task(config: FinetuneConfig, model: ModelConfig, tokenizer: PreTrainedTokenizerFast, mesh: Mesh) -> Task:
    """The task that the configuration names, with its data read."""
    module, name = TASKS[config.task]
    return getattr(importlib.import_module(module), name)(config, model, tokenizer, mesh)
