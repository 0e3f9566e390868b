"""What a query may see: a static `AttentionSpec`, and the `Places` of queries and keys.

Causal, bidirectional, windowed, packed, cached and cross-attention all take this form: a query sees a key iff both
carry the same non-zero segment id and the key's row index lies within the spec's reach of the query's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from espalier.models.config import LayerKind, ModelConfig


@dataclass(frozen=True)
class AttentionSpec:
    """Which keys a query reaches, by row index, and how scores are formed; known when the program is compiled."""

    causal: bool
    left: int | None
    """Keys reached before the query; None = all."""
    right: int | None
    """Keys reached after the query; None = all. Causal overrides it with none."""
    scale: float
    softcap: float | None = None
    """Scores are squashed to ±softcap by tanh (Gemma 2)."""


class Places(NamedTuple):
    """Where queries and keys stand: segment ids (0 = padding) and row indices, int32.

    The indices may have one row for the whole batch, [1, T]. A query need not stand where its token does: `of_rows`.
    """

    q_segments_BT: jax.Array
    k_segments_BS: jax.Array
    q_index_BT: jax.Array
    k_index_BS: jax.Array

    @classmethod
    def of_rows(cls, segments_BT: jax.Array, bidirectional_B: jax.Array | None = None) -> Places:
        """Queries and keys of the same rows, each token at its own index.

        bidirectional_B: bool, rows of a causal model that see both sides. Their queries stand at the end of the row,
        from where all of it lies behind; this is for specs without a window.
        """
        index_1T = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)[None, :]
        q_index = index_1T
        if bidirectional_B is not None:
            q_index = jnp.where(bidirectional_B[:, None], jnp.int32(segments_BT.shape[1] - 1), index_1T)
        return cls(segments_BT, segments_BT, q_index, index_1T)


def spec_for(config: ModelConfig, kind: LayerKind) -> AttentionSpec:
    """The spec of a layer: local ones see ±sliding_window/2, or when causal the last sliding_window tokens."""
    left = right = None
    if kind == "local":
        assert config.sliding_window is not None
        left = config.sliding_window - 1 if config.causal else config.sliding_window // 2
        right = None if config.causal else config.sliding_window // 2
    scale = config.attention_divisor**-0.5
    return AttentionSpec(config.causal, left, right, scale, config.attn_logit_softcapping)


def visible(spec: AttentionSpec, places: Places) -> jax.Array:
    """Boolean [B, T, S]: which keys each query may see."""
    segments = places.q_segments_BT[:, :, None]
    seen = (segments == places.k_segments_BS[:, None, :]) & (segments != 0)
    ahead = places.k_index_BS[:, None, :] - places.q_index_BT[:, :, None]
    if spec.left is not None:
        seen &= ahead >= -spec.left
    right = 0 if spec.causal else spec.right
    return seen if right is None else seen & (ahead <= right)
