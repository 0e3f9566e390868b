"""Settings shared by every kind of training run, as frozen dataclasses.

A run's *identity* (model, data, objective, optimizer, seed, global batch) must be the same for it to resume; its
*schedule* (steps, warm-up, decay) may change where it was the same so far (training/identity.py); its *execution*
(fields named in `EXECUTION_FIELDS`) at any time. Imports no JAX.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from espalier.errors import UserError
from espalier.short_help import often
from espalier.training.optimizers import OPTIMIZERS, OptimizerKind
from espalier.training.retention import bytes_of
from sharding.mesh import MeshConfig
from sharding.processes.discovery import DistributedConfig

EXECUTION_FIELDS = frozenset(
    (
        *("run_dir", "stop_at", "accumulation", "mesh", "execution", "checkpoint", "log_every", "eval_every"),
        *("eval_rows", "prefetch", "workers", "max_rejected", "json", "debug", "cache", "export", "command"),
        *("distributed", "published", "user_code", "show", "answers", "beams", "max_new_tokens"),
        *("keep_best", "early_stopping", "checksum_every", "asked_vocabulary", "trackers", "notify", "bad_steps"),
        *("beside", "profile", "slots"),
    )
)
"""Field names, at any depth, that a resumed run may change."""
FINGERPRINTED_FIELDS = frozenset(
    f"data.{name}"
    for name in (
        "files sources validation_files builtin_exclude tokenizer alphabet lowercase train validation label_kind"
    ).split()
)
"""What may be spelled anew (the folder was moved): the fingerprints, or the classes, know what was read."""
USER_CODE_FIELDS = frozenset(("objective", "masking.function"))
"""What names code of the user's own; `user_code` of config.json knows which it is."""
HOST_FIELDS = frozenset("distributed command cache prefetch workers max_rejected json debug trackers notify".split())
"""Field names, at any depth, that may differ between the processes of one run."""


if TYPE_CHECKING:
    OptimizerName = str
else:
    OptimizerName = Literal[tuple(OPTIMIZERS)]


