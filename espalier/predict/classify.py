"""The class of a text, or of a pair of texts, with probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from espalier.data.examples import encode_pairs
from espalier.errors import UserError
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
        probability_C = np_softmax(scores_C)
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
    paired = {text_b is not None for _, text_b in inputs}
    if len(paired) > 1:
        raise UserError("some of the inputs are pairs and others single texts; ask for them apart")
    examples = encode_pairs(
        model.tokenizer,
        [text for text, _ in inputs],
        [text_b or "" for _, text_b in inputs] if paired == {True} else None,
        model.longest,
        model.config.causal,
    )
    return model.outputs_of_head(examples)


def np_softmax(scores_C: np.ndarray) -> np.ndarray:
    import numpy as np

    return np.asarray(jax.nn.softmax(scores_C.astype(np.float64)))


CLASSIFY = Use(name="classify", takes="text, or text and text_b", reads=read, answers=classify)
