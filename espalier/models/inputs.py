"""A batch as the stack takes it, from packed rows or from what a tokenizer returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def completed(batch: Mapping[str, Any], *, cached: bool = False) -> dict[str, jax.Array]:
    """The batch with `segment_ids` and `positions`, int32 [B, T], filled in where it has none.

    Without segment_ids a row is one document: the tokens that `attention_mask` marks by 1, with padding on either
    side, or without one all of them. Positions count real tokens from 0, anew in each document. cached: the batch
    continues a cache, and must say its positions itself.
    """
    if "segment_ids" in batch and "positions" in batch:
        return dict(batch)
    assert not cached or "positions" in batch, "a batch that continues a cache needs its positions"
    given = {name: jnp.asarray(array) for name, array in batch.items()}
    segments_BT = given.get("segment_ids", given.get("attention_mask"))
    if segments_BT is None:
        segments_BT = jnp.ones_like(given["input_ids"])
    segments_BT = segments_BT.astype(jnp.int32)
    return {"positions": positions_of(segments_BT), "segment_ids": segments_BT} | given


def positions_of(segment_ids_BT: jax.Array) -> jax.Array:
    """The place of every token in its document, int32 [B, T]; 0 in padding."""
    real_BT = segment_ids_BT != 0
    begins_BT = jnp.diff(segment_ids_BT, axis=1, prepend=0) != 0
    count_BT = jnp.cumsum(real_BT, axis=1, dtype=jnp.int32) - 1
    start_BT = jax.lax.cummax(jnp.where(begins_BT & real_BT, count_BT, 0), axis=1)
    return jnp.where(real_BT, count_BT - start_BT, 0)