@dataclass(frozen=True)
class SparsityConfig:
    """How many weights of each matrix of the layers are not 0 (espalier/training/sparsity.py)."""

    density: float = 1.0
    """The part of the weights that stays after each step, the largest of each matrix (Gao et al. 2025); 1 = all."""
    anneal: float = 0.5
    """The part of the steps in which it falls linearly from 1 to that; 0 = from the first step on."""

    def __post_init__(self):
        if not 0 < self.density <= 1:
            raise UserError(f"optimizer.sparsity.density={self.density} must be above 0 and at most 1; try 0.1")
        if not 0 <= self.anneal <= 1:
            raise UserError(f"optimizer.sparsity.anneal={self.anneal} must lie between 0 and 1; try 0.5")


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and schedule; the schedule spans `steps` of the run."""

    name: OptimizerName = "adamw"
    """adamw, or muon for the matrices of the layers with adamw for the rest (Jordan et al. 2024)."""
    learning_rate: float = often(1e-4)
    """Peak learning rate."""
    muon_learning_rate: float = 0.02
    """Peak learning rate of the matrices under muon."""
    schedule: Literal["linear", "cosine", "wsd", "constant"] = "linear"
    """After warm-up: linear or cosine to the end, or stable until the last decay_fraction (wsd)."""
    warmup: float = 0.06
    """Warm-up: a fraction of the steps below 1, else a number of steps."""
    decay_fraction: float = 0.2
    """wsd: the part of the steps in which the rate falls."""
    final_fraction: float = 0.0
    """Learning rate at the end, as a fraction of the peak."""
    weight_decay: float = 0.01
    no_decay: str = r"(bias|scale|norm|embedding)"
    """Parameters whose path matches (regular expression) are not decayed."""
    rate_scales: tuple[tuple[str, float], ...] = ()
    """(regular expression, factor) pairs: the first that matches a path scales its learning rate."""
    layer_decay: float = 1.0
    """Learning rates fall by this factor from layer to layer, away from the head: head 1, last layer d, … embeddings
    d^(layers + 1) (Bao et al. 2022); 1 = the same for all."""
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-6
    clip_norm: float = 1.0
    """Global gradient norm is clipped to this; 0 = off."""
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)

    @property
    def kind(self) -> OptimizerKind:
        """What is known of it."""
        return OPTIMIZERS[self.name]

    def __post_init__(self):
        if self.name not in OPTIMIZERS:
            raise UserError(f"optimizer.name={self.name} is none of {', '.join(OPTIMIZERS)}")
        for name in ("learning_rate", "muon_learning_rate", "warmup", "weight_decay", "eps", "clip_norm"):
            value = getattr(self, name)
            # An entry point may leave it unset until it has seen the model.
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"optimizer.{name}={value} must be a number of at least 0")
        for name in ("decay_fraction", "final_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"optimizer.{name}={getattr(self, name)} must lie between 0 and 1")
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"optimizer.layer_decay={self.layer_decay} must be above 0 and at most 1; try 0.9")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optimizer.{name}={getattr(self, name)} must be at least 0 and below 1; try 0.9")


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written; the last step is always saved."""

    every: int = 1000
    """Steps between checkpoints."""
    keep: int = 2
    """How many of the newest stay on disk."""
    keep_every: int | None = None
    """Besides, each checkpoint whose step is a multiple of this stays; unset = none."""
    keep_best: int = 1
    """Besides, how many of the best stay, where --keep-best METRIC or early stopping follows a metric."""
    budget: str | None = None
    """Bytes that the checkpoints of the run may take, with the one that is being written: 20GB, 500MB. For it the
    oldest go whatever the other rules say, but never the newest or the best; unset = no limit."""
    on_failure: Literal["stop", "continue"] = "stop"
    """What one that cannot be written does (a full disk): it ends the run, or is told of and tried again when the next
    is due."""

    def __post_init__(self):
        for name in ("every", "keep", "keep_every", "keep_best"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"checkpoint.{name}={value} must be at least 1")
        if self.budget is not None:
            bytes_of(self.budget)


