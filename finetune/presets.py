"""Named fine-tuning runs. A preset is a function; its docstring says what it is, how to run it and what it reached."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from espalier.data.encodings import codec
from espalier.errors import UserError
from espalier.models.config import Execution
from espalier.short_help import often
from espalier.task import TASKS
from espalier.training.config import CheckpointConfig, OptimizerConfig, TrainConfig


@dataclass(frozen=True)
class FinetuneData:
    """Labelled texts with named columns: .tsv, .csv, .jsonl, .json, .parquet (also .gz, .zst, URLs), or hf:…, tfds:…"""

    train: str | None = often(None)
    """File, URL or data set (hf:ID?split=train) to learn from."""
    validation: str | None = often(None)
    """What to measure on, given likewise; its labels are those of the training file."""
    text: tuple[str, ...] = often(())
    """One column of text, or two for pairs; unset = guessed from the names, as in GLUE's files."""
    label: str | None = often(None)
    """Column of labels; unset = guessed (label, Quality, gold_label, target, class)."""
    label_kind: Literal["auto", "classes"] = "auto"
    """auto refuses labels that look like a regression target or an identifier; classes takes each value for a class."""
    encoding: str = "utf-8"
    """Encoding of both files, by the names of Python: gb18030, big5, cp932, euc-jp, euc-kr, utf-16, cp1252 …"""
    max_length: int | None = often(None)
    """Tokens of an example, the rest is cut off; unset = as many as the model has positions, at most 512."""

    def __post_init__(self):
        codec(self.encoding)
        if self.max_length is not None and self.max_length < 8:
            raise UserError(f"data.max_length={self.max_length} is too short; at least 8")


@dataclass(frozen=True)
class FinetuneOptimizer(OptimizerConfig):
    """Optimizer and schedule of a fine-tuning."""

    learning_rate: float | None = often(None)  # type: ignore[assignment]
    """Peak learning rate; unset = 5e-5 × 768 / hidden_size, but not above 3e-4."""
    warmup: float = 0.1
    """Warm-up: a fraction of the steps below 1, else a number of steps."""
    b2: float = 0.999


@dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    """A fine-tuning run; model and tokenizer are those of the checkpoint."""

    task: str = "sequence_classification"
    """What is learnt: one of finetune/tasks."""
    steps: int | None = None  # type: ignore[assignment]
    """Length of the schedule in optimizer steps; unset = three epochs, but at least 200 steps (Mosbach et al. 2021)."""
    epochs: float | None = often(None)
    """Length of the schedule in passes over the training file, instead of steps."""
    eval_every: int | None = None  # type: ignore[assignment]
    """Steps between evaluations; unset = an epoch, or a tenth of the run if that is longer."""
    init_from: str | None = often(None)
    """Whose weights, tokenizer and architecture are taken: a run directory, or hf:PATH_OR_ID (Hugging Face format)."""
    scratch: bool = often(False)
    """Take architecture and tokenizer alone and start from random weights, to see what the pretraining is worth."""
    dropout: float = 0.1
    """Dropout of hidden states and attention; replaces the checkpoint's."""
    optimizer: FinetuneOptimizer = field(default_factory=FinetuneOptimizer)
    data: FinetuneData = field(default_factory=FinetuneData)
    execution: Execution = field(default_factory=Execution)

    def __post_init__(self):
        super().__post_init__()
        tasks = [name for name, place in TASKS.items() if place.startswith("finetune.")]
        if self.task not in tasks:
            raise UserError(f"task={self.task!r} is not one of {', '.join(tasks)}")
        if self.epochs is not None and self.epochs <= 0:
            raise UserError(f"epochs={self.epochs} must be greater than 0; try 3")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout} must be at least 0 and below 1; try 0.1")
        if self.init_optimizer:
            raise UserError(
                "init_optimizer: a classifier cannot take over a pretraining's optimizer state; leave it out"
            )


def classify() -> FinetuneConfig:
    """Classify texts or pairs: `./launch.sh finetune classify --init-from RUN --data.train F --data.validation F`.

    From an mlm or a clm run. Three epochs of batches of 32, dropout 0.1, linear decay (Devlin et al. 2019, app. A.3).
    """
    return FinetuneConfig(log_every=10, checkpoint=CheckpointConfig(every=1000))


def classify_debug() -> FinetuneConfig:
    """Ten steps, to see that all runs: `./launch.sh finetune classify-debug --init-from RUN --data.train F …`."""
    return FinetuneConfig(steps=10, batch_size=8, log_every=5, eval_every=5, checkpoint=CheckpointConfig(every=5))


def demo() -> FinetuneConfig:
    """What the demo does with a thousand short labelled sentences (`./launch.sh`): small model, several epochs."""
    return FinetuneConfig(
        steps=150,
        batch_size=32,
        log_every=15,
        eval_every=50,
        data=FinetuneData(max_length=48),
        execution=Execution(scan_layers=True),
        optimizer=FinetuneOptimizer(learning_rate=5e-4),
        checkpoint=CheckpointConfig(every=1000, keep=1),
    )


PRESETS = {"classify": classify, "classify-debug": classify_debug, "demo": demo}
