"""The record of a pretraining objective on text: one value says all that makes it another than its neighbours."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from espalier.errors import UserError
from espalier.models.config import Execution, ModelConfig
from espalier.task import Start, Task, TaskRecord, Trained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from espalier.data.prepare import Prepared
    from espalier.training.identity import Schedule
    from espalier.training.start import Origin
    from espalier.training.step import Objective

Layout = Literal["framed", "shifted"]
"""How documents lie in rows.

framed: whole between [CLS] and [SEP] where they fit, packed to fill the rows; batches have `input_ids`, `segment_ids`
and `positions`. shifted: one after the other, cut where a row ends; batches also have `labels` (the token after each),
`loss_weights` and `label_bytes`.
"""

SPECIALS: Mapping[Layout, tuple[str, ...]] = {"framed": ("cls", "sep"), "shifted": ("bos", "eos")}


class Setup(NamedTuple):
    """What an objective is made for."""

    config: Any
    """The run's settings, a pretraining.config.TextConfig."""
    model: ModelConfig
    """With the vocabulary of the tokenizer."""
    tokenizer: PreTrainedTokenizerFast | None
    """None where only shapes matter (`plan`)."""

    @property
    def execution(self) -> Execution:
        return self.config.execution


class HeldOut(NamedTuple):
    """The text of a run, for what is written at its end."""

    prepared: Prepared
    batches: Sequence[dict]
    """This process's rows of the held-out batches."""


def perplexity(metrics: dict[str, float]) -> dict[str, float]:
    """With exp(loss)."""
    return metrics | {"perplexity": math.exp(min(metrics["loss"], 700.0))}


@dataclass(frozen=True, kw_only=True)
class TextObjective(TaskRecord):
    """A pretraining objective on text.

    Its functions are given by name or import what is heavy inside, so that the record itself is light.
    """

    command: str
    """Of launch.sh, and the package with its presets: mlm."""
    causal: bool
    """Whether its models see only what came before."""
    layout: Layout
    build: Callable[[Setup, bool], Objective]
    """Makes the objective of training (True) or of evaluations."""
    specials: tuple[str, ...] = ()
    """Special tokens that it needs, beside those of the layout."""
    predicted: Callable[[Any], float] = lambda config: 1.0
    """config → the mean part of the tokens that reach the head, for counts of operations."""
    schedules: tuple[Callable[[], Schedule], ...] = ()
    """What depends on the length of the run, beside the learning rate."""
    word_starts: Callable[[Any], bool] = lambda config: False
    """config → whether batches say where words begin (`word_starts`), which a framed layout can."""
    finalize: Callable[[dict[str, float]], dict[str, float]] = perplexity
    """Adds what follows from the metrics of an evaluation."""
    finish: Callable[[Setup, HeldOut, Trained], None] = lambda setup, text, trained: None
    """Writes what a person looks at. Every process calls it."""
    following: Callable[[str], Sequence[str] | None] = lambda run_dir: None
    """Run directory → the command that comes next."""

    @property
    def needs(self) -> tuple[str, ...]:
        """The special tokens that a tokenizer must have."""
        return SPECIALS[self.layout] + self.specials

    def architecture(self, config: Any, origin: Origin | None, given: frozenset[str]) -> tuple[ModelConfig, int]:
        from espalier.models.pretrained import architecture_of

        model, length = config.model, config.data.sequence_length
        if origin and config.init_from:
            model = architecture_of(origin.config, model, given)
            if model.causal != self.causal:
                kind, command = ("a decoder", "clm") if model.causal else ("an encoder", "mlm")
                raise UserError(f"--init-from names {kind} ({model.model_type}); pretrain it by `{command}`")
        return model.fitted(model.vocab_size, length), length

    def open(self, config: Any, start: Start) -> Task:
        from espalier.pretraining.text import open_text

        return open_text(self, config, start)
