"""Losses on where attention heads look, of the probabilities that a tap reads in the pass of the objective itself.

Entropy of a head at token t: H = -Σ_s p_ts log p_ts, in nats; its mean over tokens, heads and layers. Below 0 its
weight spreads what is looked at (Attanasio et al. 2022, "Entropy-based attention regularization frees unintended bias
mitigation from lists"); above 0 it makes heads sparse.

Supervision: KL(r ‖ a) = Σ_s r_s log(r_s / a_s), where r is the share of each token in the marked ones and a the mean
look of heads and layers from where the classifier reads (Zhong et al. 2019, "Fine-grained sentiment analysis with
faithful attention"; Liu et al. 2016 for translation).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from espalier.models.attention_settings import AttentionTerms
from espalier.models.attention_xla import PROBABILITIES
from espalier.models.config import Execution, ModelConfig
from espalier.models.taps import Taps
from espalier.models.transformer import apply

LEAST = 1e-12
"""Probabilities below count as this in logarithms: gradients stay finite."""
MARKED = "marked"
"""Name of the weights of tokens in a batch, float32 [B, T]: above 0 where people marked the word."""


def states(
    terms: AttentionTerms | None,
    model: ModelConfig,
    params: Any,
    batch: dict,
    execution: Execution,
    key: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """(final states x_BTD, probabilities of the heads float32 [L, B, N, T, S] of the terms' layers).

    terms: None = nothing is read of the heads, and the program is that of `apply`.
    """
    if terms is None:
        return apply(model, params, batch, execution=execution, key=key), None
    x_BTD, seen = apply(model, params, batch, execution=execution, key=key, taps=Taps(read=(PROBABILITIES,)))
    p_LBNTS = seen[PROBABILITIES]
    return x_BTD, p_LBNTS[jnp.array(terms.layers)] if terms.layers else p_LBNTS


def entropy(p_LBNTS: jax.Array, segment_ids_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(Σ over real tokens of the mean entropy of layers and heads, in nats; how many tokens they are)."""
    logs = jnp.log(jnp.maximum(p_LBNTS, LEAST))
    nats_BT = -jnp.sum(p_LBNTS * logs, axis=-1).mean((0, 2))
    real_BT = (segment_ids_BT > 0).astype(jnp.float32)
    return jnp.sum(nats_BT * real_BT), jnp.sum(real_BT)


def looks(model: ModelConfig, p_LBNTS: jax.Array, segment_ids_BT: jax.Array, examples: int) -> jax.Array:
    """Where the heads look on the average from where the classifier reads, float32 [B, E, S] of E examples a row.

    It reads at the first token, the last one (causal), or the mean of all (models.heads.SequenceClassifier).
    """
    own_BET = _own(segment_ids_BT, examples)
    if model.causal:
        from_BET = jnp.where(jnp.cumsum(own_BET[:, :, ::-1], axis=2)[:, :, ::-1] == 1, own_BET, 0.0)
    elif model.classifier_pooling == "cls":
        from_BET = jnp.where(jnp.cumsum(own_BET, axis=2) == 1, own_BET, 0.0)
    else:
        from_BET = own_BET / jnp.maximum(own_BET.sum(2, keepdims=True), 1.0)
    return jnp.einsum("BET,BTS->BES", from_BET, p_LBNTS.mean((0, 2)))


def marked_shares(marked_BT: jax.Array, segment_ids_BT: jax.Array, examples: int) -> tuple[jax.Array, jax.Array]:
    """(share of each token in what is marked of its example, float32 [B, E, S]; 1 where anything is, [B, E])."""
    weights_BES = _own(segment_ids_BT, examples) * marked_BT[:, None]
    total_BE1 = weights_BES.sum(2, keepdims=True)
    return weights_BES / jnp.where(total_BE1 > 0, total_BE1, 1.0), (total_BE1[:, :, 0] > 0).astype(jnp.float32)


def divergence(r_BES: jax.Array, a_BES: jax.Array) -> jax.Array:
    """KL(r ‖ a), in nats, [B, E]."""
    logs = jnp.log(jnp.maximum(r_BES, LEAST)) - jnp.log(jnp.maximum(a_BES, LEAST))
    return jnp.sum(r_BES * logs, axis=2)


def _own(segment_ids_BT: jax.Array, examples: int) -> jax.Array:
    """1 where a token is of the example, float32 [B, E, T]."""
    return (segment_ids_BT[:, None] == jnp.arange(1, examples + 1)[:, None]).astype(jnp.float32)
