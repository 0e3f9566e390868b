"""The class of a text by what is said of it: named concepts, each with its part in the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from espalier.data.examples import Example
from espalier.errors import UserError
from espalier.predict import classify
from espalier.predict.outputs import softmax
from espalier.predict.use import Use

if TYPE_CHECKING:
    from espalier.predict.loaded import LoadedModel

BOTTLENECK = "concept_classes"
"""Where the layer from concepts to classes stands among the heads: kernel [K, C], bias [C]."""


class Asked(NamedTuple):
    """A text or pair, and the concepts that are switched off."""

    texts: classify.Texts
    without: tuple[str, ...] = ()


def read(row: Mapping[str, Any]) -> Asked:
    """A row with text (and text_b); `without` is a list of concepts, or names with commas between them."""
    without = row.get("without") or ()
    names = without.split(",") if isinstance(without, str) else without
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise UserError(f"without={without!r} is no list of concepts")
    return Asked(classify.read(row), tuple(name.strip() for name in names))


def class_scores(layer: Mapping[str, Any], score_NK: Any) -> Any:
    """Logits of the classes [N, C]."""
    return score_NK @ layer["kernel"] + layer["bias"][None]


def concept_scores(model: LoadedModel, examples: Sequence[Example]) -> np.ndarray:
    """float64 [N, K], in standard deviations from the mean of the training file."""
    rows = model.outputs_of_head(examples)
    return np.array(rows, np.float64).reshape(len(examples), len(model.config.labels))


def concepts(model: LoadedModel, inputs: Sequence[Asked]) -> list[dict[str, Any]]:
    """`label`, `probability`, `probabilities` and `concepts` of each: `concept`, `score` (in standard deviations from
    the mean), and `part`, what it adds to the label's logit above the mean of the others; the greatest parts first.

    A concept that is switched off has the score 0, the mean of the training file. UserError for one that is not known.
    """
    names, classes = list(model.config.labels), list(model.saved["labels"])
    for asked in inputs:
        if unknown := [name for name in asked.without if name not in names]:
            raise UserError(f"without={unknown[0]!r} is no concept of this model; it has {', '.join(names)}")
    examples = classify.encoded(model, [asked.texts for asked in inputs])
    layer = {name: np.asarray(array, np.float64) for name, array in model.params["head"][BOTTLENECK].items()}
    # Only differences between classes count.
    others_KC = (layer["kernel"].sum(1, keepdims=True) - layer["kernel"]) / max(len(classes) - 1, 1)
    results = []
    for asked, score_K in zip(inputs, concept_scores(model, examples), strict=True):
        score_K = np.where([name in asked.without for name in names], 0.0, score_K)
        chance_C = softmax(class_scores(layer, score_K[None]))[0]
        best = int(chance_C.argmax())
        part_K = score_K * (layer["kernel"] - others_KC)[:, best]
        named = dict(zip(classes, map(float, chance_C), strict=True))
        said = [
            {"concept": names[at], "score": float(score_K[at]), "part": float(part_K[at])}
            for at in np.argsort(-np.abs(part_K), kind="stable")
        ]
        results.append(
            {"label": classes[best], "probability": named[classes[best]], "probabilities": named, "concepts": said}
        )
    return results


CONCEPTS = Use(
    name="concepts",
    takes="text, or text and text_b; without, concepts that are switched off",
    reads=read,
    answers=concepts,
    example={"text": "A moving film, and a funny one.", "text_b": "", "without": ""},
)
