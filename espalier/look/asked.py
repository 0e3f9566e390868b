"""One text as a model reads it, and the score that is to be explained."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from espalier.data.tokenizer import special_ids
from espalier.errors import UserError
from espalier.models.logits import head_logits
from espalier.models.taps import EMBEDDINGS, Taps
from espalier.predict.loaded import LoadedModel

MASK = "[MASK]"
HEADS = ("sequence_classification", "masked_lm", "causal_lm")
"""Whose scores are explained."""


class Asked(NamedTuple):
    """A text of T tokens, and one logit of the model on it."""

    batch: dict[str, np.ndarray]
    """input_ids, segment_ids, positions and token_type_ids, int32 [1, T]."""
    tokens: list[str]
    """As text, T."""
    words: list[tuple[int, int]]
    """Tokens [begin, end) of each word; special tokens are in none."""
    texts: list[str]
    """The words as they stand in the text."""
    place: int | None
    """The token at which the score stands; None = it is of the whole text."""
    target: int
    """The class or token whose score it is."""
    name: str
    """Of the target, as text."""
    probability: float
    """Of the target."""


def ask(model: LoadedModel, text: str, target: str | None = None) -> Asked:
    """The text and what is explained: the most probable class, word at the first mask, or next word; or `target`.

    UserError where the model has another head, the text is empty or too long, has no mask, or there is no such target.
    """
    if model.head not in HEADS:
        raise UserError(f"a model with the head {model.head!r} is not explained; there are {', '.join(HEADS)}")
    if not text.strip():
        raise UserError("the text is empty; give one")
    given = text.replace(MASK, str(model.tokenizer.mask_token)) if model.head == "masked_lm" else text
    encoded = model.tokenizer(given, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    if len(ids) > model.longest:
        raise UserError(f"the text has {len(ids):,} tokens, and at most {model.longest:,} are read; shorten it")
    place = _place(model, ids)
    batch = {
        "input_ids": np.array([ids], np.int32),
        "segment_ids": np.ones((1, len(ids)), np.int32),
        "positions": np.arange(len(ids), dtype=np.int32)[None],
        "token_type_ids": np.array([encoded.get("token_type_ids", [0] * len(ids))], np.int32),
    }
    scores_C = np.asarray(scores(model, batch, place))
    names = list(model.config.labels) if model.head == "sequence_classification" else None
    at = int(scores_C.argmax()) if target is None else _target(model, names, target)
    chances_C = np.exp(scores_C - scores_C.max())
    name = names[at] if names else str(model.tokenizer.decode([at]))
    tokens = [str(model.tokenizer.decode([one])) for one in ids]
    places = encoded["offset_mapping"]
    words = _words(encoded.word_ids(), places, ids, special_ids(model.tokenizer))
    texts = [given[places[begin][0] : places[end - 1][1]].strip() for begin, end in words]
    return Asked(batch, tokens, words, texts, place, at, name, float(chances_C[at] / chances_C.sum()))


def scores(
    model: LoadedModel, batch: dict[str, Any], place: int | None, taps: Taps | None = None, params: Any = None
) -> Any:
    """Logits [C] or [V] of a text, of its token `place`; with taps (logits, what they read)."""
    params = model.params if params is None else params
    found = head_logits(model.config, model.head, params, batch, model.execution, taps)
    logits, seen = found if taps else (found, None)
    row = logits[0] if place is None else logits[0, place]
    return (row, seen) if taps else row


def score_of(model: LoadedModel, asked: Asked) -> Any:
    """(params, x_TD) → (logit, probability) of the target where the vectors x_TD enter the stack."""

    def score(params: Any, x_TD: jax.Array) -> tuple[jax.Array, jax.Array]:
        taps = Taps(change={EMBEDDINGS: lambda x_BTD, given: given[None]}, given={EMBEDDINGS: x_TD})
        row, _ = scores(model, asked.batch, asked.place, taps, params)
        return row[asked.target], jax.nn.softmax(row)[asked.target]

    return score


def embedded(model: LoadedModel, asked: Asked, ids_T: np.ndarray) -> jax.Array:
    """What enters the stack for other tokens in the same places, [T, D]."""
    taps = Taps(read=(EMBEDDINGS,))
    _, seen = scores(model, asked.batch | {"input_ids": ids_T[None].astype(np.int32)}, asked.place, taps)
    return seen[EMBEDDINGS][0].astype(jnp.float32)


def _place(model: LoadedModel, ids: list[int]) -> int | None:
    if model.head == "sequence_classification":
        return None
    if model.head == "causal_lm":
        return len(ids) - 1
    mask = special_ids(model.tokenizer, need=("mask",)).mask
    if mask not in ids:
        raise UserError(f"no {MASK} in the text; write one where a word is to be found")
    return ids.index(mask)


def _target(model: LoadedModel, names: list[str] | None, target: str) -> int:
    if names:
        if target not in names:
            raise UserError(f"target={target!r} is no class of this model; it has {', '.join(names)}")
        return names.index(target)
    for text in (target, f" {target}"):
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) == 1:
            return ids[0]
    raise UserError(f"target={target!r} is several tokens ({len(ids)}); give a word that is one")


def _words(numbers: Any, offsets: Any, ids: list[int], specials: Any) -> list[tuple[int, int]]:
    """Tokens of one word stand together: as the tokenizer cuts words, or each by itself where it does not say."""
    found: list[tuple[int, int]] = []
    known = {special for special in specials if special is not None}
    before = None
    for at, (number, (begin, end)) in enumerate(zip(numbers, offsets, strict=True)):
        if begin == end or ids[at] in known and number is None:
            before = None
        elif number is not None and number == before:
            found[-1] = (found[-1][0], at + 1)
        else:
            found.append((at, at + 1))
            before = number
    return found
