"""Relative positions: a bias on the scores of each head by the distance of query and key (Raffel et al. 2020, 2.1).

Distances fall into buckets: one each while they are short, then ever wider ones up to a greatest distance, beyond which
all are alike. One table of buckets × heads serves all layers of a stack.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from espalier.models.attention_spec import Places
from espalier.models.config import ModelConfig
from espalier.models.layers import Embed
from sharding.mesh import constrain


def distance_buckets(config: ModelConfig) -> np.ndarray:
    """The bucket of every distance key - query from -M to M = relative_attention_max_distance, int32 [2 M + 1].

    A causal stack has all buckets for keys before the query, and the bucket of distance 0 for those after, which it
    never sees; another one has the second half of them for keys after it.
    """
    count, most = config.relative_attention_num_buckets, config.relative_attention_max_distance
    ahead = np.arange(-most, most + 1)
    first = np.zeros_like(ahead)
    if config.causal:
        distance = np.maximum(-ahead, 0)
    else:
        count //= 2
        first, distance = np.where(ahead > 0, count, 0), np.abs(ahead)
    exact = count // 2
    # In float32 step by step, as the published models were trained.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact)) / np.float32(math.log(most / exact))
    wide = exact + (ratio * np.float32(count - exact)).astype(np.int32)
    return (first + np.where(distance < exact, distance, np.minimum(wide, count - 1))).astype(np.int32)


def init_relative(config: ModelConfig, key: jax.Array) -> dict:
    """Fresh parameters: `embedding`, float32 [buckets, N]."""
    table: Any = _table(config)
    return table.init(key, jnp.zeros((1,), jnp.int32))["params"]


def relative_bias(config: ModelConfig, params: dict, places: Places) -> jax.Array:
    """The bias of a stack's scores, float32 [B or 1, N, T, S], by row indices: within a document their differences are
    those of positions."""
    most = config.relative_attention_max_distance
    ahead_BTS = places.k_index_BS[:, None, :] - places.q_index_BT[:, :, None]
    bucket_BTS = jnp.asarray(distance_buckets(config))[jnp.clip(ahead_BTS, -most, most) + most]
    bias_BTSN = _table(config).apply({"params": params}, bucket_BTS)
    assert isinstance(bias_BTSN, jax.Array)
    rows = "batch" if bias_BTSN.shape[0] > 1 else None
    return constrain(bias_BTSN.transpose(0, 3, 1, 2), rows, "tensor", "sequence", None)


def _table(config: ModelConfig) -> Embed:
    settings = (config.relative_attention_num_buckets, config.num_attention_heads, config.initializer_range)
    return Embed(*settings, jnp.dtype(jnp.float32))
