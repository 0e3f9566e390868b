"""The settings of a GLUE run. Imports nothing heavy."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from espalier.errors import UserError
from espalier.short_help import often
from finetune.config import FinetuneConfig, FinetuneData
from finetune.glue.protocols import PROTOCOLS
from finetune.glue.tasks import BY_KEY

UNUSED = {
    "batch_size": 32,
    "seed": 0,
    "stop_at": None,
    "export": None,
    "optimizer.learning_rate": None,
    "data.encoding": "utf-8",
}
"""Settings of a fine-tuning that a grid has not, and what they are when nobody gave them."""


@dataclass(frozen=True)
class GlueData(FinetuneData):
    """GLUE's files, and which of its tasks."""

    SELDOM: ClassVar[tuple[str, ...]] = ("train", "validation")

    folder: str | None = often(None)
    """Folder with GLUE's own .tsv files (CoLA, SST-2, MRPC … below it), or hf:nyu-mll/glue, or tfds:glue."""
    tasks: tuple[str, ...] = often(tuple(BY_KEY))
    """Which of cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli; what is not there is named, and the rest runs."""
    examples: int | None = None
    """Take so many training examples of each task at most, for a quick look."""

    def __post_init__(self):
        super().__post_init__()
        if self.train or self.validation:
            raise UserError("data.train and data.validation: GLUE has files of many tasks; name their --data.folder")
        for name in self.tasks:
            if name not in BY_KEY:
                raise UserError(f"data.tasks: there is no {name!r} in GLUE; accepted are {', '.join(BY_KEY)}")


@dataclass(frozen=True)
class GlueConfig(FinetuneConfig):
    """A grid of learning rates × epochs × seeds on every task of GLUE."""

    SELDOM: ClassVar[tuple[str, ...]] = ("epochs", "seed", "batch_size", "stop_at", "export")

    task: ClassVar[str] = "glue"
    protocol: Literal["bert", "electra", "mosaicbert", "modernbert"] = often("bert")
    """Whose grid, batch sizes and schedule: finetune/glue/protocols.py. The flags below replace what it says."""
    learning_rates: tuple[float, ...] = often(())
    """Peak learning rates to try; unset = those of the protocol."""
    epoch_counts: tuple[float, ...] = often(())
    """Numbers of epochs to try; unset = those of the protocol."""
    seeds: tuple[int, ...] = often(())
    """Seeds of head, dropout and order; unset = those of the protocol."""
    batch_sizes: int | None = None
    """Rows of a batch for every task; unset = those of the protocol."""
    from_mnli: Literal["protocol", "yes", "no"] = often("protocol")
    """Whether RTE, MRPC and STS-B go on from the best MNLI run."""
    at_once: bool = often(False)
    """Train all seeds and rates of a number of epochs in one program (docs/python.md, "A sweep"): for small models."""
    submission: bool = True
    """Label GLUE's test files with the best run of each task, for the benchmark's server."""
    data: GlueData = field(default_factory=GlueData)

    def __post_init__(self):
        super().__post_init__()
        if self.steps is not None or self.epochs is not None:
            given = f"steps={self.steps}" if self.steps is not None else f"epochs={self.epochs}"
            raise UserError(f"{given}: a grid has lengths of its own; give --epoch-counts, for instance 3 5")
        if any(not 0 < rate < math.inf for rate in self.learning_rates):
            raise UserError(f"learning_rates={self.learning_rates} must be above 0; try 1e-5 3e-5 5e-5")
        if any(not 0 < count < math.inf for count in self.epoch_counts):
            raise UserError(f"epoch_counts={self.epoch_counts} must be above 0; try 2 5")
        if any(not 0 <= seed < 2**32 for seed in self.seeds):
            raise UserError(f"seeds={self.seeds} must lie between 0 and {2**32 - 1}")
        for name, value, instead in (
            ("batch_size", self.batch_size, "give --batch-sizes"),
            ("seed", self.seed, "give --seeds"),
            ("stop_at", self.stop_at, "leave it out; a grid that was ended goes on"),
            ("export", self.export, "leave it out; `./launch.sh export` takes the folder of a run"),
            ("optimizer.learning_rate", self.optimizer.learning_rate, "give --learning-rates"),
            ("data.encoding", self.data.encoding, "leave it out; GLUE's files are UTF-8"),
        ):
            if value != UNUSED[name]:
                raise UserError(f"{name}={value} is of one run, and a grid has many: {instead}")
        assert self.protocol in PROTOCOLS


def glue() -> GlueConfig:
    """All tasks of GLUE from a checkpoint: `./launch.sh finetune glue --init-from RUN --data.folder GLUE`.

    Every learning rate with every number of epochs and seed; a table of the median, least and best score of each task,
    a picture, and files for the benchmark's server. A run that was ended goes on where it was.
    """
    return GlueConfig(log_every=50)
