"""An attention kernel for GPUs in Pallas, compiled by Triton: packed rows, windows, softcap and grouped heads.

FlashAttention-2 (Dao 2023): a block of scores at a time, and a backward pass that works them out again from the
logarithm of each query's sum. Which blocks anyone may see is read from the segment ids and row indices beforehand:
blocks between documents, beyond a window or after a causal query are never visited, and what is seen whole is not
compared token by token. Scores are in base 2, where the exponential is one instruction.

JAX ships such a kernel (jax.experimental.pallas.ops.gpu.attention); it knows no windows, softcap or grouped heads, and
visits all blocks of a packed row.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from espalier.models.attention_backend import Backend, Use
from espalier.models.attention_spec import AttentionSpec, Places
from sharding.mesh import BATCH_AXES

HEAD_SIZES = 256
"""The largest head of which a block of queries and keys fits a GPU's shared memory."""
NOTHING, HIDDEN = -1e30, -2e30
"""The greatest score of a query that has seen no key so far, and that of a key which it may not see: 2 to the power of
their difference is 0, as is that of HIDDEN and any score."""


class Tile(NamedTuple):
    """How a kernel is cut up."""

    own: int
    """Tokens that a program writes results for."""
    other: int
    """Tokens that it reads at a time."""
    warps: int
    stages: int
    """Steps that are loaded ahead."""


class Tiles(NamedTuple):
    forward: Tile
    queries: Tile
    """Gradients of queries; `own` are queries, as in the forward pass."""
    keys: Tile
    """Gradients of keys and values; `own` are keys."""


TILES = {
    64: Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 3)),
    128: Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    256: Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
}
"""By head size. Of those that were compiled for Hopper, the largest that keep their sums in registers (but for 40 bytes
with heads of 256), within the 99 KB of shared memory that the smallest of these GPUs has (8.6, 8.9, 12.0)."""


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
    """As `models.attention.attend`, without dropout. interpret: run the kernel step by step, on any device."""
    batch = q_BTNH.shape[0]
    q_index_BT = jnp.broadcast_to(places.q_index_BT, (batch, q_BTNH.shape[1]))
    k_index_BS = jnp.broadcast_to(places.k_index_BS, (batch, k_BSKH.shape[1]))
    places = Places(places.q_segments_BT, places.k_segments_BS, q_index_BT, k_index_BS)
    run = functools.partial(_padded, spec, interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run(q_BTNH, k_BSKH, v_BSKH, places)
    part, whole = PartitionSpec(BATCH_AXES, "sequence"), PartitionSpec(BATCH_AXES)
    queries, keys = PartitionSpec(BATCH_AXES, "sequence", "tensor"), PartitionSpec(BATCH_AXES, None, "tensor")
    specs = (queries, keys, keys, Places(part, whole, part, whole))  # pyright: ignore[reportArgumentType]
    return jax.shard_map(run, in_specs=specs, out_specs=queries, check_vma=False)(q_BTNH, k_BSKH, v_BSKH, places)


def _padded(spec: AttentionSpec, interpret: bool, q_BTNH, k_BSKH, v_BSKH, places: Places) -> jax.Array:
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
    out: Any = _attention(
        spec, tiles, interpret, filled(q_BTNH, queries), filled(k_BSKH, keys), filled(v_BSKH, keys), places
    )
    return out[:, :length, :, :size]


def _multiple(sizes: list[int], length: int) -> int:
    """What a row must be a multiple of, so that blocks of these sizes divide it: less where the row is short."""
    return min(max(sizes), max(16, 1 << (length - 1).bit_length()))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(spec: AttentionSpec, tiles: Tiles, interpret: bool, q_BTNH, k_BSKH, v_BSKH, places: Places) -> jax.Array:
    return _forward(spec, tiles, interpret, q_BTNH, k_BSKH, v_BSKH, places)[0]


def _forward(spec, tiles, interpret, q_BTNH, k_BSKH, v_BSKH, places):
    B, T, N, _ = q_BTNH.shape
    outs = {"q": [q_BTNH], "lse": [jax.ShapeDtypeStruct((B, N, T), jnp.float32)]}
    arrays = {"q": [q_BTNH], "k": [k_BSKH, v_BSKH]}
    out_BTNH, lse_BNT = _call(_forward_kernel, spec, tiles.forward, interpret, places, arrays, outs)
    return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, places, out_BTNH, lse_BNT)


