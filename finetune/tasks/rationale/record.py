"""What classification by few words is: its settings, preset and record. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from espalier.errors import UserError
from espalier.short_help import often
from espalier.training.config import CheckpointConfig
from finetune.config import FinetuneConfig
from finetune.task import FinetuneTask
from finetune.tasks.classify.record import ClassifyData
from finetune.tasks.rationale.report import REPORT


@dataclass(frozen=True)
class SelectionConfig:
    """How many words the classifier may see."""

    rate: float = often(0.2)
    """The part of the words that the selector may open a gate for, on average; more than that is paid for."""
    price: float = 0.01
    """What the whole text costs at first, in nats; it rises while more than `rate` is open, and falls while less is."""
    speed: float = 30.0
    """How fast the price moves, in learning rates: by the factor e^(speed × learning rate) a step at most."""

    def __post_init__(self):
        if not 0 < self.rate < 1:
            raise UserError(f"selection.rate={self.rate} must lie between 0 and 1; try 0.2")
        for name in ("price", "speed"):
            if not getattr(self, name) > 0:
                raise UserError(f"selection.{name}={getattr(self, name)} must be greater than 0")


@dataclass(frozen=True)
class RationaleConfig(FinetuneConfig):
    """A fine-tuning run that learns to classify texts by few of their words."""

    task: ClassVar[str] = "rationale"
    data: ClassifyData = field(default_factory=ClassifyData)
    selection: SelectionConfig = field(default_factory=SelectionConfig)

    def __post_init__(self):
        super().__post_init__()
        for name, default in (
            ("examples_per_row", 1),
            ("rationale", None),
            ("class_weights", "none"),
            ("calibration_part", 0),
        ):
            if getattr(self.data, name) != default:
                raise UserError(f"data.{name}: this task selects words by itself, and does not have it; leave it out")


def rationale() -> RationaleConfig:
    """Classify texts by few words: `./launch.sh finetune rationale --init-from RUN --data.train F --data.validation F`.

    The words are shown with each prediction, and are all that the classifier saw (docs/tasks/rationale.md).
    """
    return RationaleConfig(log_every=10, checkpoint=CheckpointConfig(every=1000))


RATIONALE = FinetuneTask(
    name="rationale",
    head="sequence_classification",
    report=REPORT,
    data=ClassifyData,
    splits_rows=False,
    exports=False,
    place="finetune.tasks.rationale.task:Rationales",
)
