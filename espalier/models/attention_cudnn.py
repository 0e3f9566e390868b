"""cuDNN's fused attention on NVIDIA GPUs, for plain rows: one document from the first place on, padding behind it.

It knows how long each row is and nothing else of documents. Packed rows would attend across them without an error, so
that it refuses all rows that were not promised to be plain (`Use.packed`). It is never given a boolean mask: that
becomes an additive bias, of which JAX up to 0.11 works out the whole gradient.

cuDNN has a layout for packed rows, by offsets. In JAX it is a private function, for Hopper and later, which wants the
greatest number of documents in a row as a constant: data/packing.py promises none. models/attention_triton.py serves
these rows.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from espalier.models.attention_backend import Backend, Use
from espalier.models.attention_spec import AttentionSpec, Places
from espalier.models.layers import zero_unless
from sharding.mesh import BATCH_AXES


def cudnn_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    spec: AttentionSpec,
    places: Places,
    dropout_rate: float,
    dropout_key: jax.Array | None,
) -> jax.Array:
    """As `models.attention.attend`, for queries and keys of the same plain rows and without dropout."""
    run = functools.partial(_attention, spec)
    mesh = jax.sharding.get_abstract_mesh()
    inputs = (q_BTNH, k_BTKH, v_BTKH, places.k_segments_BS)
    if mesh.empty or mesh.size == 1:
        return run(*inputs)
    rows, heads = PartitionSpec(BATCH_AXES), PartitionSpec(BATCH_AXES, None, "tensor")
    return jax.shard_map(run, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)(*inputs)


def _attention(spec: AttentionSpec, q_BTNH, k_BTKH, v_BTKH, segments_BT) -> jax.Array:
    real_BT = segments_BT != 0
    # A row without a token counts as one of padding: the softmax of nothing is NaN.
    lengths_B = jnp.maximum(real_BT.sum(axis=1, dtype=jnp.int32), 1)
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        scale=spec.scale,
        is_causal=spec.causal,
        query_seq_lengths=lengths_B,
        key_value_seq_lengths=lengths_B,
        local_window_size=None if spec.left is None else (spec.left, 0),
        implementation="cudnn",
    )
    return zero_unless(real_BT[:, :, None, None], out_BTNH)


def _refuses(use: Use) -> str | None:
    largest = 256 if use.capability and use.capability >= 9 else 128
    if use.capability is None or use.capability < 8:
        return "cuDNN's attention is for NVIDIA GPUs from compute capability 8.0 on"
    if use.mixed:
        return "causal rows and others are in one batch, and cuDNN's attention has one mask for all rows"
    if use.packed:
        return "a row may hold several documents, and in cuDNN's attention they would see each other"
    if use.keys != "row" or use.parts > 1:
        return "cuDNN's attention is used for whole rows alone"
    if use.dropout:
        return f"attention_dropout={use.dropout:g}: cuDNN would drop the same probabilities in each step"
    if use.itemsize != 2:
        return f"cuDNN's attention multiplies in bfloat16, and not in {use.dtype}"
    if use.head_size % 8 or use.head_size > largest:
        return f"heads of {use.head_size}; cuDNN's are multiples of 8 up to {largest}"
    if any(spec.softcap for spec in use.specs):
        return "cuDNN's attention has no softcap"
    if any(not spec.causal and (spec.left is not None or spec.right is not None) for spec in use.specs):
        return "cuDNN's attention has windows for causal rows alone"
    return None


def _keeps(use: Use) -> int:
    # Queries, keys and values; a float32 logarithm of each query and head.
    vectors = use.length * (use.heads + 2 * use.kv_heads)
    return use.itemsize * use.head_size * vectors + 4 * use.length * use.heads


CUDNN = Backend(
    name="cudnn",
    platforms=("gpu",),
    reason="cuDNN's kernel, for rows of one document each: no scores in memory",
    fused=True,
    run=cudnn_attention,
    refuses=_refuses,
    keeps=_keeps,
)
