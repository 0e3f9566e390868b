"""The record of a pretraining objective on text: one value says all that makes it another than its neighbours."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from espalier import user_code
from espalier.errors import UserError
from espalier.models.config import Execution, ModelConfig
from espalier.pretraining.config import TextFiles
from espalier.task import TASKS, Beside, Evaluation, Start, Task, TaskRecord, Trained, find

if TYPE_CHECKING:
    import jax
    from transformers import PreTrainedTokenizerFast

    from espalier.contracts import Origin
    from espalier.data.prepare import Prepared
    from espalier.predict.loaded import LoadedModel
    from espalier.training.frozen import Frozen
    from espalier.training.identity import Schedule
    from espalier.training.step import Objective

Layout = Literal["framed", "shifted"]
"""How documents lie in rows.

framed: whole between [CLS] and [SEP] where they fit, packed to fill the rows; batches have `input_ids`, `segment_ids`
and `positions`. shifted: one after the other, cut where a row ends; batches also have `labels` (the token after each),
`loss_weights` and `label_bytes`.
"""

FRAMED = {"input_ids": "int32", "segment_ids": "int32", "positions": "int32"}
ARRAYS: Mapping[Layout, Mapping[str, str]] = {
    "framed": FRAMED,
    "shifted": FRAMED | {"labels": "int32", "loss_weights": "float32", "label_bytes": "int32"},
}
"""Name → type of every array of a batch, all [B, T]."""
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
    """With exp(loss), where there is a loss."""
    return metrics | {"perplexity": math.exp(min(metrics["loss"], 700.0))} if "loss" in metrics else metrics


@dataclass(frozen=True, kw_only=True)
class TextObjective(TaskRecord):
    """A pretraining objective on text.

    Its functions are given by name or import what is heavy inside, so that the record itself is light.
    """

    data: type | None = TextFiles
    command: str
    """Of launch.sh, and the package with its presets: mlm."""
    causal: bool
    """Whether its models see only what came before."""
    turns: bool = False
    """Whether --init-from may name a model of the other kind, whose attention then becomes that of `causal`."""
    layout: Layout
    build: Callable[[Setup], Objective]
    """Makes the objective."""
    init_params: Callable[[Setup, jax.Array], dict] | None = None
    """(setup, key) → fresh parameters, where they are not those of one model with the head: adapters, several models.
    Runs with --init-from begin with them too."""
    frozen: Callable[[Setup], Frozen | None] = lambda setup: None
    """What is needed and not trained: a base under adapters, a reference model. Without a `load`, it is read from
    --init-from where that is given."""
    matrix_axes: Callable[[Any], Any] | None = None
    """As Task.matrix_axes."""
    part: str = ""
    """As Task.part."""
    own: Any = None
    """Where it is the user's own: the function or record, or what names it."""
    specials: tuple[str, ...] = ()
    """Special tokens that it needs, beside those of the layout."""
    tokenizer_for: Callable[[Any, Any], PreTrainedTokenizerFast | None] = lambda config, tokenizer: tokenizer
    """(config, tokenizer of the initial weights or None) → the one of the run, of the same tokens."""
    predicted: Callable[[Any], float] = lambda config: 1.0
    """config → the mean part of the tokens that reach the head, for counts of operations."""
    flops: Callable[[Any, ModelConfig], float] | None = None
    """(config, model) → floating-point operations of a row in training, where it is not that of a single stack."""
    fitted: Callable[[ModelConfig, Any], ModelConfig] = lambda model, tokenizer: model
    """(model of the tokenizer's vocabulary, tokenizer) → the model of a run that begins with random weights."""
    beside: Callable[[Any, ModelConfig], Mapping[str, Beside]] = lambda config, model: {}
    """(config, model) → the other models that are trained, by the names of their parts: a generator."""
    schedules: tuple[Callable[[], Schedule], ...] = ()
    """What depends on the length of the run, beside the learning rate."""
    word_starts: Callable[[Any], bool] = lambda config: False
    """config → whether batches say where words begin (`word_starts`), which a framed layout can."""
    own_code: Callable[[Any], dict[str, str | None]] = lambda config: {}
    """config → what else may be code of the user's own, and what names it."""
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

    def arrays(self, config: Any) -> dict[str, str]:
        """Name → type of every array of its batches, all [B, T] (data.loader.Rows)."""
        return {**ARRAYS[self.layout]} | ({"word_starts": "bool"} if self.word_starts(config) else {})

    def fresh(self, setup: Setup, key: jax.Array) -> dict:
        """Parameters to begin with."""
        from espalier.models.transformer import init_params

        if self.init_params is not None:
            return self.init_params(setup, key)
        return init_params(setup.model, key, heads=(self.head,))

    def chosen(self, config: Any, objective: Any = None) -> TextObjective:
        given = config.objective if objective is None else objective
        return self if given is None else own_objective(given, self)

    def architecture(self, config: Any, origin: Origin | None, given: frozenset[str]) -> tuple[ModelConfig, int]:
        from espalier.models.pretrained import architecture_of

        model, length = config.model, config.data.sequence_length
        if origin and config.init_from:
            model = architecture_of(origin.config, model, given)
            if self.head != "seq2seq_lm":
                model.check_one_stack(f"{self.command} pretrains")
            elif not model.num_decoder_layers:
                raise UserError(
                    f"--init-from names a model of one stack ({model.model_type}), and {self.name} trains an encoder "
                    "and a decoder; name a T5, or leave it out"
                )
            if self.turns:
                model = replace(model, causal=self.causal)
            if model.causal != self.causal:
                kind = "a decoder" if model.causal else "an encoder"
                others = [one for one in map(find, TASKS) if isinstance(one, TextObjective) and not one.turns]
                commands = dict.fromkeys(one.command for one in others if one.causal == model.causal)
                also = "; to have it see both sides from now on, add --model.no-causal" if model.causal else ""
                raise UserError(
                    f"--init-from names {kind} ({model.model_type}); pretrain it by `{' or '.join(commands)}`{also}"
                )
        return model.fitted(model.vocab_size, length), length

    def open(self, config: Any, start: Start) -> Task:
        from espalier.pretraining.text import open_text

        return open_text(self, config, start)

    def evaluate(self, model: LoadedModel, data: TextFiles) -> Evaluation:
        from espalier.pretraining.evaluate import measure_text

        return measure_text(model, data)