def _backward(spec, tiles, interpret, kept, g_BTNH):
    q_BTNH, k_BSKH, v_BSKH, places, out_BTNH, lse_BNT = kept
    delta_BNT = jnp.einsum("BTNH,BTNH->BNT", out_BTNH, g_BTNH, preferred_element_type=jnp.float32)
    arrays = {"q": [q_BTNH, g_BTNH], "k": [k_BSKH, v_BSKH], "lse": [lse_BNT, delta_BNT]}
    call = functools.partial(_call, spec=spec, interpret=interpret, places=places, arrays=arrays)
    (dq_BTNH,) = call(_query_kernel, tile=tiles.queries, outs={"q": [q_BTNH]})
    dk_BSKH, dv_BSKH = call(_key_kernel, tile=tiles.keys, outs={"k": [k_BSKH, v_BSKH]})
    return dq_BTNH, dk_BSKH, dv_BSKH, None


_attention.defvjp(_forward, _backward)


def _call(kernel: Callable, spec: AttentionSpec, tile: Tile, interpret: bool, places: Places, arrays, outs) -> Any:
    """Runs a kernel, one program for each block of its own tokens, head and row.

    arrays, outs: by kind: "q" [B, T, N, H], "k" [B, S, K, H], "lse" [B, N, T]. A program gets its own block of tokens
    and the other side whole, in the order bounds, q, k, lse, places, outs.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    (B, T, N, H), (_, S, K, _) = arrays["q"][0].shape, arrays["k"][0].shape
    by_key, G = kernel is _key_kernel, N // K
    own, other = min(tile.own, S if by_key else T), min(tile.other, T if by_key else S)
    if by_key:
        blocks = {
            "q": pl.BlockSpec((None, T, G, H), lambda i, n, b: (b, 0, n, 0)),
            "k": pl.BlockSpec((None, own, None, H), lambda i, n, b: (b, i, n, 0)),
            "lse": pl.BlockSpec((None, G, T), lambda i, n, b: (b, n, 0)),
        }
    else:
        blocks = {
            "q": pl.BlockSpec((None, own, None, H), lambda i, n, b: (b, i, n, 0)),
            "k": pl.BlockSpec((None, S, None, H), lambda i, n, b: (b, 0, jax.lax.div(n, G), 0)),
            "lse": pl.BlockSpec((None, None, own), lambda i, n, b: (b, n, i)),
        }
    mine = pl.BlockSpec((None, own), lambda i, n, b: (b, i))
    theirs = pl.BlockSpec((None, T if by_key else S), lambda i, n, b: (b, 0))
    (q_places, k_places) = (theirs, mine) if by_key else (mine, theirs)
    bounds = _bounds(spec, places, *((other, own) if by_key else (own, other)), by_key)

    inputs = [array for kind in arrays for array in arrays[kind]]
    given = [blocks[kind] for kind in arrays for _ in arrays[kind]]
    return pl.pallas_call(
        functools.partial(kernel, spec, own, other),
        grid=((S if by_key else T) // own, K if by_key else N, B),
        in_specs=[
            pl.BlockSpec((None, None, 4), lambda i, n, b: (b, i, 0)),
            *given,
            q_places,
            k_places,
            q_places,
            k_places,
        ],
        out_specs=[blocks[kind] for kind in outs for _ in outs[kind]],
        out_shape=[jax.ShapeDtypeStruct(like.shape, like.dtype) for kind in outs for like in outs[kind]],
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name=f"attention{kernel.__name__}",
    )(bounds, *inputs, *places)


def _forward_kernel(spec, own, other, bounds_ref, q_ref, k_ref, v_ref, *rest):
    *places, out_ref, lse_ref = rest
    q = q_ref[...]

    def step(j, masked, carry):
        sum_BH, most_B, total_B = carry
        at = _slice(j, other)
        score, _ = _scores(spec, q, k_ref[at, :], _seen(spec, places, ..., at) if masked else None)
        new_most_B = jnp.maximum(most_B, score.max(axis=1))
        p, shrink_B = jnp.exp2(score - new_most_B[:, None]), jnp.exp2(most_B - new_most_B)
        v = v_ref[at, :]
        sum_BH = sum_BH * shrink_B[:, None] + _dot(p.astype(v.dtype), v)
        return sum_BH, new_most_B, total_B * shrink_B + p.sum(axis=1)

    none = jnp.zeros(own, jnp.float32)
    sum_BH, most_B, total_B = _visit(bounds_ref, step, (jnp.zeros(q.shape, jnp.float32), none + NOTHING, none))
    # A query that sees nothing has a total of 0, and yields 0.
    total_B = jnp.where(total_B == 0.0, 1.0, total_B)
    out_ref[...] = (sum_BH / total_B[:, None]).astype(out_ref.dtype)
    lse_ref[...] = most_B + jnp.log2(total_B)


def _query_kernel(spec, own, other, bounds_ref, q_ref, g_ref, k_ref, v_ref, lse_ref, delta_ref, *rest):
    *places, dq_ref = rest
    q, g, lse, delta = q_ref[...], g_ref[...], lse_ref[...][:, None], delta_ref[...][:, None]

    def step(j, masked, dq):
        at = _slice(j, other)
        k = k_ref[at, :]
        seen = _seen(spec, places, ..., at) if masked else None
        _, ds = _score_gradients(spec, q, k, g, v_ref[at, :], lse, delta, seen)
        return dq + _dot(ds.astype(k.dtype), k)

    dq_ref[...] = _visit(bounds_ref, step, jnp.zeros(q.shape, jnp.float32)).astype(dq_ref.dtype)


def _key_kernel(spec, own, other, bounds_ref, q_ref, g_ref, k_ref, v_ref, lse_ref, delta_ref, *rest):
    *places, dk_ref, dv_ref = rest
    k, v, groups = k_ref[...], v_ref[...], q_ref.shape[1]

    def head(n, sums):
        # Scores stand transposed, keys by queries: as both products take them.
        def step(j, masked, sums):
            at = _slice(j, other)
            q, g = q_ref[at, n, :], g_ref[at, n, :]
            seen = _seen(spec, places, at, ...).T if masked else None
            p, ds = _score_gradients(spec, k, q, v, g, lse_ref[n, at][None, :], delta_ref[n, at][None, :], seen)
            return sums[0] + _dot(ds.astype(q.dtype), q), sums[1] + _dot(p.astype(g.dtype), g)

        return _visit(bounds_ref, step, sums)

    sums = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(k.shape, jnp.float32))
    dk, dv = head(0, sums) if groups == 1 else jax.lax.fori_loop(0, groups, head, sums)
    dk_ref[...], dv_ref[...] = dk.astype(dk_ref.dtype), dv.astype(dv_ref.dtype)


def _slice(j, size: int):
    from jax.experimental import pallas as pl

    return pl.ds(j * size, size)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _scores(spec: AttentionSpec, q: jax.Array, k: jax.Array, seen: jax.Array | None) -> tuple[jax.Array, Any]:
    """(scores in base 2 of a block of queries and keys, their slope by q·k without its factor `scale`)."""
    score, slope = _dot(q, k.T), 1.0
    if spec.softcap is None:
        score *= spec.scale * math.log2(math.e)
    else:
        squashed = jnp.tanh(score * (spec.scale / spec.softcap))
        score, slope = squashed * (spec.softcap * math.log2(math.e)), 1.0 - squashed * squashed
    return (score if seen is None else jnp.where(seen, score, HIDDEN)), slope


def _score_gradients(spec, q, k, g, v, lse, delta, seen) -> tuple[jax.Array, jax.Array]:
    """(probabilities, gradient by q·k) of a block (Dao et al. 2022, appendix B.4); or of its transpose, k for q."""
    score, slope = _scores(spec, q, k, seen)
    p = jnp.exp2(score - lse)
    return p, p * (_dot(g, v.T) - delta) * (slope * spec.scale)


def _seen(spec: AttentionSpec, places, queries, keys) -> jax.Array:
    """As `models.attention_spec.visible`, of a block; queries, keys: its indices."""
    q_segments_ref, k_segments_ref, q_index_ref, k_index_ref = places
    q_segments, k_segments = q_segments_ref[queries][:, None], k_segments_ref[keys][None, :]
    seen = (q_segments == k_segments) & (q_segments != 0)
    right = 0 if spec.causal else spec.right
    if spec.left is None and right is None:
        return seen
    ahead = k_index_ref[keys][None, :] - q_index_ref[queries][:, None]
    if spec.left is not None:
        seen &= ahead >= -spec.left
    return seen if right is None else seen & (ahead <= right)


def _visit(bounds_ref, step: Callable, carry):
    """Folds `step(block, masked, carry)` over the blocks of a program, those that are seen whole unmasked."""
    first, first_whole, end_whole, end = (bounds_ref[i] for i in range(4))
    for begin, stop, masked in ((first, first_whole, True), (first_whole, end_whole, False), (end_whole, end, True)):
        carry = jax.lax.fori_loop(begin, stop, lambda j, carry, masked=masked: step(j, masked, carry), carry)
    return carry


def _bounds(spec: AttentionSpec, places: Places, q_block: int, k_block: int, by_key: bool) -> jax.Array:
    """For each block of queries (by_key: of keys) the blocks of the other side to visit: int32 [B, blocks, 4].

    The first, the first of a run that is seen whole, the end of that run, the end. What is visited holds all that may
    be seen, whatever the ids; for rows in which documents follow each other it holds nothing else.
    """
    q_low, q_high, q_one, q_first, q_last = _extent(places.q_segments_BT, places.q_index_BT, q_block)
    k_low, k_high, k_one, k_first, k_last = _extent(places.k_segments_BS, places.k_index_BS, k_block)
    q, k = (slice(None), slice(None), None), (slice(None), None, slice(None))
    some = (q_low[q] <= k_high[k]) & (k_low[k] <= q_high[q])
    whole = q_one[q] & k_one[k] & (q_low[q] == k_low[k])
    if spec.left is not None:
        some &= k_last[k] - q_first[q] >= -spec.left
        whole &= k_first[k] - q_last[q] >= -spec.left
    right = 0 if spec.causal else spec.right
    if right is not None:
        some &= k_first[k] - q_last[q] <= right
        whole &= k_last[k] - q_first[q] <= right
    if by_key:
        some, whole = some.swapaxes(1, 2), whole.swapaxes(1, 2)
    blocks = jnp.arange(some.shape[2], dtype=jnp.int32)
    count = jnp.int32(some.shape[2])
    end = jnp.where(some, blocks + 1, 0).max(axis=2)
    first = jnp.minimum(jnp.where(some, blocks, count).min(axis=2), end)
    first_whole = jnp.minimum(jnp.where(whole, blocks, count).min(axis=2), end)
    after = ~whole & (blocks >= first_whole[:, :, None])
    end_whole = jnp.minimum(jnp.where(after, blocks, count).min(axis=2), end)
    return jnp.stack([first, first_whole, end_whole, end], axis=2)


def _extent(segments_BT: jax.Array, index_BT: jax.Array, block: int) -> tuple[jax.Array, ...]:
    """Of each block: least and greatest segment but padding, whether it is of one alone, first and last index."""
    segments, index = (x.reshape(x.shape[0], -1, block) for x in (segments_BT, index_BT))
    low = jnp.where(segments == 0, jnp.iinfo(jnp.int32).max, segments).min(axis=2)
    high = segments.max(axis=2)
    return low, high, segments.min(axis=2) == high, index.min(axis=2), index.max(axis=2)


def _refuses(use: Use) -> str | None:
    if use.capability is None or use.capability < 8:
        return "triton attention is for NVIDIA GPUs from compute capability 8.0 on"
    if use.keys == "cache":
        return "triton attention reads no cache"
    if use.dropout:
        return (
            f"attention_dropout={use.dropout:g} drops probabilities, which the kernel never holds (0 lets it be used)"
        )
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