@dataclass(frozen=True)
class BadSteps:
    """Steps that leave the model as it is, for their loss or gradient is not finite or too large."""

    deviations: float = 0.0
    """Too large is a gradient norm so many standard deviations above its running mean; 0 = any may be; try 6."""
    in_a_row: int = 10
    """After so many, the run goes back to its last checkpoint and passes over the batches since then."""
    rollbacks: int = 3
    """The time that this happens at one checkpoint at which the run ends instead."""

    def __post_init__(self):
        if not 0 <= self.deviations < math.inf:
            raise UserError(f"bad_steps.deviations={self.deviations} must be a number of at least 0; 0 = off")
        for name in ("in_a_row", "rollbacks"):
            if getattr(self, name) < 1:
                raise UserError(f"bad_steps.{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True)
class EarlyStopping:
    """Ending a run that no longer gets better on held-out data. Its best checkpoint is then what it gives."""

    patience: int | None = None
    """Evaluations without a better one after which the run ends; unset = it goes on to the end of its schedule."""
    metric: str | None = None
    """Which metric of the evaluations; unset = that of --keep-best, else loss."""
    mode: Literal["auto", "min", "max"] = "auto"
    """Whether low or high values are better; auto = low for losses, perplexities, bits, divergences and errors."""

    def __post_init__(self):
        if self.patience is not None and self.patience < 1:
            raise UserError(
                f"early_stopping.patience={self.patience} must be at least 1; leave it out to go on to the end"
            )


@dataclass(frozen=True)
class TrainConfig:
    """What the training loop itself needs; entry points extend it with model, data and objective."""

    steps: int = often(1000)
    """Length of the schedule in optimizer steps."""
    batch_size: int = often(32)
    """Rows in the global batch."""
    seed: int = often(0)
    """Seed of parameters, data, masking and dropout; from 0 to 2³²-1."""
    run_dir: str | None = often(None)
    """Where everything of this run goes; unset = runs/<command>-<preset>."""
    stop_at: int | None = often(None)
    """Pause after this step of the schedule; the same command without it goes on."""
    init_from: str | None = often(None)
    """Start from another model: a run directory, or hf:PATH_OR_ID (Hugging Face format). That is a folder or a
    repository on the Hub. Architecture and tokenizer come with the weights; --model settings that are given change
    it."""
    init_optimizer: bool = False
    """With --init-from: take its optimizer state too (a fork, e.g. the decay phase of a stable run)."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    accumulation: int = often(1)
    """Micro-batches a step; gradients are summed exactly."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log_every: int = 10
    """Steps between progress lines and logged metrics."""
    eval_every: int = 500
    """Steps between evaluations on held-out data; the end is always evaluated."""
    checksum_every: int = 0
    """Steps between checksums of all tensors, by which `./launch.sh replay RUN` finds where a run left its way; 0 =
    none."""
    keep_best: str | None = None
    """Keep the checkpoint that is best by this metric of the evaluations (loss, accuracy, …): it, and not the last one,
    is measured at the end, exported and loaded."""
    early_stopping: EarlyStopping = field(default_factory=EarlyStopping)
    bad_steps: BadSteps = field(default_factory=BadSteps)
    profile: str | None = None
    """Write a trace of the steps from A to B, given as A:B, for Perfetto and XProf; 10:15 shows a run at its pace."""
    prefetch: int = 2
    """Batches prepared ahead."""
    workers: int = 1
    """Threads that prepare them; batches are the same with any number."""
    export: str | None = often(None)
    """At the end, write the model to this new folder in Hugging Face format. `./launch.sh export` does so later."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Who gets the metrics besides metrics.jsonl; wandb and mlflow need their packages (docs/trackers.md)."""
    notify: str | None = field(default=None, repr=False)
    """URL of a webhook that is told when the run starts, fails, pauses and finishes; or the environment variable
    ESPALIER_NOTIFY. It is kept in no file."""
    json: bool = False
    """Print one JSON object as the last line of standard output."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulation", "log_every", "eval_every"):
            value = getattr(self, name)
            # An entry point may leave it unset until it has seen the data.
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        if self.checksum_every < 0:
            raise UserError(f"checksum_every={self.checksum_every} must be at least 0 (0 = no checksums)")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed} must lie between 0 and {2**32 - 1}")
        if self.keep_best and self.early_stopping.metric not in (None, self.keep_best):
            raise UserError(
                f"keep_best={self.keep_best} and early_stopping.metric={self.early_stopping.metric} are two metrics; "
                "name one"
            )
        if self.notify and not self.notify.startswith(("https://", "http://")):
            raise UserError("notify must be a URL, https://… or http://… (not repeated here: it may be a secret)")
        if self.profile is not None:
            steps_of(self.profile)
        if self.prefetch < 0:
            raise UserError(f"prefetch={self.prefetch} must be at least 0 (0 = prepare no batch ahead)")
        if self.workers < 1:
            raise UserError(f"workers={self.workers} must be at least 1; --prefetch 0 prepares no batch ahead")
        if self.stop_at is not None and self.stop_at < 1:
            raise UserError(f"stop_at={self.stop_at} must be at least 1; leave it out to train to the end")
        if self.init_optimizer and not self.init_from:
            raise UserError("init_optimizer needs --init-from RUN: whose optimizer state should be taken?")


def steps_of(window: str) -> tuple[int, int]:
    """The first and the last step of a profile, given as A:B; UserError where it is not that."""
    first, _, last = window.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise UserError(f"profile={window} must be two steps, the first and the last, such as 10:15")
    return int(first), int(last)
