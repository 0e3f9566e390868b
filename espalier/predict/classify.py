"""The class of a text, or of a pair of texts, with probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from espalier.data.examples import encode_pairs
from espalier.errors import UserError
from espalier.predict.outputs import softmax
from espalier.predict.use import Use

if TYPE_CHECKING:
    import numpy as np

    from espalier.predict.loaded import LoadedModel

Texts = tuple[str, str | None]
"""A text, and the second one of a pair."""


def read(row: Mapping[str, Any]) -> Texts:
    text, text_b = row.get("text"), row.get("text_b")
    if not isinstance(text, str) or not (text_b is None or isinstance(text_b, str)):
        raise UserError(f"no text: a row has text, or text and text_b, and this one {', '.join(row) or 'nothing'}")
    return text, text_b


def classify(model: LoadedModel, inputs: Sequence[Texts]) -> list[dict[str, Any]]:
    """`label`, `probability` (its own) and `probabilities` (of each label) of each."""
    labels = model.config.labels
    results = []
    for scores_C in scores(model, inputs):
        probability_C = softmax(scores_C)
        best = int(probability_C.argmax())
        results.append(
            {
                "label": labels[best],
                "probability": float(probability_C[best]),
                "probabilities": dict(zip(labels, map(float, probability_C), strict=True)),
            }
        )
    return results


def scores(model: LoadedModel, inputs: Sequence[Texts]) -> list[np.ndarray]:
    """Logits, float32 [C], of each."""
    alone, pairs = (
        [at for at, (_, text_b) in enumerate(inputs) if (text_b is not None) is pair] for pair in (False, True)
    )
    examples: list[Any] = [None] * len(inputs)
    for places, pair in ((alone, False), (pairs, True)):
        encoded = encode_pairs(
            model.tokenizer,
            [inputs[at][0] for at in places],
            [inputs[at][1] or "" for at in places] if pair else None,
            model.longest,
            model.config.causal,
        )
        for at, example in zip(places, encoded, strict=True):
            examples[at] = example
    return model.outputs_of_head(examples)


CLASSIFY = Use(
    name="classify",
    takes="text, or text and text_b",
    reads=read,
    answers=classify,
    example={"text": "A moving film, and a funny one.", "text_b": ""},
)
