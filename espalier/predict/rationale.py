"""The class of a text with the words that it was read off, which are all that the classifier saw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from espalier.data import token_tables
from espalier.data.examples import Example
from espalier.data.token_tables import word_table
from espalier.data.tokenizer import special_ids
from espalier.models.rationale import CONTINUABLE, CONTINUES, SPECIAL, explained
from espalier.predict.classify import Texts, encoded, read
from espalier.predict.outputs import outputs, softmax
from espalier.predict.use import Use

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from espalier.predict.loaded import LoadedModel


def rationale(model: LoadedModel, inputs: Sequence[Texts]) -> list[dict[str, Any]]:
    """`label`, `probability`, `probabilities` and `words` of each: those that were selected, each with its `text` and
    the characters `begin` and `end` (of a pair also `of`, 0 or 1)."""
    labels, results = model.config.labels, []
    examples = encoded(model, inputs, offsets=True)
    for texts, example, found in zip(inputs, examples, selected(model, examples), strict=True):
        chances_C = softmax(found["scores"])
        best = int(chances_C.argmax())
        named = dict(zip(labels, map(float, chances_C), strict=True))
        words = words_in(texts, example, found)
        results.append(
            {"label": labels[best], "probability": named[labels[best]], "probabilities": named, "words": words}
        )
    return results


def token_kinds(tokenizer: PreTrainedTokenizerFast, size: int) -> np.ndarray:
    """uint8 [V] of a vocabulary of this size: the bits of models.rationale."""
    kinds_V = np.zeros(size, np.uint8)
    table, bits = word_table(tokenizer)[:size], (token_tables.CONTINUES, token_tables.CONTINUABLE)
    assert bits == (CONTINUES, CONTINUABLE)
    kinds_V[: len(table)] = table
    kinds_V[[index for index in special_ids(tokenizer).all if index < size]] |= SPECIAL
    return kinds_V


def selected(model: LoadedModel, examples: Sequence[Example], compared: bool = False) -> list[dict[str, np.ndarray]]:
    """models.rationale.explained of each."""
    given = {"params": model.params, "kinds": token_kinds(model.tokenizer, model.config.padded_vocab_size)}
    settings = (model.config, model.execution, compared)
    how: Any = {"pad_id": special_ids(model.tokenizer).pad, "longest": model.config.max_length}
    return outputs(explained, settings, given, examples, **how)


def words_in(texts: Texts, example: Example, found: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """The selected words, in the order of the text."""
    assert example.offsets is not None
    words = []
    for at in map(int, np.flatnonzero(found["selected"][: len(example.ids)])):
        own = np.flatnonzero(found["first"][: len(example.ids)] == at)
        of = int(example.types[at])
        begin, end = int(example.offsets[own[0], 0]), int(example.offsets[own[-1], 1])
        text = (texts[0], texts[1] or "")[of]
        begin += len(text[begin:end]) - len(text[begin:end].lstrip())
        words.append({"text": text[begin:end], "begin": begin, "end": end} | ({} if texts[1] is None else {"of": of}))
    return words


RATIONALE = Use(
    name="rationale",
    takes="text, or text and text_b",
    reads=read,
    answers=rationale,
    example={"text": "A moving film, and a funny one.", "text_b": ""},
)
