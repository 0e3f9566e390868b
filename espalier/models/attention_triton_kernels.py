"""The kernels of models.attention_triton, in Pallas: forward pass, gradients of queries, gradients of keys and values.

FlashAttention-2 (Dao 2023): a block of scores at a time, and a backward pass that works them out again from the
logarithm of each query's sum. Which blocks anyone may see is read from the segment ids and row indices beforehand:
blocks between documents, beyond a window or after a causal query are never visited, and what is seen whole is not
compared token by token. Scores are in base 2, where the exponential is one instruction.

A probability is dropped by a hash of a number drawn for the row and head and of the two tokens' indices, so that every
kernel and every device drops the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from espalier.models.attention_spec import AttentionSpec, Places

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


class How(NamedTuple):
    """What is known when the kernels are compiled."""

    spec: AttentionSpec
    rate: float
    """Part of the probabilities that is dropped."""
    tiles: Tiles
    interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(how: How, q_BTNH, k_BSKH, v_BSKH, places: Places, seeds_BN: jax.Array | None) -> jax.Array:
    """Softmax attention [B, T, N, H]. Blocks divide rows, and heads are a power of two. seeds_BN: uint32, where
    anything is dropped. A query that sees nothing yields 0."""
    return _forward(how, q_BTNH, k_BSKH, v_BSKH, places, seeds_BN)[0]


def _forward(how, q_BTNH, k_BSKH, v_BSKH, places, seeds_BN):
    B, T, N, _ = q_BTNH.shape
    outs = {"q": [q_BTNH], "lse": [jax.ShapeDtypeStruct((B, N, T), jnp.float32)]}
    arrays = {"q": [q_BTNH], "k": [k_BSKH, v_BSKH]}
    out_BTNH, lse_BNT = _call(_forward_kernel, how, how.tiles.forward, places, seeds_BN, arrays, outs)
    return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, places, seeds_BN, out_BTNH, lse_BNT)


def _backward(how, kept, g_BTNH):
    q_BTNH, k_BSKH, v_BSKH, places, seeds_BN, out_BTNH, lse_BNT = kept
    delta_BNT = jnp.einsum("BTNH,BTNH->BNT", out_BTNH, g_BTNH, preferred_element_type=jnp.float32)
    arrays = {"q": [q_BTNH, g_BTNH], "k": [k_BSKH, v_BSKH], "lse": [lse_BNT, delta_BNT]}
    given = (places, seeds_BN, arrays)
    (dq_BTNH,) = _call(_query_kernel, how, how.tiles.queries, *given, {"q": [q_BTNH]})
    dk_BSKH, dv_BSKH = _call(_key_kernel, how, how.tiles.keys, *given, {"k": [k_BSKH, v_BSKH]})
    return dq_BTNH, dk_BSKH, dv_BSKH, None, None


attention.defvjp(_forward, _backward)


def _call(kernel: Callable, how: How, tile: Tile, places: Places, seeds_BN, arrays, outs) -> Any:
    """Runs a kernel, one program for each block of its own tokens, head and row.

    arrays, outs: by kind: "q" [B, T, N, H], "k" [B, S, K, H], "lse" [B, N, T]. A program gets its own block of tokens
    and the other side whole, in the order bounds, seeds, q, k, lse, places, outs.
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
    q_places, k_places = (theirs, mine) if by_key else (mine, theirs)
    bounds = visited(how.spec, places, *((other, own) if by_key else (own, other)), by_key)
    seeds = None if seeds_BN is None else pl.BlockSpec((None, G if by_key else 1), lambda i, n, b: (b, n))
    in_specs: list[Any] = [pl.BlockSpec((None, None, 4), lambda i, n, b: (b, i, 0)), seeds]
    in_specs += [blocks[kind] for kind in arrays for _ in arrays[kind]] + [q_places, k_places, q_places, k_places]
    return pl.pallas_call(
        functools.partial(kernel, how, own, other),
        grid=((S if by_key else T) // own, K if by_key else N, B),
        in_specs=in_specs,
        out_specs=[blocks[kind] for kind in outs for _ in outs[kind]],
        out_shape=[jax.ShapeDtypeStruct(like.shape, like.dtype) for kind in outs for like in outs[kind]],
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=how.interpret,
        name=f"attention{kernel.__name__}",
    )(bounds, seeds_BN, *(array for kind in arrays for array in arrays[kind]), *places)


def _forward_kernel(how, own, other, bounds_ref, seeds_ref, q_ref, k_ref, v_ref, *rest):
    *places, out_ref, lse_ref = rest
    q = q_ref[...]

    def step(j, masked, carry):
        sum_BH, most_B, total_B = carry
        at = _slice(j, other)
        seen = _seen(how.spec, places, ..., at) if masked else None
        score, _ = _scores(how.spec, q, k_ref[at, :], seen)
        new_most_B = jnp.maximum(most_B, score.max(axis=1))
        p, shrink_B = jnp.exp2(score - new_most_B[:, None]), jnp.exp2(most_B - new_most_B)
        total_B = total_B * shrink_B + p.sum(axis=1)
        if seeds_ref is not None:
            p *= _kept(how.rate, seeds_ref[0], places, ..., at)
        v = v_ref[at, :]
        return sum_BH * shrink_B[:, None] + _dot(p.astype(v.dtype), v), new_most_B, total_B

    none = jnp.zeros(own, jnp.float32)
    sum_BH, most_B, total_B = _visit(bounds_ref, step, (jnp.zeros(q.shape, jnp.float32), none + NOTHING, none))
    # A query that sees nothing has a total of 0, and yields 0.
    total_B = jnp.where(total_B == 0.0, 1.0, total_B)
    out_ref[...] = (sum_BH / total_B[:, None]).astype(out_ref.dtype)
    lse_ref[...] = most_B + jnp.log2(total_B)


def _query_kernel(how, own, other, bounds_ref, seeds_ref, q_ref, g_ref, k_ref, v_ref, lse_ref, delta_ref, *rest):
    *places, dq_ref = rest
    q, g, lse, delta = q_ref[...], g_ref[...], lse_ref[...][:, None], delta_ref[...][:, None]

    def step(j, masked, dq):
        at = _slice(j, other)
        k = k_ref[at, :]
        seen = _seen(how.spec, places, ..., at) if masked else None
        kept = 1.0 if seeds_ref is None else _kept(how.rate, seeds_ref[0], places, ..., at)
        _, ds = _score_gradients(how.spec, q, k, g, v_ref[at, :], lse, delta, seen, kept)
        return dq + _dot(ds.astype(k.dtype), k)

    dq_ref[...] = _visit(bounds_ref, step, jnp.zeros(q.shape, jnp.float32)).astype(dq_ref.dtype)


def _key_kernel(how, own, other, bounds_ref, seeds_ref, q_ref, g_ref, k_ref, v_ref, lse_ref, delta_ref, *rest):
    *places, dk_ref, dv_ref = rest
    k, v, groups = k_ref[...], v_ref[...], q_ref.shape[1]

    def head(n, sums):
        # Scores stand transposed, keys by queries: as both products take them.
        def step(j, masked, sums):
            at = _slice(j, other)
            q, g, lse, delta = q_ref[at, n, :], g_ref[at, n, :], lse_ref[n, at][None, :], delta_ref[n, at][None, :]
            seen = _seen(how.spec, places, at, ..., True) if masked else None
            kept = 1.0 if seeds_ref is None else _kept(how.rate, seeds_ref[n], places, at, ..., True)
            p, ds = _score_gradients(how.spec, k, q, v, g, lse, delta, seen, kept)
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


def _score_gradients(spec, q, k, g, v, lse, delta, seen, kept) -> tuple[jax.Array, jax.Array]:
    """(probabilities after dropout, gradient by q·k) of a block (Dao et al. 2022, appendix B.4).

    With k in the place of q and v in that of g it is the transpose.
    """
    score, slope = _scores(spec, q, k, seen)
    p = jnp.exp2(score - lse)
    return p * kept, p * (_dot(g, v.T) * kept - delta) * (slope * spec.scale)


def _crossed(of_queries: jax.Array, of_keys: jax.Array, by_key: bool) -> tuple[jax.Array, jax.Array]:
    """Both along their own axis of a block: queries by keys, or keys by queries."""
    return (of_queries[None, :], of_keys[:, None]) if by_key else (of_queries[:, None], of_keys[None, :])


def _seen(spec: AttentionSpec, places, queries, keys, by_key: bool = False) -> jax.Array:
    """As `models.attention_spec.visible`, of a block; queries, keys: its indices."""
    q_segments_ref, k_segments_ref, q_index_ref, k_index_ref = places
    q_segments, k_segments = _crossed(q_segments_ref[queries], k_segments_ref[keys], by_key)
    seen = (q_segments == k_segments) & (q_segments != 0)
    right = 0 if spec.causal else spec.right
    if spec.left is None and right is None:
        return seen
    q_index, k_index = _crossed(q_index_ref[queries], k_index_ref[keys], by_key)
    ahead = k_index - q_index
    if spec.left is not None:
        seen &= ahead >= -spec.left
    return seen if right is None else seen & (ahead <= right)


def _kept(rate: float, seed, places, queries, keys, by_key: bool = False) -> jax.Array:
    """What a block's probabilities are multiplied by: 0 where they are dropped, else 1 / (1 - rate)."""
    q_index, k_index = (ref[at].astype(jnp.uint32) for ref, at in zip(places[2:], (queries, keys), strict=True))
    of_query, of_key = _crossed(hashed(seed + q_index * np.uint32(0x9E3779B9)), k_index, by_key)
    kept = hashed(of_query + of_key * np.uint32(0x85EBCA77)) >= np.uint32(rate * 2**32)
    return jnp.where(kept, 1 / (1 - rate), 0.0).astype(jnp.float32)


def hashed(x: Any) -> Any:
    """A mixture of all bits, uint32: the end of MurmurHash3 (Appleby 2011)."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def _visit(bounds_ref, step: Callable, carry):
    """Folds `step(block, masked, carry)` over the blocks of a program, those that are seen whole unmasked."""
    first, first_whole, end_whole, end = (bounds_ref[i] for i in range(4))
    for begin, stop, masked in ((first, first_whole, True), (first_whole, end_whole, False), (end_whole, end, True)):
        carry = jax.lax.fori_loop(begin, stop, lambda j, carry, masked=masked: step(j, masked, carry), carry)
    return carry


def visited(spec: AttentionSpec, places: Places, q_block: int, k_block: int, by_key: bool) -> jax.Array:
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
