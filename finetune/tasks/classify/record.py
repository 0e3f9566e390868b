"""What classification is: its settings, presets, and the record from which runs, reports and cards read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

from espalier.errors import UserError
from espalier.models.attention_settings import SupervisedAttention
from espalier.models.config import Execution
from espalier.short_help import often
from espalier.training.config import CheckpointConfig
from finetune.config import FinetuneConfig, FinetuneData, FinetuneOptimizer
from finetune.task import FinetuneTask
from finetune.tasks.classify.report import REPORT


@dataclass(frozen=True)
class ClassifyData(FinetuneData):
    """Labelled texts with named columns: .tsv, .csv, .jsonl, .json, .parquet (also .gz, .zst, URLs), or hf:…, tfds:…"""

    text: tuple[str, ...] = often(())
    """One column of text, or two for pairs; unset = guessed from the names, as in GLUE's files."""
    label: str | None = often(None)
    """Column of labels; unset = guessed (label, Quality, gold_label, target, class)."""
    label_kind: Literal["auto", "classes", "numbers", "lists"] = often("auto")
    """What the column of labels holds. auto: numbers (regression) where there are decimals, lists (several labels a
    text) where cells are JSON arrays, else classes. lists also takes cells like a|b."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: rare classes count as much as frequent ones, all their examples together."""
    calibration_part: float = 0.0
    """A part of the training file, of every label as much, that is not learnt from: on it, a temperature is fitted
    after the training, so that probabilities mean what they say (Guo et al. 2017), and of lists the threshold. Try 0.1;
    0 = none."""
    rationale: str | None = None
    """Column of what people marked in the (first) text: a JSON array of words, or of pairs of characters [begin, end].
    How far the heads' look is from it is measured (rationale_kl), and learnt with --attention.supervision."""
    examples_per_row: int = 1
    """Examples that share a row, without seeing each other; little of the rows is padding then. 0 = as many as suit
    their length, up to 8."""

    @property
    def others(self) -> tuple[str, ...]:
        """Columns that are read beside texts and labels."""
        return (self.rationale,) if self.rationale else ()

    def resumed(self, saved: Mapping[str, Any]) -> Self:
        chosen = saved.get("examples_per_row", 1)
        return self if self.examples_per_row else dataclasses.replace(self, examples_per_row=chosen)

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.calibration_part < 1:
            raise UserError(f"data.calibration_part={self.calibration_part} must be at least 0 and below 1; try 0.1")
        if not 0 <= self.examples_per_row <= 64:
            raise UserError(f"data.examples_per_row={self.examples_per_row} must lie between 0 and 64; 0 = chosen")


@dataclass(frozen=True)
class ClassifyConfig(FinetuneConfig):
    """A fine-tuning run that learns to classify texts."""

    task: ClassVar[str] = "sequence_classification"
    data: ClassifyData = field(default_factory=ClassifyData)
    attention: SupervisedAttention = field(default_factory=SupervisedAttention)

    def __post_init__(self):
        super().__post_init__()
        if self.attention.supervision and not self.data.rationale:
            raise UserError(
                f"attention.supervision={self.attention.supervision:g} needs marked words: name their column with "
                "--data.rationale"
            )


def classify() -> ClassifyConfig:
    """Classify texts or pairs: `./launch.sh finetune classify --init-from RUN --data.train F --data.validation F`.

    From an mlm or a clm run. Three epochs of batches of 32, dropout 0.1, linear decay (Devlin et al. 2019, app. A.3).
    """
    return ClassifyConfig(log_every=10, checkpoint=CheckpointConfig(every=1000), data=ClassifyData(examples_per_row=0))


def classify_debug() -> ClassifyConfig:
    """Ten steps, to see that all runs: `./launch.sh finetune classify-debug --init-from RUN --data.train F …`."""
    return ClassifyConfig(steps=10, batch_size=8, log_every=5, eval_every=5, checkpoint=CheckpointConfig(every=5))


def demo() -> ClassifyConfig:
    """What the demo does with a thousand short labelled sentences (`./launch.sh`): small model, several epochs."""
    return ClassifyConfig(
        steps=150,
        batch_size=32,
        log_every=15,
        eval_every=50,
        data=ClassifyData(max_length=48),
        execution=Execution(scan_layers=True),
        optimizer=FinetuneOptimizer(learning_rate=5e-4),
        checkpoint=CheckpointConfig(every=1000, keep=1),
    )


CLASSIFICATION = FinetuneTask(
    name="sequence_classification",
    head="sequence_classification",
    report=REPORT,
    data=ClassifyData,
    splits_rows=False,
    place="finetune.tasks.classify.task:Classification",
)
