"""The settings that every pretraining on text has. Imports no JAX."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from espalier.data.config import DataConfig
from espalier.errors import UserError
from espalier.models.config import Execution, ModelConfig
from espalier.short_help import often
from espalier.training.config import TrainConfig


@dataclass(frozen=True)
class TextConfig(TrainConfig):
    """A pretraining run on text; an objective's presets are values of a subclass, which names the task."""

    task: ClassVar[str]
    """In espalier.task.TASKS."""
    objective: str | None = often(None)
    """An objective of your own instead, as FILE.py:NAME (docs/own-objective.md)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    execution: Execution = field(default_factory=Execution)
    eval_rows: int = 512
    """Rows of held-out text in an evaluation (always the same; batches of one size see the same masks)."""

    def __post_init__(self):
        super().__post_init__()
        if self.eval_rows < 1:
            raise UserError(f"eval_rows={self.eval_rows} must be at least 1")
