"""The settings that all fine-tunings share. A task adds its own beside its record (finetune/tasks)."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from espalier import progress
from espalier.data.encodings import codec
from espalier.errors import UserError
from espalier.models.config import Execution
from espalier.short_help import often
from espalier.training.config import OptimizerConfig, TrainConfig

if TYPE_CHECKING:
    from espalier.models.config import ModelConfig


@dataclass(frozen=True)
class FinetuneData:
    """Labelled files: what each holds is said by the subclass of a task."""

    train: str | None = often(None)
    """File, URL or data set (hf:ID?split=train) to learn from."""
    validation: str | None = often(None)
    """What to measure on, given likewise."""
    encoding: str = "utf-8"
    """Encoding of the files, by the names of Python: gb18030, big5, cp932, euc-jp, euc-kr, utf-16, cp1252 …"""
    max_length: int | None = often(None)
    """Tokens of an example; unset = as many as the model has positions, at most 512."""

    @contextlib.contextmanager
    def opening(self, name: str, what: str) -> Iterator[str]:
        """The path of `train` or `validation`, while it is read, which is said where it takes long.

        what: to be named by who has named none. UserError then.
        """
        path = getattr(self, name)
        if path is None:
            raise UserError(f"no --data.{name} FILE given: name {what}")
        path = os.path.expanduser(path)
        with progress.waiting(f"reading {path}"):
            yield path

    def resumed(self, saved: Mapping[str, Any]) -> Self:
        """With what a run chose at its first start, whose settings (JSON values) were saved."""
        return self

    def __post_init__(self):
        codec(self.encoding)
        if self.max_length is not None and self.max_length < 8:
            raise UserError(f"data.max_length={self.max_length} is too short; at least 8")


@dataclass(frozen=True)
class PairedData(FinetuneData):
    """Files of pairs, both of whose texts stand in one row."""

    pairs_per_row: int = 1
    """Pairs that share a row, without seeing each other; little of the rows is padding then. 0 = as many as suit their
    length, up to 8."""

    def resumed(self, saved: Mapping[str, Any]) -> Self:
        return self if self.pairs_per_row else dataclasses.replace(self, pairs_per_row=saved.get("pairs_per_row", 1))

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.pairs_per_row <= 64:
            raise UserError(f"data.pairs_per_row={self.pairs_per_row} must lie between 0 and 64; 0 = chosen")


@dataclass(frozen=True)
class FinetuneOptimizer(OptimizerConfig):
    """Optimizer and schedule of a fine-tuning."""

    learning_rate: float | None = often(None)  # type: ignore[assignment]
    """Peak learning rate; unset = 5e-5 × 768 / hidden_size, but not above 3e-4; of adapters ten times as much."""
    warmup: float = 0.1
    """Warm-up: a fraction of the steps below 1, else a number of steps."""
    b2: float = 0.999


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters in place of training everything: W + scale · B A (Hu et al. 2021), and the head whole."""

    rank: int | None = often(None)
    """Rank of adapters; unset = all is trained."""
    alpha: float = 16.0
    """The scale is alpha / rank."""
    targets: str = r"^layers/"
    """Which matrices have an adapter: a regular expression on paths like layers/period/0/attention/q/kernel; unset =
    all of the layers (Dettmers et al. 2023)."""
    rslora: bool = False
    """The scale is alpha / √rank, so that high ranks learn as well (Kalajdzievski 2023)."""
    dropout: float = 0.0
    """Dropout of what the adapters see."""

    def __post_init__(self):
        if self.rank is not None and self.rank < 1:
            raise UserError(f"lora.rank={self.rank} must be at least 1; leave it out to train every parameter")
        if not self.alpha > 0:
            raise UserError(f"lora.alpha={self.alpha} must be greater than 0; try 16")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout={self.dropout} must be at least 0 and below 1; try 0.05")

    @property
    def scale(self) -> float:
        """What the product of the two small matrices is multiplied by."""
        assert self.rank is not None
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def one_or_parallel(data: FinetuneData) -> None:
    """UserError where a side has more than one file, or two of parallel lines."""
    for name in ("train", "validation"):
        if len(files := getattr(data, name)) > 2:
            raise UserError(f"--data.{name} takes one file, or two of parallel lines; given are {len(files)}")


@dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    """A fine-tuning run; model and tokenizer are those of the checkpoint."""

    task: ClassVar[str]
    """In espalier.task.TASKS."""
    steps: int | None = None  # type: ignore[assignment]
    """Length of the schedule in optimizer steps; unset = three epochs, but at least 200 steps (Mosbach et al. 2021)."""
    epochs: float | None = often(None)
    """Length of the schedule in passes over the training file, instead of steps."""
    eval_every: int | None = None  # type: ignore[assignment]
    """Steps between evaluations; unset = an epoch, or a tenth of the run if that is longer."""
    init_from: str | None = often(None)
    """Whose weights, tokenizer and architecture are taken: a run directory, or hf:PATH_OR_ID. The
    latter is a folder or a repository on the Hub, in Hugging Face format."""
    scratch: bool = often(False)
    """Start from random weights, to see what the pretraining is worth. Architecture and tokenizer are taken."""
    bidirectional: bool = False
    """Let a decoder see both sides, as `mlm hybrid` trains it to: it then classifies as an encoder."""
    dropout: float = 0.1
    """Dropout of hidden states and attention; replaces the checkpoint's."""
    optimizer: FinetuneOptimizer = field(default_factory=FinetuneOptimizer)
    lora: LoraConfig = field(default_factory=LoraConfig)
    freeze: tuple[str, ...] = ()
    """What is not trained: embeddings, layers.0-5 (the first six), or a regular expression on paths of parameters."""
    data: FinetuneData = field(default_factory=FinetuneData)
    execution: Execution = field(default_factory=Execution)

    def __post_init__(self):
        super().__post_init__()
        if self.epochs is not None and self.epochs <= 0:
            raise UserError(f"epochs={self.epochs} must be greater than 0; try 3")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout} must be at least 0 and below 1; try 0.1")
        if self.freeze and self.lora.rank:
            raise UserError(
                "freeze: with --lora.rank everything but adapters and head is frozen; choose matrices by --lora.targets"
            )
        if self.optimizer.sparsity.density < 1 and self.lora.rank:
            raise UserError(
                "optimizer.sparsity: with --lora.rank the matrices of the layers are not trained; leave out one of both"
            )
        if self.freeze and self.scratch:
            raise UserError("freeze: what is frozen must come from somewhere; leave out --scratch or --freeze")
        if self.scratch and self.lora.rank:
            raise UserError("scratch: adapters need a pretrained model to adapt; leave out --scratch or --lora.rank")
        if self.init_optimizer:
            raise UserError(
                "init_optimizer: a classifier cannot take over a pretraining's optimizer state; leave it out"
            )


def max_length(data: FinetuneData, model: ModelConfig) -> int:
    """Tokens of an example at most."""
    limit = model.max_length
    if data.max_length is None:
        return model.usual_length
    if limit is not None and data.max_length > limit:
        raise UserError(f"data.max_length={data.max_length} exceeds the model's {limit} learned positions; try {limit}")
    return data.max_length
