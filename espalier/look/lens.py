"""What the model would say if it ended after each layer: the logit lens (nostalgebraist 2020), or a tuned one."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from espalier.data.tokenizer import special_ids
from espalier.look.asked import Asked, of_target
from espalier.look.tuned_lens import TunedLens, translated
from espalier.models.heads import LANGUAGE_MODELS
from espalier.models.logits import of_states
from espalier.models.taps import Taps
from espalier.models.transformer import apply, normed
from espalier.predict.loaded import LoadedModel

CANDIDATES = 5
"""Words of a layer at a place."""
PLACES = 64
"""Tokens whose words are found by one program."""


class Lens(NamedTuple):
    """Of a model of L layers, after 0 (the embeddings) to L of them, E = L + 1."""

    chance_E: np.ndarray
    """The probability of the target."""
    places_P: np.ndarray
    """The tokens at which words are read: the masks, or all; [0] of a model that gives no words."""
    ids_EPK: np.ndarray
    """The CANDIDATES most probable tokens there."""
    chances_EPK: np.ndarray
    """Their probabilities."""
    final_EP: np.ndarray
    """The probability of the token that is the most probable in the end."""
    divergence_EP: np.ndarray
    """KL(what is said in the end ‖ what is said here), nats."""
    tuned: bool
    """Whether the layers are read by a tuned lens."""


def lens(model: LoadedModel, asked: Asked, tuned: TunedLens | None = None) -> Lens:
    """One pass, whose stream is read between the layers, and given to the final norm and the head.

    tuned: maps each layer's stream before.
    """
    streams_ETD = between(model, asked.batch, tuned)[:, 0]
    target = jax.jit(lambda params, x_TD: of_target(model, asked, params, x_TD[None])[1])
    chance_E = np.array([float(target(model.params, x_TD)) for x_TD in streams_ETD])
    places_P = _places(model, asked)
    words = _words(model, streams_ETD, places_P)
    return Lens(chance_E, places_P, *words, tuned=tuned is not None)


def between(model: LoadedModel, batch: dict[str, Any], tuned: TunedLens | None = None) -> jax.Array:
    """The stream after 0, 1, … L layers, as the heads take it, [L + 1, B, T, D]."""
    read = Taps(read=("stream",))
    end_BTD, seen = apply(model.config, model.params, dict(batch), execution=model.execution, taps=read)
    before_LBTD = jnp.stack(
        [
            normed(model.config, model.params, translated(tuned, layer, x_BTD))
            for layer, x_BTD in enumerate(seen["stream"])
        ]
    )
    return jnp.concatenate([before_LBTD, end_BTD[None]])


def _places(model: LoadedModel, asked: Asked) -> np.ndarray:
    if model.head == "masked_lm":
        return np.flatnonzero(asked.batch["input_ids"][0] == special_ids(model.tokenizer).mask)
    return np.arange(len(asked.tokens) if model.head in LANGUAGE_MODELS else 0)


def _words(model: LoadedModel, streams_ETD: jax.Array, places_P: np.ndarray) -> tuple[np.ndarray, ...]:
    """ids_EPK, chances_EPK, final_EP and divergence_EP."""
    layers, count = len(streams_ETD), min(CANDIDATES, model.config.vocab_size)
    if not len(places_P):
        empty = np.zeros((layers, 0))
        return np.zeros((layers, 0, count), np.int32), np.zeros((layers, 0, count)), empty, empty

    @jax.jit
    def logprobs(params: Any, x_PD: jax.Array) -> jax.Array:
        segments_1P = jnp.ones((1, len(x_PD)), jnp.int32)
        logits_1PV = of_states(model.config, model.head, params, x_PD[None], segments_1P, model.execution)
        return jax.nn.log_softmax(logits_1PV[0], axis=-1)

    @partial(jax.jit, static_argnums=2)
    def compared(end_PV: jax.Array, here_PV: jax.Array, count: int):
        best, ids = jax.lax.top_k(here_PV, count)
        final = jnp.take_along_axis(here_PV, end_PV.argmax(-1)[:, None], axis=-1)[:, 0]
        return ids, jnp.exp(best), jnp.exp(final), (jnp.exp(end_PV) * (end_PV - here_PV)).sum(-1)

    parts = []
    for first in range(0, len(places_P), PLACES):
        some = places_P[first : first + PLACES]
        at = np.pad(some, (0, min(PLACES, len(places_P)) - len(some)), mode="edge")
        end_PV = logprobs(model.params, streams_ETD[-1, at])
        found = [compared(end_PV, logprobs(model.params, x_TD[at]), count) for x_TD in streams_ETD]
        parts.append([np.stack([np.asarray(one)[: len(some)] for one in kind]) for kind in zip(*found, strict=True)])
    ids, *others = (np.concatenate(kind, axis=1) for kind in zip(*parts, strict=True))
    return ids, *(np.asarray(other, np.float64) for other in others)
