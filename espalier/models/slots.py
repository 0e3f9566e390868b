"""Rows that begin where others have ended: many prompts are continued in a fixed number of slots.

A batch waits for its longest row; a slot does not: as soon as enough of them are free, further prompts are read into
them (continuous batching, Yu et al. 2022, "Orca"). Two programs are all there is, whatever the lengths: one reads
prompts into slots, the other draws tokens until enough slots are free. All slots write at the same place of a ring
(models.transformer.init_cache), and the cache of a new prompt is turned so that it ends there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from espalier.models.config import Execution, ModelConfig
from espalier.models.decoding import (
    Drawn,
    Sampling,
    State,
    advanced,
    begun,
    repeated,
    sample_keys,
    split_rows_and_heads,
)
from espalier.models.generate import cast, keys_of, padded, parts, whole
from espalier.models.layers import compute_dtype
from espalier.models.transformer import DEFAULT_EXECUTION
from sharding.mesh import constrain


class Slots(NamedTuple):
    """B rows, each as far as it is."""

    state: State
    keys_B: jax.Array


class Ended(NamedTuple):
    """Rows that are complete, NumPy."""

    rows: np.ndarray
    """Their numbers: of the prompt, times sampling.samples, plus that of the sample."""
    drawn: Drawn
    turns: int
    """How often a token was drawn in every slot, from the start."""
    fillings: int
    """How often prompts were read."""


def continue_all(*given: Any, **how: Any) -> Drawn:
    """What `rows_as_they_end` gives, a row for each prompt and sample, in their order."""
    parts = list(rows_as_they_end(*given, **how))
    rows = np.concatenate([part.rows for part in parts])
    drawn = Drawn(*(np.concatenate(arrays) for arrays in zip(*(part.drawn for part in parts), strict=True)))
    return jax.tree.map(lambda array: array[np.argsort(rows)], drawn)


def rows_as_they_end(
    config: ModelConfig,
    params: dict,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    sampling: Sampling,
    slots: int,
    *,
    execution: Execution = DEFAULT_EXECUTION,
    numbers: Sequence[int] | None = None,
    length: int | None = None,
    together: int | None = None,
    stops: np.ndarray | None = None,
) -> Iterator[Ended]:
    """`models.generate.generate` of any number of prompts in so many slots: the same rows, whoever had a slot before.

    length: that prompts are padded to; unset = of the longest. together: prompts that are read at once, each into
    sampling.samples slots; unset = as fill a quarter of them. The rest as there. Every process does the same.
    """
    assert sampling.beams == 1, "beams of a row begin and end together"
    config.check_one_stack("slots that are filled again are for")
    samples, longest = sampling.samples, max(map(len, prompts))
    assert config.max_length is None or longest + sampling.max_new_tokens <= config.max_length
    slots, length = -(-slots // parts()) * parts(), length or longest
    group = together or max(1, slots // (4 * samples))
    assert 0 < group * samples <= slots, f"{group} prompts × {samples} samples in {slots} slots"
    numbers = range(len(prompts)) if numbers is None else numbers
    params = cast(params, compute_dtype(execution).name)
    how = (sampling, execution)
    now = empty(config, params, key, slots, length, *how)
    owner_B, done_B = np.full(slots, -1), np.ones(slots, bool)
    begins, turns, fillings = 0, 0, 0
    while True:
        # The last prompts may be fewer than are read at once.
        while (wave := min(group, len(prompts) - begins)) and done_B.sum() >= wave * samples:
            chosen, places = range(begins, begins + wave), np.flatnonzero(done_B)[: wave * samples]
            new_B = np.full(slots, -1, np.int32)
            new_B[places] = np.arange(len(places))
            batch = padded([prompts[row] for row in chosen], [numbers[row] for row in chosen], group, length)
            now = filled(config, params, now, batch[0], key, batch[1], new_B, *how)
            owner_B[places] = begins * samples + np.arange(len(places))
            done_B[places], begins, fillings = False, begins + wave, fillings + 1
        if done_B.all():
            return
        now, seen = turned(config, params, now, np.int32(wave * samples or slots), *how, stops)
        drawn, done_B, count = jax.device_get(seen)
        done_B, turns = np.array(done_B), turns + int(count)
        ended = np.flatnonzero(done_B & (owner_B >= 0))
        yield Ended(owner_B[ended], jax.tree.map(lambda array, ended=ended: array[ended], drawn), turns, fillings)
        owner_B[ended] = -1


@functools.partial(jax.jit, static_argnames=("config", "slots", "length", "sampling", "execution"))
def empty(
    config: ModelConfig, params: dict, key: jax.Array, slots: int, length: int, sampling: Sampling, execution: Execution
) -> Slots:
    """Slots without rows, for prompts of up to `length` tokens."""
    ids_BT = jax.ShapeDtypeStruct((slots, length), jnp.int32)
    prompt = {"input_ids": ids_BT, "attention_mask": ids_BT}
    one_each = replace(sampling, samples=1)
    shapes = jax.eval_shape(functools.partial(begun, config, sampling=one_each, execution=execution), params, prompt)
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    cache = state.cache | {"end": jnp.int32(length)}
    return _laid(Slots(state._replace(cache=cache, done_B=state.done_B | True), keys_of(key, state.count_B)))


@functools.partial(jax.jit, static_argnames=("config", "sampling", "execution"), donate_argnames="slots")
def filled(
    config: ModelConfig,
    params: dict,
    slots: Slots,
    prompt: dict[str, jax.Array],
    key: jax.Array,
    numbers_P: jax.Array,
    new_B: jax.Array,
    sampling: Sampling,
    execution: Execution,
) -> Slots:
    """The slots with new rows in some of them.

    prompt, numbers_P: as models.generate.continued takes them. new_B: which of the P·S rows begins in a slot, int32;
    -1 = what is there stays.
    """
    start, keys = begun(config, params, prompt, sampling, execution), keys_of(key, numbers_P)
    if sampling.samples > 1:
        start, keys = repeated(start, sampling.samples), sample_keys(keys, sampling.samples)
    state, length = slots.state, prompt["input_ids"].shape[1]
    # Each prompt ends where the others have come to.
    ahead = state.cache["end"] - length

    def placed(old: jax.Array, new: jax.Array, rows: int = 0) -> jax.Array:
        here = (new_B >= 0).reshape(-1, *(1,) * (old.ndim - rows - 1))
        return jnp.where(here, jnp.take(new, jnp.maximum(new_B, 0), axis=rows), old)

    def placed_cache(old: jax.Array, new: jax.Array) -> jax.Array:
        return placed(old, jnp.roll(new, ahead, axis=new.ndim - 3), new.ndim - 4)

    cache = {
        "layers": jax.tree.map(placed_cache, state.cache["layers"], start.cache["layers"]),
        "segment_ids": placed(state.cache["segment_ids"], jnp.roll(start.cache["segment_ids"], ahead, axis=1)),
        "end": state.cache["end"],
    }
    others = jax.tree.map(placed, state._replace(cache={}), start._replace(cache={}))
    return _laid(Slots(others._replace(cache=cache), placed(slots.keys_B, keys)))


@functools.partial(jax.jit, static_argnames=("config", "sampling", "execution"), donate_argnames="slots")
def turned(
    config: ModelConfig,
    params: dict,
    slots: Slots,
    enough: jax.Array,
    sampling: Sampling,
    execution: Execution,
    stops: jax.Array | None = None,
) -> tuple[Slots, tuple[Drawn, jax.Array, jax.Array]]:
    """Tokens drawn in all slots until `enough` of them are free; (slots, (what was drawn, which are free, turns))."""

    def turn(state: State) -> State:
        return advanced(config, params, state, slots.keys_B, sampling, execution, stops)

    def unfinished(state: State) -> jax.Array:
        return jnp.sum(state.done_B) < enough

    state = jax.lax.while_loop(unfinished, turn, slots.state)
    turns = state.cache["end"] - slots.state.cache["end"]
    return _laid(Slots(state, slots.keys_B)), whole((state.drawn, state.done_B, turns))


def _laid(slots: Slots) -> Slots:
    """As they lie on a mesh, before and after every program, so that each is compiled once."""
    state = slots.state
    cache = state.cache | {
        "layers": jax.tree.map(split_rows_and_heads, state.cache["layers"]),
        "segment_ids": constrain(state.cache["segment_ids"], "batch", None),
    }
    others = jax.tree.map(lambda rows: constrain(rows, "batch", *(None,) * (rows.ndim - 1)), state._replace(cache={}))
    return Slots(others._replace(cache=cache), constrain(slots.keys_B, "batch"))
