"""Where in the model the difference between two texts is made: activation patching (Meng et al. 2022, Zhang and Nanda
2024).

The model reads the second text; at one place what it computes is replaced by what it computed on the first. The answer
is scored by a difference of logits, so that what changes all logits alike does not count.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from espalier.errors import UserError
from espalier.look.asked import Asked, row_of
from espalier.models.taps import Taps
from espalier.models.transformer import apply
from espalier.predict.loaded import LoadedModel

PATCHED = ("stream", "attention.out", "mlp.out", "attention.heads")
"""Places that are replaced: at each layer and token; of the heads each head, at all tokens."""
BATCH = 32
"""Patched passes of one program."""


class Patching(NamedTuple):
    """How much of the difference each patch brings back: 0 = as the second text, 1 = as the first."""

    restored: dict[str, np.ndarray]
    """Place → [L, T]; of attention.heads [L, N]."""
    first: float
    """logit(answer to the first) − logit(answer to the second), on the first text."""
    second: float
    """And on the second."""


def patching(
    model: LoadedModel, first: Asked, second: Asked, said: Callable[[str], None] = lambda words: None
) -> Patching:
    """UserError where the texts are not as many tokens, or have one answer."""
    if model.head == "question_answering":
        raise UserError("patching compares the logits of two classes or words, and answers out of a text have none")
    if len(first.tokens) != len(second.tokens) or first.places != second.places:
        raise UserError(
            f"the texts have {len(first.tokens)} and {len(second.tokens)} tokens, asked at {first.places or 'all'} and "
            f"{second.places or 'all'}; give two that differ in single words: {' | '.join(first.tokens)} against "
            f"{' | '.join(second.tokens)}"
        )
    if first.target == second.target:
        raise UserError(f"both texts are answered by {first.name.strip()!r}; name the two answers, or other texts")

    def difference(params: Any, x_BTD: jax.Array) -> jax.Array:
        def one(x_TD: jax.Array) -> jax.Array:
            row = row_of(model, first.places, params, x_TD[None])
            return row[first.target] - row[second.target]

        return jax.vmap(one)(x_BTD)

    read = Taps(read=PATCHED)
    batches: list[Any] = [first.batch, second.batch]
    clean_BTD, clean = apply(model.config, model.params, batches[0], execution=model.execution, taps=read)
    other_BTD = apply(model.config, model.params, batches[1], execution=model.execution)
    on_first, on_second = (float(difference(model.params, x_BTD)[0]) for x_BTD in (clean_BTD, other_BTD))
    if abs(on_first - on_second) < 1e-6:
        raise UserError("the model makes no difference between the two texts; give others")

    @partial(jax.jit, static_argnums=0)
    def patched(place: str, params: Any, clean: jax.Array, chosen_LBX: jax.Array) -> jax.Array:
        """chosen_LBX: of each layer and pass, which tokens (or heads) are replaced."""
        rows = chosen_LBX.shape[1]
        batch = {name: jnp.repeat(array, rows, axis=0) for name, array in second.batch.items()}

        def change(x: jax.Array, given: Any) -> jax.Array:
            kept, mask_BX = given
            mask = mask_BX[:, None, :, None] if place == "attention.heads" else mask_BX[:, :, None]
            return jnp.where(mask, kept, x)

        taps = Taps(change={place: change}, given={place: (clean, chosen_LBX)})
        x_BTD, _ = apply(model.config, params, batch, execution=model.execution, taps=taps)
        return difference(params, x_BTD)

    restored = {}
    layers = model.config.num_hidden_layers
    for place in PATCHED:
        said(place)
        width = model.config.num_attention_heads if place == "attention.heads" else len(first.tokens)
        scores = np.zeros(layers * width)
        for begin in range(0, layers * width, BATCH):
            at = np.arange(begin, min(begin + BATCH, layers * width))
            chosen_LBX = np.zeros((layers, BATCH, width), bool)
            chosen_LBX[at // width, np.arange(len(at)), at % width] = True
            scores[at] = np.asarray(patched(place, model.params, clean[place], chosen_LBX))[: len(at)]
        restored[place] = ((scores - on_second) / (on_first - on_second)).reshape(layers, width)
    return Patching(restored, on_first, on_second)