FORM = "objective(setup) that returns an espalier.training.step.Objective"


def own_objective(given: Any, base: TextObjective) -> TextObjective:
    """The record of an objective of the user's own: a TextObjective, or a function that makes one for `base`'s batches.

    given: it, or what names it (FILE.py:NAME). UserError where it is neither.
    """
    found = user_code.load(given) if isinstance(given, str) else given
    if isinstance(found, TextObjective):
        if found.name in TASKS:
            raise UserError(f"{given}: there is a task {found.name} already; give the record another name")
        return replace(found, build=checked(found.build, given), own=found.build if found is given else given)
    return replace(base, build=checked(found, given), own=given)


def checked(build: Callable, given: Any) -> Callable[[Setup], Objective]:
    """A user's `build` whose mistakes, and those of what it makes, are one line each."""
    said = given if isinstance(given, str) else getattr(build, "__qualname__", repr(given))
    make = user_code.function(build, FORM, said)

    def made(setup: Setup) -> Objective:
        from espalier.training.step import Objective

        objective = make(setup)
        if not isinstance(objective, Objective):
            raise UserError(f"{said} returns a {type(objective).__name__}; accepted is a function {FORM}")
        prepare = user_code.function(objective.prepare, "prepare(batch, key, step, train)", said)
        loss = user_code.function(objective.loss, "loss(params, batch, key, norms, train)", said)

        def loss_of(*arguments: Any) -> Any:
            result = loss(*arguments)
            if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
                raise UserError(f"the loss of {said} returns no (loss, {{name: (sum, weight)}})")
            if "loss" not in result[1]:
                raise UserError(f"the loss of {said} has no metric 'loss'; give 'loss': (sum, weight)")
            return result

        def prepared(*arguments: Any) -> Any:
            result = prepare(*arguments)
            if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], dict)):
                raise UserError(f"the prepare of {said} returns no (batch, norms)")
            return result

        return replace(objective, prepare=prepared, loss=loss_of)

    return made
