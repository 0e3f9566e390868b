"""Choosing and hiding the tokens that the model must predict, on the device, inside the jitted step.

Everything is drawn for the *global* batch from one key, so hosts, meshes and micro-batches change nothing. Shapes are
static: M slots a row, of which the first k are used. k = round(rate × ordinary tokens of the row), exactly, and at
least 1. Whole words are drawn in random order until k tokens are reached; the word that would overflow k is cut: only
its first tokens are hidden. (Skipping it instead would favour short words and leave k open.) Where words begin was
stored with the tokens (data.words), or follows from the tokens themselves (data.token_tables.word_table).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from espalier import user_code
from espalier.errors import UserError
from sharding.mesh import BATCH_AXES

if TYPE_CHECKING:
    from mlm.config import MaskingConfig


class Vocabulary(NamedTuple):
    """What masking must know of the tokenizer; small tables that become constants of the compiled step."""

    mask_id: int
    ordinary_V: np.ndarray
    """bool: may be hidden, and may replace a hidden token (not a special token)."""
    words_V: np.ndarray
    """uint8: bit 0 = continues the word before it, bit 1 = may be continued (data.tokenizer.word_table)."""


def slots(config: MaskingConfig, sequence_length: int) -> int:
    """M: masked positions stored for each row."""
    return math.ceil(max(config.rate, config.final_rate or 0.0) * sequence_length)


def rate_at(config: MaskingConfig, step, steps: int):
    """Mask rate at a (traced) step: linear from rate to final_rate over the run."""
    if config.final_rate is None:
        return jnp.float32(config.rate)
    progress = jnp.clip(jnp.asarray(step, jnp.float32) / max(steps - 1, 1), 0.0, 1.0)
    return config.rate + (config.final_rate - config.rate) * progress


def mask_rates(settings: dict, steps):
    """The mask rate at each of these steps of a run with these settings (a training.identity.Schedule)."""
    from mlm.config import MaskingConfig

    chosen = {name: settings["masking"][name] for name in ("rate", "final_rate")}
    return jnp.broadcast_to(rate_at(MaskingConfig(**chosen), steps, settings["steps"]), steps.shape)


def mask_batch(batch: dict, key, rate, config: MaskingConfig, vocabulary: Vocabulary) -> dict:
    """Hide k tokens of every row.

    batch: `input_ids`, `segment_ids` [B,T], and `word_starts` (bool) where that was stored. Returns it with hidden
    tokens in `input_ids`, and `masked_positions`, `masked_labels` (int32) and `masked_weights` (float32; 1 for the k
    used slots, 0 for the rest), all [B,M].
    """
    choose_key, action_key, random_key = jax.random.split(key, 3)
    input_BT = batch["input_ids"]
    slot_count = slots(config, input_BT.shape[1])
    positions_BM, weights_BM = choose(choose_key, batch, rate, slot_count, config.whole_words, vocabulary)
    labels_BM = jnp.take_along_axis(input_BT, positions_BM, axis=1)

    action_BM = jax.random.uniform(action_key, labels_BM.shape)
    ordinary_ids = jnp.asarray(np.flatnonzero(vocabulary.ordinary_V), jnp.int32)
    random_BM = ordinary_ids[jax.random.randint(random_key, labels_BM.shape, 0, len(ordinary_ids))]
    hidden_BM = jnp.where(action_BM < config.mask_fraction + config.random_fraction, random_BM, labels_BM)
    hidden_BM = jnp.where(action_BM < config.mask_fraction, vocabulary.mask_id, hidden_BM)
    hidden_BM = jnp.where(weights_BM > 0, hidden_BM, labels_BM)
    return batch | {
        "input_ids": jax.vmap(lambda row, at, values: row.at[at].set(values))(input_BT, positions_BM, hidden_BM),
        "masked_positions": positions_BM,
        "masked_labels": labels_BM,
        "masked_weights": weights_BM,
    }


def from_before(mask: Callable) -> Callable:
    """A masking for masked next-token prediction: of tokens with another one before them in their piece of the row,
    whose state is to predict them."""

    def masked(batch: dict, *arguments: Any) -> dict:
        segments_BT = batch["segment_ids"]
        begins_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        return mask(batch | {"segment_ids": jnp.where(begins_BT, 0, segments_BT)}, *arguments) | {
            "segment_ids": segments_BT
        }

    return masked


MASKED = {"masked_positions": jnp.int32, "masked_labels": jnp.int32, "masked_weights": jnp.float32}


def own_masking(given: str) -> Callable:
    """A masking of the user's own, called as `mask_batch` is; UserError where it does not do as that does."""
    mask = user_code.function(given, "mask(batch, key, rate, config, vocabulary)")

    def checked(batch: dict, key, rate, config: MaskingConfig, vocabulary: Vocabulary) -> dict:
        hidden = mask(batch, key, rate, config, vocabulary)
        shape = (batch["input_ids"].shape[0], slots(config, batch["input_ids"].shape[1]))
        wanted = {name: (shape, jnp.dtype(kind).name) for name, kind in MASKED.items()}
        wanted["input_ids"] = (batch["input_ids"].shape, "int32")
        for name, one in wanted.items():
            array: Any = hidden.get(name) if isinstance(hidden, dict) else None
            got = (tuple(array.shape), array.dtype.name) if hasattr(array, "dtype") else array
            if got != one:
                raise UserError(f"{given}: its batch has {name} {got}; accepted is {one} (mlm.masking.mask_batch)")
        return hidden

    return checked


