"""An attention kernel for GPUs, compiled by Triton: packed rows, windows, softcap, grouped heads and dropout.

The kernels are models.attention_triton_kernels. JAX ships one (jax.experimental.pallas.ops.gpu.attention); that knows
no windows, softcap, grouped heads or dropout, and visits all blocks of a packed row.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from espalier.models.attention_backend import Backend, Use
from espalier.models.attention_spec import AttentionSpec, Places
from espalier.models.attention_triton_kernels import How, Tile, Tiles, attention
from sharding.mesh import BATCH_AXES

HEAD_SIZES = 256
"""The largest head of which a block of queries and keys fits a GPU's shared memory."""

TILES = {
    64: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 3)),
    128: Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    256: Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
}
"""By head size. Of those that were compiled for Hopper, the largest that keep their sums in registers (but for 50 bytes
a thread with heads of 256 or a softcap), within the 99 KB of shared memory of the smallest of these GPUs (8.6, 8.9)."""


def triton_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    spec: AttentionSpec,
    places: Places,
    dropout_rate: float,
    dropout_key: jax.Array | None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """As `models.attention.attend`. interpret: run the kernel step by step, on any device."""
    batch = q_BTNH.shape[0]
    q_index_BT = jnp.broadcast_to(places.q_index_BT, (batch, q_BTNH.shape[1]))
    k_index_BS = jnp.broadcast_to(places.k_index_BS, (batch, k_BSKH.shape[1]))
    places = Places(places.q_segments_BT, places.k_segments_BS, q_index_BT, k_index_BS)
    rate, seeds_BN = 0.0, None
    if dropout_key is not None and dropout_rate > 0:
        rate, seeds_BN = dropout_rate, jax.random.bits(dropout_key, (batch, q_BTNH.shape[2]), jnp.uint32)
    run = functools.partial(_padded, spec, rate, interpret)
    inputs = (q_BTNH, k_BSKH, v_BSKH, places, seeds_BN)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run(*inputs)
    part, whole = PartitionSpec(BATCH_AXES, "sequence"), PartitionSpec(BATCH_AXES)
    queries, keys = PartitionSpec(BATCH_AXES, "sequence", "tensor"), PartitionSpec(BATCH_AXES, None, "tensor")
    specs = (queries, keys, keys, Places(part, whole, part, whole), PartitionSpec(BATCH_AXES, "tensor"))  # pyright: ignore
    return jax.shard_map(run, in_specs=specs, out_specs=queries, check_vma=False)(*inputs)


def _padded(spec: AttentionSpec, rate: float, interpret: bool, q_BTNH, k_BSKH, v_BSKH, places: Places, seeds_BN):
    """The kernel on rows filled up to whole blocks, and heads to a power of two."""
    length, size = q_BTNH.shape[1], q_BTNH.shape[3]
    head = max(16, 1 << (size - 1).bit_length())
    tiles = TILES[max(64, head)]

    def filled(x: jax.Array, block: int) -> jax.Array:
        after = (0, -x.shape[1] % block, 0, head - size)[: x.ndim]
        return jnp.pad(x, [(0, count) for count in after]) if any(after) else x

    queries, keys = (_multiple([tile.own for tile in tiles], rows) for rows in (length, k_BSKH.shape[1]))
    q_segments, k_segments, q_index, k_index = places
    places = Places(
        filled(q_segments, queries), filled(k_segments, keys), filled(q_index, queries), filled(k_index, keys)
    )
    how = How(spec, rate, tiles, interpret)
    out: Any = attention(how, filled(q_BTNH, queries), filled(k_BSKH, keys), filled(v_BSKH, keys), places, seeds_BN)
    return out[:, :length, :, :size]


def _multiple(sizes: list[int], length: int) -> int:
    """What a row must be a multiple of, so that blocks of these sizes divide it: less where the row is short."""
    return min(max(sizes), max(16, 1 << (length - 1).bit_length()))


def _refuses(use: Use) -> str | None:
    if use.capability is None or use.capability < 8:
        return "triton attention is for NVIDIA GPUs from compute capability 8.0 on"
    if use.keys == "cache":
        return "triton attention reads no cache"
    if use.mixed and use.dropout:
        return "triton attention drops by the index of a query, which is one and the same in rows that see both sides"
    if use.itemsize != 2:
        return f"triton attention multiplies in bfloat16, and not in {use.dtype}"
    if use.head_size > HEAD_SIZES:
        return f"heads of {use.head_size} do not fit the kernel, which holds up to {HEAD_SIZES}"
    return None


def _keeps(use: Use) -> int:
    # Queries, keys and values; a float32 logarithm of each query and head.
    queries = use.length // use.parts
    return (
        use.itemsize * use.head_size * (queries * use.heads + 2 * use.length * use.kv_heads) + 4 * queries * use.heads
    )


TRITON = Backend(
    name="triton",
    platforms=("gpu",),
    reason="a kernel for packed rows: no scores in memory, blocks between documents and beyond a window left out",
    fused=True,
    run=triton_attention,
    refuses=_refuses,
    keeps=_keeps,
)
