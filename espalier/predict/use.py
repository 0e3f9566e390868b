"""What can be asked of a model, and the table of it. Imports nothing heavy.

A `Use` is one question: how a row of a file becomes its input, and how inputs become results. The methods of
LoadedModel, the commands `predict` and `serve`, and the evaluation of a fine-tuning all go through it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from espalier.errors import UserError

if TYPE_CHECKING:
    from espalier.predict.loaded import LoadedModel

USES = {
    "masked_lm": "espalier.predict.fill:FILL",
    "masked_next_token": "espalier.predict.fill:FILL",
    "causal_lm": "espalier.predict.generate:GENERATE",
    "hybrid_lm": "espalier.predict.generate:GENERATE",
    "seq2seq_lm": "espalier.predict.generate:GENERATE",
    "sequence_to_sequence": "espalier.predict.generate:GENERATE",
    "instruction_tuning": "espalier.predict.generate:GENERATE",
    "preference": "espalier.predict.generate:GENERATE",
    "reinforcement": "espalier.predict.generate:GENERATE",
    "sequence_classification": "espalier.predict.classify:CLASSIFY",
    "rationale": "espalier.predict.rationale:RATIONALE",
    "concepts": "espalier.predict.concepts:CONCEPTS",
    "token_classification": "espalier.predict.tag:TAG",
    "multiple_choice": "espalier.predict.choose:CHOOSE",
    "ranking": "espalier.predict.rank:RANK",
    "reward": "espalier.predict.score:SCORE",
    "sentence_embedding": "espalier.predict.embed:EMBED",
    "embedding": "espalier.predict.embed:EMBED",
    "question_answering": "espalier.predict.answer:ANSWER",
}
"""Task of a run, or head of a model → module and name of what it is used for. A use that is new is one line."""


@dataclass(frozen=True, kw_only=True)
class Use:
    """One question to a model."""

    name: str
    """Of the method of LoadedModel: classify."""
    takes: str
    """Which fields a row has, in words, for messages: "text, or text and text_b"."""
    reads: Callable[[Mapping[str, Any]], Any]
    """The fields of a row, strings or JSON values → the input; UserError, in one line, where they will not do."""
    answers: Callable[[LoadedModel, Sequence[Any]], list[dict[str, Any]]]
    """Inputs → a result each, in their order: JSON values by name. UserError for an input that the model cannot take;
    `checked` finds out which."""
    numbered: Callable[[Any, int], Any] | None = None
    """(input, number of its row, from 0) → the input that knows it, where what is drawn for it depends on that."""
    example: Mapping[str, Any] = field(default_factory=dict)
    """A row: what the page of `serve` shows first, field by field, and what is asked at its start to have all compiled.
    A field that is "" may be left out."""


def use_of(model: LoadedModel) -> Use:
    """What a model is for: by the task of its run, else by its head. UserError where nothing is.

    A decoder that sees both sides finds hidden tokens. A classifier of the Hub with one output scores pairs, as
    cross-encoders do, if it is not said to be a regression.
    """
    task, config = model.saved.get("task", model.head), model.config
    if task == "sequence_classification" and len(config.labels) == 1 and config.problem_type is None:
        task = "ranking"
    if model.head == "causal_lm" and not config.causal:
        task = "masked_next_token"
    for name in (task, model.head):
        if name in USES:
            return find(name)
    raise UserError(f"a model with the head {model.head!r} predicts nothing; there are uses for {', '.join(USES)}")


def find(name: str) -> Use:
    module, _, attribute = USES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def named(name: str) -> Use:
    """The use of this name ("fill"); UserError where there is none."""
    uses = {use.name: use for use in map(find, USES)}
    if name not in uses:
        raise UserError(f"no use {name!r}; there are {', '.join(uses)}")
    return uses[name]


def checked(use: Use, model: LoadedModel, inputs: Sequence[Any]) -> list[dict[str, Any] | UserError]:
    """`use.answers`, with the error in the place of an input that the model cannot take.

    Found by halves, so that one bad input among many costs few further calls.
    """
    try:
        return [*use.answers(model, inputs)] if inputs else []
    except UserError as error:
        if len(inputs) == 1:
            return [error]
        half = len(inputs) // 2
        return checked(use, model, inputs[:half]) + checked(use, model, inputs[half:])