def choose(key, batch, rate, slot_count, whole_words, vocabulary):
    """Positions and weights [B,M] of the tokens to predict; positions within a row are distinct."""
    input_BT, segment_BT = batch["input_ids"], batch["segment_ids"]
    ordinary_BT = jnp.asarray(vocabulary.ordinary_V)[input_BT] & (segment_BT > 0)
    draw_BT = jax.random.uniform(key, input_BT.shape)
    if whole_words:
        if "word_starts" in batch:
            continues = ~batch["word_starts"][:, 1:]
        else:
            table_BT = jnp.asarray(vocabulary.words_V)[input_BT]
            continues = (table_BT[:, 1:] & 1 > 0) & (table_BT[:, :-1] & 2 > 0)
        continues &= segment_BT[:, 1:] == segment_BT[:, :-1]
        starts_BT = jnp.pad(~continues, ((0, 0), (1, 0)), constant_values=True)
        word_BT = jnp.cumsum(starts_BT, axis=1) - 1
        draw_BT = jnp.take_along_axis(draw_BT, word_BT, axis=1)
    # top_k returns equal scores in order of position, so the last word chosen is cut at its end.
    positions_BM = _top_k(jnp.where(ordinary_BT, draw_BT, -1.0), slot_count)
    count_B1 = jnp.sum(ordinary_BT, axis=1, keepdims=True, dtype=jnp.float32)
    used_B1 = jnp.minimum(jnp.maximum(jnp.round(rate * count_B1), 1.0), count_B1)
    weights_BM = (jnp.arange(slot_count)[None, :] < used_B1).astype(jnp.float32)
    return positions_BM.astype(jnp.int32), weights_BM


def _top_k(x_BT: jax.Array, k: int) -> jax.Array:
    """Places of the k largest of each row. Each device sorts its own rows: by itself XLA would gather all of them."""
    mesh = jax.sharding.get_abstract_mesh()

    def places(x_BT):
        return jax.lax.top_k(x_BT, k)[1]

    if mesh.empty or x_BT.shape[0] % math.prod(mesh.shape[name] for name in BATCH_AXES):
        return places(x_BT)
    rows = jax.sharding.PartitionSpec(BATCH_AXES)
    return jax.shard_map(places, in_specs=rows, out_specs=rows)(x_BT)
