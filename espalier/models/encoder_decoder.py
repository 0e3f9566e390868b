"""Models of two stacks: an encoder reads one text, a decoder writes another and reads the encoder's states meanwhile.

Both are the stack of models.transformer over the same embeddings (Raffel et al. 2020, section 2.1): config.encoder with
the parameters `layers`, config.decoder with those below `decoder`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from espalier.models.block import Memory
from espalier.models.config import Execution, ModelConfig
from espalier.models.inputs import completed
from espalier.models.layers import named_key
from espalier.models.transformer import DEFAULT_EXECUTION, apply


def encode(
    config: ModelConfig,
    params: dict,
    source: Mapping[str, Any],
    *,
    execution: Execution = DEFAULT_EXECUTION,
    key: jax.Array | None = None,
) -> Memory:
    """What the decoder reads of a batch of texts, which models.transformer.apply takes. key: turns dropout on."""
    source = completed(source)
    key = None if key is None else named_key(key, "encoder")
    own = {name: part for name, part in params.items() if name != "decoder"}
    return Memory(apply(config.encoder, own, source, execution=execution, key=key), source["segment_ids"])


def decode(
    config: ModelConfig,
    params: dict,
    target: Mapping[str, Any],
    memory: Memory | None,
    *,
    execution: Execution = DEFAULT_EXECUTION,
    key: jax.Array | None = None,
    cache: dict | None = None,
) -> Any:
    """The decoder's final states x_BTD on a batch of texts; a document of theirs reads that of the same segment id.

    target: what is written so far, config.decoder_start_token_id first. cache: from `init_cache(config.decoder, …)`;
    then (x_BTD, cache), and the memory is given with the first tokens alone.
    """
    key = None if key is None else named_key(key, "decoder")
    own = {"embeddings": params["embeddings"], **params["decoder"]}
    how: Any = dict(execution=execution, key=key, cache=cache, memory=memory)
    return apply(config.decoder, own, dict(target), **how)


def encode_decode(
    config: ModelConfig,
    params: dict,
    source: Mapping[str, Any],
    target: Mapping[str, Any],
    *,
    execution: Execution = DEFAULT_EXECUTION,
    key: jax.Array | None = None,
) -> jax.Array:
    """The decoder's final states x_BTD on `target`, as it reads `source`."""
    memory = encode(config, params, source, execution=execution, key=key)
    return decode(config, params, target, memory, execution=execution, key=key)
