"""Entities counted on the device, for the evaluations during a training: predict.tags.entities, on arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from espalier.predict.tags import split, types_of

PREFIXES = "OBIES"
OUTSIDE, BEGIN, INSIDE, END, SINGLE = range(5)


class Counts(NamedTuple):
    """Entities of a batch, int32 scalars."""

    hit: jax.Array
    """Predicted that are there."""
    predicted: jax.Array
    right: jax.Array


def entity_counts(names: Sequence[str], right_BT: jax.Array, predicted_BT: jax.Array, words_BT: jax.Array) -> Counts:
    """Entities in rows of tags, each row by itself. words_BT: bool, where a tag stands; names: the tags by number."""
    begin_BT, end_BT, type_BT = _entities(names, right_BT, words_BT)
    begins_BT, ends_BT, types_BT = _entities(names, predicted_BT, words_BT)
    hit_BT = begin_BT & begins_BT & (end_BT == ends_BT) & (type_BT == types_BT)
    return Counts(*(jnp.sum(x_BT, dtype=jnp.int32) for x_BT in (hit_BT, begins_BT, begin_BT)))


def _entities(names: Sequence[str], tags_BT: jax.Array, words_BT: jax.Array):
    """Where entities begin (bool), the place behind the end of one that begins there, and its type, all [B, T]."""
    types = types_of(names)
    prefix_C = jnp.array([PREFIXES.index(split(name)[0]) for name in names], jnp.int32)
    type_C = jnp.array([-1 if name == "O" else types.index(split(name)[1]) for name in names], jnp.int32)
    place_T = jnp.arange(tags_BT.shape[1], dtype=jnp.int32)
    last_BT = jax.lax.cummax(jnp.where(words_BT, place_T, -1), axis=1)
    # The place of the word before each place; -1 where there is none.
    before_BT = jnp.pad(last_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    earlier_BT = jnp.take_along_axis(tags_BT, jnp.maximum(before_BT, 0), axis=1)
    none_BT = before_BT < 0
    prefix_BT, type_BT = prefix_C[tags_BT], type_C[tags_BT]
    was_BT = jnp.where(none_BT, OUTSIDE, prefix_C[earlier_BT])
    changed_BT = jnp.where(none_BT, -1, type_C[earlier_BT]) != type_BT

    ended_BT = (was_BT != OUTSIDE) & (
        changed_BT | _among(was_BT, END, SINGLE) | _among(prefix_BT, BEGIN, SINGLE, OUTSIDE)
    )
    begin_BT = (prefix_BT != OUTSIDE) & (
        changed_BT | _among(prefix_BT, BEGIN, SINGLE) | _among(was_BT, OUTSIDE, END, SINGLE)
    )
    end_BT = jnp.where(words_BT & ended_BT, place_T, tags_BT.shape[1])
    behind_BT = jnp.pad(end_BT[:, 1:], ((0, 0), (0, 1)), constant_values=tags_BT.shape[1])
    return words_BT & begin_BT, jax.lax.cummin(behind_BT, axis=1, reverse=True), type_BT


def _among(x_BT: jax.Array, *values: int) -> jax.Array:
    return jnp.isin(x_BT, np.array(values, np.int32))
