"""The reference attention in plain XLA: scores for all pairs, softmax in float32, on any device."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from espalier.models.attention_backend import Backend, Use
from espalier.models.attention_spec import visible
from espalier.models.layers import dropout, float32_einsum, zero_unless
from espalier.models.taps import Tap

PROBABILITIES = "attention.probabilities"


def run_xla(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    spec,
    places,
    dropout_rate,
    dropout_key,
    tap: Tap | None = None,
    bias_BNTS: jax.Array | None = None,
):
    batch, length, heads, size = q_BTNH.shape
    groups = heads // k_BSKH.shape[2]
    # Heads before tokens: each head's product is then one contiguous matrix product, which XLA:CPU needs for speed.
    q_BKGTH = (q_BTNH * spec.scale).reshape(batch, length, -1, groups, size).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)

    scores = float32_einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, k_BKSH.dtype)
    if spec.softcap is not None:
        scores = spec.softcap * jnp.tanh(scores / spec.softcap)
    if bias_BNTS is not None:
        scores = scores + bias_BNTS.reshape(bias_BNTS.shape[0], -1, groups, *bias_BNTS.shape[2:])
    seen_BTS = visible(spec, places)
    probabilities = _softmax(scores, seen_BTS[:, None, None])
    if tap is not None:
        flat_BNTS = probabilities.reshape(batch, heads, length, -1)
        # Of a query that sees nothing all are 0.
        flat_BNTS = tap(PROBABILITIES, zero_unless(seen_BTS.any(-1)[:, None, :, None], flat_BNTS))
        probabilities = flat_BNTS.reshape(probabilities.shape)
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


def _keeps(use: Use) -> int:
    queries = use.length // use.parts
    linear = use.itemsize * use.head_size * (queries * use.heads + 2 * use.length * use.kv_heads)
    # The float32 probabilities; as multiplied with the values, if that is another array; what dropout kept; the
    # slope of tanh, which is two.
    pair = 4 + (use.itemsize if use.dropout or use.itemsize != 4 else 0) + (1 if use.dropout else 0)
    pair += 8 if any(spec.softcap for spec in use.specs) else 0
    return linear + use.heads * queries * use.length * pair


XLA = Backend(
    name="xla",
    platforms=(),
    reason="every score is held in memory; there is no attention kernel for this device here",
    fused=False,
    run=run_xla,
    refuses=lambda use: None,
    keeps=_keeps,
    biased=True,
)
