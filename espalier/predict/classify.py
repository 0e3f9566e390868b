"""The class of a text, or of a pair of texts, with probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from espalier.data.examples import Example, encode_pairs
from espalier.errors import UserError
from espalier.predict.outputs import softmax
from espalier.predict.use import Use

if TYPE_CHECKING:
    from espalier.predict.loaded import LoadedModel

Texts = tuple[str, str | None]
"""A text, and the second one of a pair."""


def read(row: Mapping[str, Any]) -> Texts:
    text, text_b = row.get("text"), row.get("text_b")
    if not isinstance(text, str) or not (text_b is None or isinstance(text_b, str)):
        raise UserError(f"no text: a row has text, or text and text_b, and this one {', '.join(row) or 'nothing'}")
    return text, text_b


def classify(model: LoadedModel, inputs: Sequence[Texts]) -> list[dict[str, Any]]:
    """`label`, `probability` (its own) and `probabilities` (of each label) of each.

    Of a model of several labels a text: `labels` (those of at least the model's threshold) and `probabilities`; of
    numbers: `score`.
    """
    labels, problem = model.config.labels, model.config.problem_type
    if not inputs:
        return []
    scores_NC = np.stack(scores(model, inputs))
    if problem == "regression":
        # One score, or one for each thing that is judged.
        one = len(labels) == 1
        return [{"score": float(row_C[0])} if one else {"scores": _named(labels, row_C)} for row_C in scores_NC]
    results: list[dict[str, Any]] = []
    for chances_C in probabilities(model, scores_NC):
        named = _named(labels, chances_C)
        if problem == "multi_label_classification":
            results.append({"labels": at_least(threshold_of(model), named), "probabilities": named})
        else:
            best = int(chances_C.argmax())
            results.append({"label": labels[best], "probability": float(chances_C[best]), "probabilities": named})
    return results


def probabilities(model: LoadedModel, scores_NC: np.ndarray) -> np.ndarray:
    """Of each label, float64 [N, C], with the temperature that was fitted for the model, if one was.

    Of one label a text they add up to 1; of several each stands alone.
    """
    scores_NC = np.asarray(scores_NC, np.float64) / (model.saved.get("tuned") or {}).get("temperature", 1.0)
    if model.config.problem_type == "multi_label_classification":
        # The logistic function, without overflow.
        return 0.5 + 0.5 * np.tanh(scores_NC / 2)
    return softmax(scores_NC)


def threshold_of(model: LoadedModel) -> float:
    """From which probability a model of several labels a text gives a label."""
    return (model.saved.get("tuned") or {}).get("threshold", 0.5)


def at_least(threshold: float, probabilities: Mapping[str, float]) -> list[str]:
    """The labels with such a probability."""
    return [label for label, probability in probabilities.items() if probability >= threshold]


def _named(labels: Sequence[str], values_C: np.ndarray) -> dict[str, float]:
    return dict(zip(labels, map(float, values_C), strict=True))


def scores(model: LoadedModel, inputs: Sequence[Texts]) -> list[np.ndarray]:
    """Logits, float32 [C], of each."""
    return model.outputs_of_head(encoded(model, inputs))


def encoded(model: LoadedModel, inputs: Sequence[Texts], offsets: bool = False) -> list[Example]:
    """Texts and pairs as fine-tuning encodes them, in their order; with the characters of their tokens if `offsets`."""
    examples: list[Any] = [None] * len(inputs)
    for pair in (False, True):
        places = [at for at, (_, text_b) in enumerate(inputs) if (text_b is not None) is pair]
        firsts, seconds = [inputs[at][0] for at in places], [inputs[at][1] or "" for at in places]
        how = (model.longest, model.config.causal, offsets)
        for at, example in zip(
            places, encode_pairs(model.tokenizer, firsts, seconds if pair else None, *how), strict=True
        ):
            examples[at] = example
    return examples


CLASSIFY = Use(
    name="classify",
    takes="text, or text and text_b",
    reads=read,
    answers=classify,
    example={"text": "A moving film, and a funny one.", "text_b": ""},
)
