"""The attention kernel of TPUs (splash attention, in JAX's Pallas) behind the project's one description of attention.

It holds a block of scores at a time and leaves out blocks that a causal row or a window cannot reach. Each device runs
it on its rows, its heads and, under sequence parallelism, its part of the queries with the keys of the whole row.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from espalier.models.attention_backend import Backend, Use
from espalier.models.attention_spec import AttentionSpec, Places
from espalier.models.layers import zero_unless
from sharding.mesh import BATCH_AXES

LANES = 128
"""The kernel works on blocks of multiples of this many tokens."""
BLOCK = 512
"""Tokens of a block of queries or keys, where the row has so many."""


def splash_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    spec: AttentionSpec,
    places: Places,
    dropout_rate: float,
    dropout_key: jax.Array | None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """As `models.attention.attend`, for queries and keys at the same indices of a row and without dropout.

    interpret: run the kernel step by step, on any device.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    length, heads = q_BTNH.shape[1:3]
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {"sequence": 1, "tensor": 1} if mesh.empty else mesh.shape
    kernel = _kernel(spec, length, heads, sizes["tensor"], sizes["sequence"], interpret)

    # Heads before tokens; the scale goes into the queries, as in the reference.
    q_BNTH = (q_BTNH * jnp.asarray(spec.scale, q_BTNH.dtype)).transpose(0, 2, 1, 3)
    k_BKTH, v_BKTH = k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3)

    def run(kernel, q, k, v, q_segments, k_segments):
        return jax.vmap(kernel)(q, k, v, SegmentIds(q_segments, k_segments))

    inputs = (q_BNTH, k_BKTH, v_BKTH, places.q_segments_BT, places.k_segments_BS)
    if mesh.empty or mesh.size == 1:
        out_BNTH = run(kernel, *inputs)
    else:
        part, whole = PartitionSpec(BATCH_AXES, "sequence"), PartitionSpec(BATCH_AXES)
        queries = PartitionSpec(BATCH_AXES, "tensor", "sequence")
        keys = PartitionSpec(BATCH_AXES, "tensor")
        # Where every query sees the whole row, one table serves all parts of it.
        masks = PartitionSpec("tensor", None if _sees_all(spec, length) else "sequence")
        kernel_spec = kernel.manual_sharding_spec(jax.sharding.NamedSharding(mesh, masks))
        specs = (kernel_spec, queries, keys, keys, part, whole)
        out_BNTH = jax.shard_map(run, in_specs=specs, out_specs=queries, check_vma=False)(kernel, *inputs)
    # Padding sees padding in the kernel.
    return zero_unless((places.q_segments_BT != 0)[:, :, None, None], out_BNTH.transpose(0, 2, 1, 3))


def block_size(length: int, most: int = BLOCK) -> int:
    """The largest multiple of LANES up to `most` that divides the row."""
    return next(size for size in range(min(most, length), 0, -LANES) if length % size == 0)


def _refuses(use: Use) -> str | None:
    if use.mixed:
        return "causal rows and others are in one batch, and splash attention has one mask for all rows"
    if use.keys != "row":
        return "splash attention reads no cache" if use.keys == "cache" else "splash attention sees its own row alone"
    if use.dropout:
        return (
            f"attention_dropout={use.dropout:g} drops probabilities, which the kernel never holds (0 lets it be used)"
        )
    if use.length % (LANES * use.parts):
        return f"a row of {use.length} tokens on {use.parts} devices is not a multiple of {LANES} on each"
    return None


def _keeps(use: Use) -> int:
    # Queries, keys, values and the result, heads last, where memory comes in whole lanes; a float32 logarithm a head.
    queries, lanes = use.length // use.parts, -(-use.head_size // LANES) * LANES
    vectors = 2 * queries * use.heads + 2 * use.length * use.kv_heads
    return use.itemsize * lanes * vectors + 4 * queries * use.heads


def _sees_all(spec: AttentionSpec, length: int) -> bool:
    right = 0 if spec.causal else spec.right
    return all(reach is None or reach >= length - 1 for reach in (spec.left, right))


@functools.lru_cache(maxsize=32)
def _kernel(spec: AttentionSpec, length: int, heads: int, head_shards: int, query_shards: int, interpret: bool):
    """The kernel for rows of `length` tokens, with tables of the blocks to visit; they depend on nothing else."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block, part = block_size(length), block_size(length // query_shards)
    shape = (length, length)
    right = 0 if spec.causal else spec.right
    if _sees_all(spec, length):
        # JAX cannot join the tables of several parts if no block of them is seen in part.
        mask, query_shards = splash.FullMask((length // query_shards, length)), 1
    elif spec.left is None and right == 0:
        mask = splash.CausalMask(shape, shard_count=query_shards)
    else:
        mask = splash.LocalMask(shape, (spec.left, right), offset=0, shard_count=query_shards)
    sizes = splash.BlockSizes(
        block_q=part,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=part,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=part,
        block_kv_dq=block,
    )

    def make():
        return splash.make_splash_mha(
            splash.MultiHeadMask([mask] * heads),
            block_sizes=sizes,
            head_shards=head_shards,
            q_seq_shards=query_shards,
            attn_logits_soft_cap=spec.softcap,
            interpret=interpret,
        )

    # Its tables are put on a device as it is made. In a thread of its own there is neither the trace that needs
    # it first (others use it too) nor the mesh of that one, whose devices may not be here.
    with ThreadPoolExecutor(1) as elsewhere:
        return jax.tree.map(np.asarray, elsewhere.submit(make).result())


SPLASH = Backend(
    name="splash",
    platforms=("tpu",),
    reason="the TPU's own kernel: no scores in memory, blocks beyond a window or a causal row left out",
    fused=True,
    run=splash_attention,
    refuses=_refuses,
    keeps=_keeps,
)
