"""Attention: one description of what may be seen, and the backends that carry it out.

Causal, bidirectional, windowed, packed and cached attention all take the same form: a static `AttentionSpec` plus
segment ids and row indices of queries and keys. A query sees a key iff both carry the same non-zero segment id and
the key's row index lies within the spec's reach of the query's. A query that sees nothing yields zero and
passes zero gradient. A backend honours all of this or is never chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from espalier.errors import UserError
from espalier.models.config import LayerKind, ModelConfig
from espalier.models.layers import dropout, float32_einsum, zero_unless
from espalier.models.splash import splash_attention, splash_refusal
from sharding.mesh import mesh_platform


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


def spec_for(config: ModelConfig, kind: LayerKind) -> AttentionSpec:
    """The spec of a layer: local ones see ±sliding_window/2, or when causal the last sliding_window tokens."""
    left = right = None
    if kind == "local":
        assert config.sliding_window is not None
        left = config.sliding_window - 1 if config.causal else config.sliding_window // 2
        right = None if config.causal else config.sliding_window // 2
    scale = config.attention_divisor**-0.5
    return AttentionSpec(config.causal, left, right, scale, config.attn_logit_softcapping)


def visible(spec: AttentionSpec, q_segments_BT, k_segments_BS, q_index_BT, k_index_BS) -> jax.Array:
    """Boolean [B, T, S]: which keys each query may see."""
    segments = q_segments_BT[:, :, None]
    seen = (segments == k_segments_BS[:, None, :]) & (segments != 0)
    ahead = k_index_BS[:, None, :] - q_index_BT[:, :, None]
    if spec.left is not None:
        seen &= ahead >= -spec.left
    right = 0 if spec.causal else spec.right
    return seen if right is None else seen & (ahead <= right)


def attend(
    spec: AttentionSpec,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_segments_BT: jax.Array,
    k_segments_BS: jax.Array,
    q_index_BT: jax.Array,
    k_index_BS: jax.Array,
    *,
    backend: str = "xla",
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention [B, T, N, H] with N / K query heads to each key/value head (Ainslie et al. 2023).

    Dropout acts on the probabilities, and only with a key. Query head n uses key/value head n // (N / K).
    """
    boundaries = (q_segments_BT, k_segments_BS, q_index_BT, k_index_BS)
    return BACKENDS[backend](spec, q_BTNH, k_BSKH, v_BSKH, *boundaries, dropout_rate, dropout_key)


def choose_backend(
    requested: str, config: ModelConfig, length: int, *, dropping: bool, cached: bool
) -> tuple[str, str]:
    """(name, reason) of the backend to use for `Execution.attention` on rows of `length` tokens.

    dropping: whether attention probabilities are dropped out; cached: whether keys come from a cache. UserError where
    the one that was asked for cannot do it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else mesh.shape["sequence"]
    reason = splash_refusal(config, length, mesh_platform(), parts=parts, dropping=dropping, cached=cached)
    if requested == "splash" and reason:
        raise UserError(f"execution.attention=splash: {reason}; try --execution.attention auto")
    if requested != "auto":
        return requested, "as asked"
    if reason:
        return "xla", reason
    return "splash", "the TPU's own kernel: no scores in memory, blocks beyond a window or a causal row left out"


def _xla(spec, q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS, q_index_BT, k_index_BS, dropout_rate, dropout_key):
    """The reference: scores for all pairs, softmax in float32."""
    batch, length, heads, size = q_BTNH.shape
    groups = heads // k_BSKH.shape[2]
    # Heads before tokens: each head's product is then one contiguous matrix product, which XLA:CPU needs for speed.
    q_BKGTH = (q_BTNH * spec.scale).reshape(batch, length, -1, groups, size).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)

    scores = float32_einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, k_BKSH.dtype)
    if spec.softcap is not None:
        scores = spec.softcap * jnp.tanh(scores / spec.softcap)
    seen_BTS = visible(spec, q_segments_BT, k_segments_BS, q_index_BT, k_index_BS)
    probabilities = _softmax(scores, seen_BTS[:, None, None])
    probabilities = dropout(probabilities, dropout_rate, dropout_key).astype(v_BSKH.dtype)

    out = jnp.einsum("BKGTS,BKSH->BKGTH", probabilities, v_BKSH).transpose(0, 3, 1, 2, 4)
    return zero_unless(seen_BTS.any(-1)[:, :, None, None], out.reshape(batch, length, heads, size))


@jax.custom_jvp
def _softmax(scores: jax.Array, seen: jax.Array) -> jax.Array:
    """Probabilities over the last axis where `seen`; they alone are kept for the backward pass."""
    # A large finite number: -inf would turn a row that sees nothing into NaN.
    return jax.nn.softmax(jnp.where(seen, scores, jnp.float32(-1e30)), axis=-1)


@_softmax.defjvp
def _softmax_jvp(inputs, tangents):
    p, tangent = _softmax(*inputs), tangents[0]
    # What is not seen has p = 0.
    return p, p * (tangent - (p * tangent).sum(-1, keepdims=True))


def _splash(spec, q, k, v, q_segments_BT, k_segments_BS, q_index_BT, k_index_BS, dropout_rate, dropout_key):
    return splash_attention(spec, q, k, v, q_segments_BT, k_segments_BS)


def _splash_interpreted(spec, q, k, v, q_segments_BT, k_segments_BS, q_index_BT, k_index_BS, rate, dropout_key):
    return splash_attention(spec, q, k, v, q_segments_BT, k_segments_BS, interpret=True)


BACKENDS: dict[str, Callable[..., jax.Array]] = {
    "xla": _xla,
    "splash": _splash,
    # The same kernel step by step on any device: for tests.
    "splash_interpreted": _splash_interpreted,
}
