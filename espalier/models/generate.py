"""Text generation: tokens drawn one after another with a key/value cache, all in one program.

`sample` is pure and runs inside any jitted function: under a mesh, with traced parameters, a key a row. `generate` pads
lists of token ids to a bucket of lengths and calls a program that is compiled once a bucket.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from espalier.models.config import Execution, ModelConfig
from espalier.models.heads import causal_lm_head
from espalier.models.inputs import completed
from espalier.models.layers import compute_dtype
from espalier.models.transformer import DEFAULT_EXECUTION, apply, init_cache
from espalier.models.vocabulary import logits
from sharding.mesh import BATCH_AXES, constrain

SHORTEST = 16
"""Prompts are padded to multiples of this at least."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; known when the program is compiled."""

    max_new_tokens: int
    """G: tokens added to a row that does not end before."""
    temperature: float = 1.0
    """Scores are divided by it; 0 = always the most probable token."""
    top_k: int = 0
    """Draw among the k most probable tokens (Fan et al. 2018); 0 = all."""
    top_p: float = 1.0
    """Draw among the most probable tokens that together reach this probability (Holtzman et al. 2020); 1 = all."""
    end_ids: tuple[int, ...] = ()
    """Tokens at which a row ends."""


class Drawn(NamedTuple):
    """What was added to each row, its end token included."""

    tokens_BG: Any
    """int32; -1 after the row's end."""
    logprobs_BG: Any
    """float32: log p of each token under the model itself, whatever temperature, top_k and top_p it was drawn by; 0
    after the row's end."""


def sample(
    config: ModelConfig,
    params: dict,
    prompt: dict[str, jax.Array],
    keys_B: jax.Array,
    sampling: Sampling,
    execution: Execution = DEFAULT_EXECUTION,
) -> Drawn:
    """Continue every row of a batch.

    prompt: a batch as `apply` takes it, of one document a row, padded on the left; a row of padding alone stays empty.
    keys_B: a random key for each row. What is drawn for a row depends on its prompt and key alone, wherever it
    stands in the batch and however the batch is split.
    """
    prompt = {name: constrain(array, "batch", None) for name, array in completed(prompt).items()}
    batch, length = prompt["input_ids"].shape
    new = sampling.max_new_tokens
    dtype = compute_dtype(execution)
    params = _cast_once(params, dtype)

    def step(inputs, cache):
        x_BTD, cache = apply(config, params, inputs, execution=execution, cache=cache)
        features, table, bias = causal_lm_head(config, params, x_BTD[:, -1:], execution)
        scores_BTV = logits(features, table, bias, config.vocab_size, config.final_logit_softcapping)
        return scores_BTV[:, 0].astype(jnp.float32), cache

    def turn(carry):
        count, logits_BV, cache, done_B, drawn = carry
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, count)
        token_B = next_token(logits_BV, keys, sampling)
        chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
        logprob_B = chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
        drawn = Drawn(
            drawn.tokens_BG.at[:, count].set(jnp.where(done_B, -1, token_B)),
            drawn.logprobs_BG.at[:, count].set(jnp.where(done_B, 0.0, logprob_B)),
        )
        done_B |= jnp.isin(token_B, jnp.asarray(sampling.end_ids, jnp.int32))
        inputs = {
            "input_ids": token_B[:, None],
            "segment_ids": prompt["segment_ids"][:, -1:],
            "positions": prompt["positions"][:, -1:] + 1 + count,
        }
        logits_BV, cache = step(inputs, cache)
        return count + 1, logits_BV, cache, done_B, drawn

    def unfinished(carry):
        count, _, _, done_B, _ = carry
        return (count < new) & ~jnp.all(done_B)

    cache = init_cache(config, batch, length + new, dtype)
    cache["layers"] = jax.tree.map(_split_rows_and_heads, cache["layers"])
    logits_BV, cache = step(prompt, cache)
    drawn = Drawn(jnp.full((batch, new), -1, jnp.int32), jnp.zeros((batch, new), jnp.float32))
    done_B = ~jnp.any(prompt["segment_ids"] != 0, axis=1)
    return jax.lax.while_loop(unfinished, turn, (jnp.int32(0), logits_BV, cache, done_B, drawn))[-1]


def next_token(logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
    """Draw one token id a row, int32 [B], from float32 logits; -inf entries are never drawn."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        smallest_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < smallest_B1, -jnp.inf, logits_BV)
    if sampling.top_p < 1:
        sorted_BV = jnp.flip(jnp.sort(logits_BV, axis=-1), axis=-1)
        probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
        # A token is kept while the more probable ones have not reached top_p; the first is always kept.
        kept_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV < sampling.top_p
        smallest_B1 = jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < smallest_B1, -jnp.inf, logits_BV)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def generate(
    config: ModelConfig,
    params: dict,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    sampling: Sampling,
    *,
    execution: Execution = DEFAULT_EXECUTION,
) -> Drawn:
    """Continue lists of token ids, each of at least one; NumPy arrays of as many rows.

    Under jax.set_mesh rows are split over the mesh, with parameters laid out on it. Every process gives all prompts and
    gets all rows. The model must have a position for every token of the longest prompt and for the new ones.
    """
    longest = max(map(len, prompts))
    assert config.max_length is None or longest + sampling.max_new_tokens <= config.max_length
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    input_ids = np.zeros((-(-len(prompts) // parts) * parts, bucket(longest)), np.int32)
    mask = np.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        input_ids[row, -len(ids) :], mask[row, -len(ids) :] = ids, 1
    prompt = {"input_ids": input_ids, "attention_mask": mask}
    drawn = jax.device_get(_compiled(config, params, prompt, key, sampling, execution))
    return Drawn(*(array[: len(prompts)] for array in drawn))


def row_keys(key: jax.Array, rows: int) -> jax.Array:
    """A key for each row of a batch, by its number."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(rows, dtype=jnp.uint32))


def bucket(length: int) -> int:
    """The length that prompts are padded to: few different ones, at most a quarter longer beyond 128 tokens."""
    step = max(SHORTEST, 2 ** (length - 1).bit_length() // 8)
    return -(-length // step) * step


@functools.partial(jax.jit, static_argnames=("config", "sampling", "execution"))
def _compiled(config, params, prompt, key, sampling, execution) -> Drawn:
    drawn = sample(config, params, prompt, row_keys(key, len(prompt["input_ids"])), sampling, execution)
    # Whole on every process, for each reads all rows.
    return jax.tree.map(lambda array: constrain(array, None, None), drawn)


def _cast_once(params: dict, dtype: jnp.dtype) -> dict:
    """Weights of matrix products and lookups in the compute type, as every layer would cast them at every token."""

    def cast(path, leaf):
        return leaf.astype(dtype) if path[-1].key in ("kernel", "embedding") else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def _split_rows_and_heads(cached: jax.Array) -> jax.Array:
    """Keys or values [(R,) B, S, K, H] of a cache."""
    return constrain(cached, *(None,) * (cached.ndim - 4), "batch", None, "tensor", None)
