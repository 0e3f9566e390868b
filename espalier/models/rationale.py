"""A classifier that sees few words: a selector opens the gate of some, and what is behind the others is 0.

Selector and classifier are one stack with two heads, run twice: over the whole text, and over the embeddings times the
gates (Lei et al. 2016; the gates are those of Bastings et al. 2019). What passes is all that the second run sees.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from espalier.models import gates
from espalier.models.config import Execution, ModelConfig
from espalier.models.heads import gate_logits, sequence_logits
from espalier.models.taps import EMBEDDINGS, Taps
from espalier.models.transformer import apply

CONTINUES, CONTINUABLE, SPECIAL = 1, 2, 4
"""Bits of the kind of a token: it goes on with the word of the token before it, where that can be gone on with; it is a
special one, which is always seen (predict.rationale.token_kinds)."""


class Words(NamedTuple):
    """How the tokens of rows make words."""

    first_BT: jax.Array
    """Where the word of each token begins, int32."""
    starts_BT: jax.Array
    """1 where a word begins that a gate is for, float32: not at special tokens and padding."""


def words_of(kinds_V: jax.Array | np.ndarray, batch: dict) -> Words:
    """The words of rows, one text or pair each."""
    kinds_BT, real_BT = jnp.asarray(kinds_V)[batch["input_ids"]], batch["segment_ids"] > 0
    before_BT = jnp.pad(kinds_BT[:, :-1], ((0, 0), (1, 0)))
    inside_BT = ((kinds_BT & CONTINUES) > 0) & ((before_BT & CONTINUABLE) > 0)
    at_BT = jnp.broadcast_to(jnp.arange(kinds_BT.shape[1], dtype=jnp.int32), kinds_BT.shape)
    first_BT = jax.lax.cummax(jnp.where(inside_BT, 0, at_BT), axis=1)
    starts_BT = ~inside_BT & real_BT & ((kinds_BT & SPECIAL) == 0)
    return Words(first_BT, starts_BT.astype(jnp.float32))


def selector(config: ModelConfig, params: dict, batch: dict, execution: Execution, key: jax.Array | None = None):
    """(a, b) of the gate at every token, float32 [B, T]; of a word, that of its first token counts."""
    body_key, head_key = (None, None) if key is None else jax.random.split(key)
    x_BTD = apply(config, params, batch, execution=execution, key=body_key)
    return gates.shapes(gate_logits(config, params, x_BTD, head_key))


def spread(words: Words, z_BT: jax.Array) -> jax.Array:
    """The gates of words at all their tokens; 1 at special tokens."""
    of_word_BT = jnp.take_along_axis(z_BT, words.first_BT, axis=1)
    gated_BT = jnp.take_along_axis(words.starts_BT, words.first_BT, axis=1)
    return jnp.where(gated_BT > 0, of_word_BT, 1.0)


def seen_through(
    config: ModelConfig, params: dict, batch: dict, z_BT: jax.Array, execution: Execution, key: jax.Array | None = None
) -> jax.Array:
    """Class scores, float32 [B, C], of what gates (at all tokens) let through."""
    body_key, head_key = (None, None) if key is None else jax.random.split(key)
    taps = Taps(
        change={EMBEDDINGS: lambda x_BTD, z: x_BTD * z[:, :, None].astype(x_BTD.dtype)}, given={EMBEDDINGS: z_BT}
    )
    x_BTD, _ = apply(config, params, batch, execution=execution, key=body_key, taps=taps)
    return sequence_logits(config, params, x_BTD, batch["segment_ids"], head_key)


def explained(
    config: ModelConfig, execution: Execution, compared: bool, given: Any, batch: dict
) -> dict[str, jax.Array]:
    """What is predicted and from which words: `scores` [B, C] of the selected words alone, `selected` float32 [B, T], 1
    at their first tokens, `starts` [B, T], 1 where a word begins, `first` [B, T]. compared: also the scores of the
    `whole` text and of its `rest`. given: {"params", "kinds"}.
    """
    params, words = given["params"], words_of(given["kinds"], batch)
    a_BT, b_BT = selector(config, params, batch, execution)
    z_BT = (gates.likely_open(a_BT, b_BT) > 0.5).astype(jnp.float32)

    def scores(z_BT):
        return seen_through(config, params, batch, spread(words, z_BT), execution)

    found = {"scores": scores(z_BT), "selected": z_BT * words.starts_BT, "starts": words.starts_BT}
    found["first"] = words.first_BT
    return found | ({"whole": scores(jnp.ones_like(z_BT)), "rest": scores(1.0 - z_BT)} if compared else {})
