"""Text generation: lists of token ids are continued, drawn or by beams.

`generate` pads prompts to a bucket of lengths and of rows, and calls a program that is compiled once a bucket; `stream`
gives out every token as it is drawn. The steps themselves are in models/decoding.py, beams in models/beams.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from espalier.models.beams import search
from espalier.models.config import Execution, ModelConfig
from espalier.models.decoding import Drawn, Sampling, State, advanced, begun, cast_once, sample
from espalier.models.layers import compute_dtype
from espalier.models.transformer import DEFAULT_EXECUTION
from sharding.mesh import BATCH_AXES, constrain

SHORTEST = 16
"""Prompts are padded to multiples of this at least."""


def generate(
    config: ModelConfig,
    params: dict,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    sampling: Sampling,
    *,
    execution: Execution = DEFAULT_EXECUTION,
    numbers: Sequence[int] | None = None,
    shape: tuple[int, int] | None = None,
    stops: np.ndarray | None = None,
) -> Drawn:
    """Continue lists of token ids, each of at least one; NumPy arrays of as many rows, times sampling.samples.

    numbers: those of the rows, by which their random keys are made of `key`; unset = 0, 1, … shape: (rows, tokens) that
    the prompts are padded to; unset = those of their bucket. stops: as models.decoding.advanced takes them. Under
    jax.set_mesh rows are split over the mesh, with parameters laid out on it. Every process gives all prompts and gets
    all rows. The model must have a position for every token of the longest prompt and for the new ones.
    """
    assert config.max_length is None or max(map(len, prompts)) + sampling.max_new_tokens <= config.max_length
    prompt, numbers_B = _batch(prompts, numbers, shape)
    drawn = jax.device_get(continued(config, params, prompt, key, numbers_B, sampling, execution, stops))
    rows = len(prompts) * sampling.samples
    return jax.tree.map(lambda array: array[:rows], drawn)


def stream(
    config: ModelConfig,
    params: dict,
    prompt: Sequence[int],
    key: jax.Array,
    sampling: Sampling,
    *,
    execution: Execution = DEFAULT_EXECUTION,
) -> Iterator[int]:
    """The tokens that `generate` adds to one list of token ids, each as soon as it is drawn."""
    assert sampling.beams == sampling.samples == 1, "beams are known at their end, and one row is streamed"
    batch, numbers_B = _batch([prompt])
    params = cast(params, compute_dtype(execution).name)
    state = _begun(config, params, batch, sampling, execution)
    for count in range(sampling.max_new_tokens):
        state = _advanced(config, params, state, key, numbers_B, sampling, execution)
        token = int(state.drawn.tokens_BG[0, count])
        yield token
        if token in sampling.end_ids:
            return


def row_keys(key: jax.Array, rows: int) -> jax.Array:
    """A key for each row of a batch, by its number."""
    return keys_of(key, jnp.arange(rows, dtype=jnp.uint32))


def keys_of(key: jax.Array, numbers_B: jax.Array) -> jax.Array:
    """A key for each number, uint32 [B]."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, numbers_B)


def bucket(length: int) -> int:
    """The length that prompts are padded to: few different ones, at most a quarter longer beyond 128 tokens."""
    step = max(SHORTEST, 2 ** (length - 1).bit_length() // 8)
    return -(-length // step) * step


def parts() -> int:
    """How many parts the mesh in use splits rows into."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def padded(
    prompts: Sequence[Sequence[int]], numbers: Sequence[int], rows: int, length: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Prompts padded on the left, and filled up with empty rows; with the numbers of the rows.

    There are always as many rows as the mesh splits.
    """
    rows = -(-rows // parts()) * parts()
    input_ids = np.zeros((rows, length), np.int32)
    mask, numbers_B = np.zeros_like(input_ids), np.zeros(rows, np.uint32)
    for row, ids in enumerate(prompts):
        input_ids[row, -len(ids) :], mask[row, -len(ids) :] = ids, 1
    numbers_B[: len(prompts)] = numbers
    return {"input_ids": input_ids, "attention_mask": mask}, numbers_B


def _batch(
    prompts: Sequence[Sequence[int]], numbers: Sequence[int] | None = None, shape: tuple[int, int] | None = None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """`padded` to this shape (rows, tokens); unset = a power of two of rows, and the bucket of the longest prompt."""
    rows, length = shape or (1 << (len(prompts) - 1).bit_length(), bucket(max(map(len, prompts))))
    return padded(prompts, range(len(prompts)) if numbers is None else numbers, rows, length)


@functools.partial(jax.jit, static_argnames=("config", "sampling", "execution"))
def continued(
    config: ModelConfig,
    params: dict,
    prompt: dict[str, jax.Array],
    key: jax.Array,
    numbers_B: jax.Array,
    sampling: Sampling,
    execution: Execution,
    stops: jax.Array | np.ndarray | None = None,
) -> Drawn:
    """The one program of generation: prompts [B, T] read, [B·S, G] tokens added, whole on every process.

    prompt: as models.decoding.sample takes it. numbers_B: of the prompts, by which their random keys are made of `key`,
    uint32. stops: as models.decoding.advanced takes them; beams do not ask. The parameters are taken as they lie on the
    mesh. Compiled once for each shape and each `sampling`; the cache lives within the program, where every turn writes
    into the memory of the one before.
    """
    if sampling.beams > 1:
        assert sampling.samples == 1, "of the beams of a prompt the best is kept"
        drawn = search(config, params, prompt, sampling, execution)
    else:
        drawn = sample(config, params, prompt, keys_of(key, numbers_B), sampling, execution, stops)
    return whole(drawn)


def whole(drawn: Any) -> Any:
    """Whole on every process, for each reads all rows."""
    return jax.tree.map(lambda array: constrain(array, *(None,) * array.ndim), drawn)


@functools.partial(jax.jit, static_argnames="dtype")
def cast(params, dtype: str) -> dict:
    return cast_once(params, jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnames=("config", "sampling", "execution"))
def _begun(config, params, prompt, sampling, execution) -> State:
    return begun(config, params, prompt, sampling, execution)


@functools.partial(jax.jit, static_argnames=("config", "sampling", "execution"), donate_argnames="state")
def _advanced(config, params, state, key, numbers_B, sampling, execution) -> State:
    return advanced(config, params, state, keys_of(key, numbers_B), sampling, execution)
