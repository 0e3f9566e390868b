"""Heads that continue what was there before: the induction score on repeated random tokens (Olsson et al. 2022)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from espalier.data.tokenizer import special_ids, vocabulary_size
from espalier.errors import UserError
from espalier.models.config import Execution, ModelConfig
from espalier.models.heads import causal_lm_head
from espalier.models.taps import Taps
from espalier.models.transformer import apply
from espalier.models.vocabulary import token_logprobs
from espalier.predict.loaded import LoadedModel

ROWS, REPEATED = 16, 50
"""Rows, and tokens that each says twice."""
PROBABILITIES = "attention.probabilities"


class Induction(NamedTuple):
    """Of a model of L layers with N heads."""

    score_LN: np.ndarray
    """Mean probability that a token of the second half gives to the one behind its first occurrence."""
    previous_LN: np.ndarray
    """Mean probability that a token gives to the one before it: such heads feed the others."""
    first: float
    """Loss on the first half, nats a token: random tokens, of which nothing can be known."""
    second: float
    """And on the second, all but its first token: what an induction head makes small."""


def repeated_tokens(model: LoadedModel, seed: int = 0) -> np.ndarray:
    """int32 [ROWS, 1 + 2 × REPEATED]: the beginning of a text, random tokens, and the same again.

    UserError where the model is no decoder, or has no room.
    """
    if model.head != "causal_lm":
        raise UserError(f"induction is what decoders learn, and this model has the head {model.head!r}; name a clm run")
    specials = special_ids(model.tokenizer, need=("bos",))
    if model.config.max_length is not None and model.config.max_length < 1 + 2 * REPEATED:
        raise UserError(f"the model reads {model.config.max_length} tokens, and {1 + 2 * REPEATED} are needed")
    ordinary = np.setdiff1d(np.arange(vocabulary_size(model.tokenizer)), [*specials.all])
    random = np.random.default_rng(seed)
    # Without repetition within a half, so that each token has one earlier occurrence.
    drawn = np.stack([random.choice(ordinary, REPEATED, replace=len(ordinary) < REPEATED) for _ in range(ROWS)])
    return np.concatenate([np.full((ROWS, 1), specials.bos), drawn, drawn], axis=1).astype(np.int32)


def induction(model: LoadedModel, params: Any = None) -> Induction:
    """params: of another checkpoint of the same run; default: the model's own."""
    ids = repeated_tokens(model)
    found = _read(model.config, model.execution, model.params if params is None else params, ids)
    score_LN, previous_LN, nats_T = (np.asarray(part, np.float64) for part in found)
    return Induction(score_LN, previous_LN, float(nats_T[:REPEATED].mean()), float(nats_T[REPEATED + 1 :].mean()))


def _read(config: ModelConfig, execution: Execution, params: Any, ids_BT: np.ndarray) -> Any:
    return _compiled(config, execution, params, jnp.asarray(ids_BT))


def _scores(config: ModelConfig, execution: Execution, params: Any, ids_BT: jax.Array) -> Any:
    x_BTD, seen = apply(config, params, {"input_ids": ids_BT}, execution=execution, taps=Taps(read=(PROBABILITIES,)))
    alpha_LBNTS = seen[PROBABILITIES]
    # Query t stands REPEATED tokens behind its first occurrence, and looks at what followed that.
    behind = jnp.diagonal(alpha_LBNTS, offset=1 - REPEATED, axis1=3, axis2=4)
    score_LN = behind[..., 2:].mean((1, 3))
    previous_LN = jnp.diagonal(alpha_LBNTS, offset=-1, axis1=3, axis2=4).mean((1, 3))
    features, table, bias = causal_lm_head(config, params, x_BTD[:, :-1], execution)
    size, cap = config.vocab_size, config.final_logit_softcapping
    logprobs_BT, _ = token_logprobs(features, table, bias, ids_BT[:, 1:], vocab_size=size, softcap=cap)
    return score_LN, previous_LN, -logprobs_BT.mean(0)


_compiled = jax.jit(_scores, static_argnums=(0, 1))
