"""The contract of everything that is trained, and the table of what there is. Imports nothing heavy.

A `TaskRecord` says what is known before any data is read: its names in reports, cards and plans, the head that it
trains, and how it is opened. Opening reads the data and gives a `Task`: model, objective, batches, and what is written
at the end. `espalier.assembly.train` trains any of them.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from espalier.errors import UserError

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh
    from transformers import PreTrainedTokenizerFast

    from espalier.contracts import Origin
    from espalier.models.config import ModelConfig
    from espalier.models.published import Published
    from espalier.predict.loaded import LoadedModel
    from espalier.report.task import TaskReport
    from espalier.training.frozen import Frozen
    from espalier.training.identity import Schedule
    from espalier.training.run import Result, RunDirectory
    from espalier.training.step import Objective

TASKS = {
    "masked_lm": "mlm.record:MASKED_LM",
    "causal_lm": "clm.record:CAUSAL_LM",
    "hybrid_lm": "mlm.next_token:HYBRID",
    "span_corruption": "mlm.span_corruption:SPAN_CORRUPTION",
    "masked_next_token": "mlm.next_token:MASKED_NEXT_TOKEN",
    "replaced_token_detection": "mlm.electra.record:REPLACED_TOKENS",
    "masked_diffusion": "mlm.diffusion.record:DIFFUSION",
    "sequence_classification": "finetune.tasks.classify.record:CLASSIFICATION",
    "rationale": "finetune.tasks.rationale.record:RATIONALE",
    "concepts": "finetune.tasks.concepts.record:CONCEPTS",
    "token_classification": "finetune.tasks.tag.record:TAGGING",
    "multiple_choice": "finetune.tasks.choose.record:MULTIPLE_CHOICE",
    "ranking": "finetune.tasks.rank.record:RANKING",
    "reward": "finetune.tasks.reward.record:REWARD",
    "preference": "finetune.tasks.prefer.record:PREFERENCE",
    "sentence_embedding": "finetune.tasks.embed.record:SENTENCE_EMBEDDING",
    "question_answering": "finetune.tasks.answer.record:ANSWERING",
    "reinforcement": "finetune.tasks.reinforce.record:REINFORCE",
    "sequence_to_sequence": "finetune.tasks.rewrite.record:SEQUENCE_TO_SEQUENCE",
    "instruction_tuning": "finetune.tasks.instruct.record:INSTRUCTION",
    "masked_lm_autoencoder": "espalier.features.record:ON_ENCODERS",
    "causal_lm_autoencoder": "espalier.features.record:ON_DECODERS",
}
"""`task` of a run's config.json → module and name of its record. A task that is new here is one line."""


@dataclass(frozen=True)
class TaskRecord:
    """What is known of a task before it is opened. Whoever trains, plans or describes a run asks its record.

    A kind of task is a subclass that can open: pretraining.objective.TextObjective, finetune.task.FinetuneTask.
    """

    name: str
    """`task` in config.json."""
    head: str
    """The head that it trains (models.heads.HEADS)."""
    splits_rows: bool = True
    """Whether rows may be split over the mesh axis `sequence`."""
    mixed: bool = False
    """Whether causal rows and rows that see both sides stand in one batch."""
    report: TaskReport | None = None
    """What it adds to report and card of its runs; None = nothing."""
    measures_heads: tuple[str, ...] = ()
    """Further heads whose models it measures without training."""
    data: type | None = None
    """The settings of its data, a dataclass; None = it is not evaluated without training."""

    def chosen(self, config: Any, objective: Any = None) -> TaskRecord:
        """The record that this configuration means: this one, or one with an objective of the user's own."""
        if objective is not None:
            raise UserError(f"task {self.name} takes no objective of your own; pretraining on text does")
        return self

    def architecture(self, config: Any, origin: Origin | None, given: frozenset[str]) -> tuple[ModelConfig, int]:
        """The model before its vocabulary is known, and the tokens of the longest row, by which the mesh is chosen.

        given: settings of the model that the user named. UserError where the origin will not do.
        """
        raise NotImplementedError

    def open(self, config: Any, start: Start) -> Task:
        """Read the data; UserError where it will not do."""
        raise NotImplementedError

    def evaluate(self, model: LoadedModel, data: Any) -> Evaluation:
        """Measure a model on the validation data that these settings (`self.data`) name, without training."""
        raise UserError(f"task {self.name} has no evaluation without training")


class Evaluation(NamedTuple):
    """What was measured on a file."""

    metrics: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]] = ()
    """Each example with what was predicted beside what is right: predictions.jsonl."""
    files: Mapping[str, Any] = {}
    """JSON values that a report draws, by the name of their file: confusion.json; a string is written as it is."""
    warnings: Sequence[str] = ()
    """What people must know of these figures, a line each."""


class Start(NamedTuple):
    """What is settled when a task is opened."""

    run: RunDirectory
    origin: Origin | None
    """Where the run goes on from; None = scratch."""
    model: ModelConfig
    """Of TaskRecord.architecture."""
    tokenizer: PreTrainedTokenizerFast | None
    """That of the origin."""
    mesh: Mesh

    def base(self, frozen: Frozen | None) -> Frozen | None:
        """Frozen parameters as the run has them: where nothing says how to load them, those of the origin."""
        if frozen is None or frozen.load is not None or self.origin is None or self.origin.resumed:
            return frozen
        return replace(frozen, load=self.origin.restore_params, origin=self.origin.name)


class Beside(NamedTuple):
    """A model that is trained beside the one that a run is about."""

    model: ModelConfig
    head: str
    predicted: float = 1.0
    """The mean part of the tokens that reach its head."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained, with its data at hand."""

    config: Any
    """A training.config.TrainConfig in which nothing is left open."""
    model: ModelConfig
    tokenizer: PreTrainedTokenizerFast
    init_params: Callable[[jax.Array], dict]
    """key → fresh parameters, head included."""
    objective: Objective
    batch: Callable[[int], dict]
    """step → this process's rows of that step's batch, NumPy."""
    documents: Callable[[int], Sequence[str]] | None = None
    """step → names of the documents or examples in that step's whole batch, for the log of skipped ones."""
    eval_batches: Sequence[dict]
    finalize_eval: Callable[[dict[str, Any]], dict[str, Any]] = dict
    """Adds what follows from the metrics of an evaluation, and from its counts (F1; `training.step.Sums`)."""
    frozen: Frozen | None = None
    """Parameters that the model needs and the run does not train."""
    load_params: Callable[[Any], Any] | None = None
    """Shapes of what is trained, with shardings → parameters to start from, where those are not the origin's alone
    (adapters)."""
    part: str = ""
    """Name of the subtree that is `model`, to be exported and loaded, where several are trained: discriminator."""
    beside: Mapping[str, Beside] = field(default_factory=dict)
    """The others, by the names of their subtrees, which are exported beside it. What such a subtree lacks, the model
    has in common with that of `part` (embeddings)."""
    matrix_axes: Callable[[Any], Any] | None = None
    """Parameter shapes → their matrices, for Muon; unset = models.transformer.matrix_axes. A tree of several models, by
    name, asks that for each."""

    fingerprints: Mapping[str, str]
    """SHA-256 of tokenizer and data."""
    user_code: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """What code of the user's own is for → where it is, and its SHA-256 (user_code.recorded)."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """JSON values that make the run what it is besides its flags."""
    schedules: Sequence[Schedule] = ()
    """What depends on the length of the run, beside the learning rate."""
    scratch: bool = False
    """Whether what is trained begins anew: of the origin, architecture, tokenizer and frozen weights alone are used."""

    tokens_per_step: float
    """Expected, for the introduction; what a run reports is counted from its batches (training.step.count_tokens)."""
    flops_per_step: float
    longest: int
    """Tokens of the longest row."""
    packed: bool = True
    """Whether a row may hold several documents, for attention (models.attention_backend.Use)."""
    facts: Sequence[str] = ()
    """What was read and what it was taken for, a line each."""
    data: Mapping[str, str] = field(default_factory=dict)
    """Rows on what is learnt from and what is measured on, for the introduction."""
    row: str = ""
    """How long the rows of a batch are, in words."""
    epochs: str = ""
    """How often the schedule goes through the data, in words."""

    finish: Callable[[Trained], dict[str, Any]] = lambda trained: {}
    """Writes what a person looks at; what it returns joins summary.json. Every process calls it."""
    summary: Callable[[int], dict[str, Any]] = lambda step: {}
    """Steps done → what joins summary.json, also of a run that was stopped."""
    exported: Callable[[Published | None], tuple[PreTrainedTokenizerFast, Published | None]] | None = None
    """What is written beside exported weights, where it is not the tokenizer as it is."""
    following: Sequence[str] | None = None
    """The command that comes next, as words of a command line."""


class Trained:
    """A run at its end, for Task.finish."""

    def __init__(self, run: RunDirectory, result: Result, mesh: Mesh):
        self.run, self.result, self.mesh = run, result, mesh

    @property
    def params(self) -> Any:
        """Complete and with adapters merged, on the mesh."""
        return self._params

    @functools.cached_property
    def _params(self) -> Any:
        from espalier.training.adapters import merged

        return merged(self.result.state.complete)

    @functools.cached_property
    def collected(self) -> Any:
        """The parameters as NumPy arrays in process 0, None in the others, all of which must ask."""
        from sharding.processes.coordination import collected

        return collected(self.params)


def find(name: str) -> TaskRecord:
    """The record of a task in TASKS; UserError for another."""
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}; there are {', '.join(TASKS)}")
    module, _, attribute = TASKS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
