"""Decoding with a key/value cache, a token a row at a time: how prompts are read, how the next token is drawn.

All is pure and runs inside any jitted function: under a mesh, with traced parameters, a key a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from espalier.models.block import Memory
from espalier.models.config import Execution, ModelConfig
from espalier.models.encoder_decoder import decode, encode
from espalier.models.heads import causal_lm_head, seq2seq_lm_head
from espalier.models.inputs import completed
from espalier.models.layers import compute_dtype
from espalier.models.transformer import DEFAULT_EXECUTION, apply, init_cache
from espalier.models.vocabulary import logits
from sharding.mesh import constrain


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
    repetition_penalty: float = 1.0
    """Scores of tokens that the row has already, its prompt included, are divided by it where they are positive, else
    multiplied (Keskar et al. 2019, as transformers does); 1 = none."""
    beams: int = 1
    """Rows that are followed at once, of which the best is kept; 1 = tokens are drawn (models.beams)."""
    length_penalty: float = 1.0
    """With beams: the log-probability of a row is divided by its length to this power; above 0 favours long rows."""
    samples: int = 1
    """S: rows that are drawn for each prompt, which is read once for all of them."""


class Drawn(NamedTuple):
    """What was added to each row, its end token included."""

    tokens_BG: Any
    """int32; -1 after the row's end."""
    logprobs_BG: Any
    """float32: log p of each token under the model itself, whatever temperature, top_k, top_p and repetition_penalty it
    was drawn by; 0 after the row's end."""
    drawn_logprobs_BG: Any = None
    """float32: log p of each token under the distribution that it was drawn from, by all of these; 0 after the row's
    end. None of beams, which draw nothing."""
    ended_B: Any = None
    """bool: whether the row ended by an end token or a stop, and not because it had G tokens. None of beams."""


class State(NamedTuple):
    """A batch of rows in the middle of being continued."""

    count_B: jax.Array
    """Tokens drawn, int32."""
    logits_BV: jax.Array
    """Of the next token, float32."""
    cache: dict
    done_B: jax.Array
    """Rows that have ended, or have G tokens."""
    seen_BV: jax.Array | None
    """Tokens that a row has, bool; None where nothing asks for them."""
    matched_B: jax.Array
    """How far the ends of rows agree with a stop: a row of `stops`, int32."""
    last: dict[str, jax.Array]
    """Segment and position of the last token of each prompt, int32 [B, 1]."""
    drawn: Drawn


def sample(
    config: ModelConfig,
    params: dict,
    prompt: dict[str, jax.Array],
    keys_B: jax.Array,
    sampling: Sampling,
    execution: Execution = DEFAULT_EXECUTION,
    stops: jax.Array | np.ndarray | None = None,
) -> Drawn:
    """Continue every row of a batch, sampling.samples times: the rows of a prompt stand one behind the other.

    prompt: a batch as `apply` takes it, of one document a row, padded on the left; a row of padding alone stays empty.
    keys_B: a random key for each prompt. What is drawn for a row depends on its prompt, its key and its number among
    the rows of its prompt alone, wherever it stands in the batch and however the batch is split. stops: as `advanced`
    takes them.
    """
    params = cast_once(params, compute_dtype(execution))

    def turn(state):
        return advanced(config, params, state, keys_B, sampling, execution, stops)

    def unfinished(state):
        return ~jnp.all(state.done_B)

    start = begun(config, params, prompt, sampling, execution)
    if sampling.samples > 1:
        start, keys_B = repeated(start, sampling.samples), sample_keys(keys_B, sampling.samples)
    return jax.lax.while_loop(unfinished, turn, start).drawn


def begun(
    config: ModelConfig, params: dict, prompt: dict[str, jax.Array], sampling: Sampling, execution: Execution
) -> State:
    """The prompts read, with room in the cache for the new tokens; nothing drawn yet."""
    prompt = {name: constrain(array, "batch", None) for name, array in completed(prompt).items()}
    batch, length = prompt["input_ids"].shape
    new, memory, dtype = sampling.max_new_tokens, None, compute_dtype(execution)
    if config.num_decoder_layers:
        # The prompt is read by the encoder, once; what is continued is the beginning of another text.
        memory = encode(config, params, prompt, execution=execution)
        cache = init_cache(config.decoder, batch, 1 + new, dtype, memory_length=length)
        prompt = beginnings(config, memory)
    else:
        cache = init_cache(config, batch, length + new, dtype)
    cache["layers"] = jax.tree.map(split_rows_and_heads, cache["layers"])
    logits_BV, cache = next_logits(config, params, prompt, cache, execution, memory)
    real_BT = prompt["segment_ids"] != 0
    seen_BV = None
    if sampling.repetition_penalty != 1:
        rows_B1 = jnp.arange(batch, dtype=jnp.int32)[:, None]
        seen_BV = jnp.zeros(logits_BV.shape, bool).at[rows_B1, prompt["input_ids"]].max(real_BT)
    last = {name: prompt[name][:, -1:] for name in ("segment_ids", "positions")}
    zeros_BG = jnp.zeros((batch, new), jnp.float32)
    none_B = jnp.zeros(batch, jnp.int32)
    drawn = Drawn(jnp.full((batch, new), -1, jnp.int32), zeros_BG, zeros_BG, none_B > 0)
    return State(none_B, logits_BV, cache, ~jnp.any(real_BT, axis=1), seen_BV, none_B, last, drawn)


def repeated(state: State, samples: int) -> State:
    """Each row of a batch so many times, one behind the other, as `begun` left it."""

    def rows(array: jax.Array, axis: int = 0) -> jax.Array:
        array = jnp.repeat(array, samples, axis=axis)
        return constrain(array, *(None,) * axis, "batch", *(None,) * (array.ndim - axis - 1))

    others = jax.tree.map(rows, state._replace(cache={}))
    return others._replace(cache=repeated_cache(state.cache, samples))


def repeated_cache(cache: dict, samples: int) -> dict:
    """A cache with each of its rows so many times."""

    def rows(cached: jax.Array) -> jax.Array:
        return split_rows_and_heads(jnp.repeat(cached, samples, axis=cached.ndim - 4))

    segments = {name: jnp.repeat(cache[name], samples, axis=0) for name in cache if name.endswith("segment_ids")}
    return cache | {"layers": jax.tree.map(rows, cache["layers"])} | segments


def sample_keys(keys_B: jax.Array, samples: int) -> jax.Array:
    """A key for each sample of each prompt, [B·S]."""
    number_S = jnp.arange(samples, dtype=jnp.uint32)
    fold = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)), in_axes=(0, None))
    return fold(keys_B, number_S).reshape(-1)


def advanced(
    config: ModelConfig,
    params: dict,
    state: State,
    keys_B: jax.Array,
    sampling: Sampling,
    execution: Execution,
    stops: jax.Array | np.ndarray | None = None,
) -> State:
    """Another token in every row that has not ended.

    stops: int [P, V], how far the end of a row agrees with a stop after a token, by how far it did before: 0 = not at
    all, -1 = a stop is complete and the row ends (predict.stops makes it).
    """
    count_B, logits_BV, done_B = state.count_B, state.logits_BV, state.done_B
    keys = jax.vmap(jax.random.fold_in)(keys_B, count_B)
    drawn_BV = drawn_from(penalised(logits_BV, state.seen_BV, sampling.repetition_penalty), sampling)
    token_B = drawn_token(drawn_BV, keys, sampling)
    matched_B = state.matched_B if stops is None else jnp.asarray(stops)[state.matched_B, token_B].astype(jnp.int32)
    ends_B = jnp.isin(token_B, jnp.asarray(sampling.end_ids, jnp.int32)) | (matched_B < 0)
    place_1G = jnp.arange(sampling.max_new_tokens, dtype=jnp.int32)[None]
    here_BG = (place_1G == count_B[:, None]) & ~done_B[:, None]

    def written(before_BG: jax.Array, new_B: jax.Array) -> jax.Array:
        return jnp.where(here_BG, new_B[:, None], before_BG)

    drawn = Drawn(
        written(state.drawn.tokens_BG, token_B),
        written(state.drawn.logprobs_BG, logprob_of(logits_BV, token_B)),
        written(state.drawn.drawn_logprobs_BG, logprob_of(drawn_BV, token_B)),
        state.drawn.ended_B | (ends_B & ~done_B),
    )
    seen_BV = state.seen_BV
    if seen_BV is not None:
        seen_BV = seen_BV.at[jnp.arange(len(token_B), dtype=jnp.int32), token_B].set(True)
    inputs = {
        "input_ids": token_B[:, None],
        "segment_ids": state.last["segment_ids"],
        "positions": state.last["positions"] + 1 + count_B[:, None],
    }
    logits_BV, cache = next_logits(config, params, inputs, state.cache, execution)
    count_B = jnp.where(done_B, count_B, count_B + 1)
    done_B |= ends_B | (count_B == sampling.max_new_tokens)
    return State(count_B, logits_BV, cache, done_B, seen_BV, jnp.maximum(matched_B, 0), state.last, drawn)


def beginnings(config: ModelConfig, memory: Memory) -> dict[str, jax.Array]:
    """What an encoder-decoder writes first, a token a row; padding where there is nothing to read."""
    segments_B1 = jnp.max(memory.segment_ids_BS, axis=1, keepdims=True)
    return {
        "input_ids": jnp.full_like(segments_B1, config.decoder_start_token_id),
        "segment_ids": segments_B1,
        "positions": jnp.zeros_like(segments_B1),
    }


def next_logits(
    config: ModelConfig,
    params: dict,
    inputs: dict,
    cache: dict,
    execution: Execution,
    memory: Memory | None = None,
) -> tuple[jax.Array, dict]:
    """Scores of the token behind `inputs`, float32 [B, V], and the cache with these. memory: of an encoder-decoder,
    with its first inputs."""
    if config.num_decoder_layers:
        x_BTD, cache = decode(config, params, inputs, memory, execution=execution, cache=cache)
        head = seq2seq_lm_head
    else:
        x_BTD, cache = apply(config, params, inputs, execution=execution, cache=cache)
        head = causal_lm_head
    features, table, bias = head(config, params, x_BTD[:, -1:], execution)
    scores_BTV = logits(features, table, bias, config.vocab_size, config.final_logit_softcapping)
    return scores_BTV[:, 0].astype(jnp.float32), cache


def penalised(scores: jax.Array, seen: jax.Array | None, penalty: float) -> jax.Array:
    """Scores [..., V] with those of seen tokens (bool) made less."""
    if seen is None:
        return scores
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def next_token(logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
    """Draw one token id a row, int32 [B], from float32 logits; -inf entries are never drawn."""
    return drawn_token(drawn_from(logits_BV, sampling), keys_B, sampling)


def drawn_from(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """The scores [B, V] whose softmax is what tokens are drawn from; -inf where it is 0."""
    if sampling.temperature == 0:
        best_B1 = jnp.argmax(logits_BV, axis=-1, keepdims=True)
        entry_1V = jnp.arange(logits_BV.shape[-1], dtype=best_B1.dtype)[None]
        return jnp.where(entry_1V == best_B1, jnp.float32(0), -jnp.inf)
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
    return logits_BV


def drawn_token(drawn_BV: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
    """One token id a row, int32 [B], by the scores of `drawn_from`."""
    if sampling.temperature == 0:
        return jnp.argmax(drawn_BV, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys_B, drawn_BV).astype(jnp.int32)


def logprob_of(scores_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    """log softmax of scores at one token a row, float32 [B]."""
    chosen_B = jnp.take_along_axis(scores_BV, token_B[:, None], axis=1)[:, 0]
    return chosen_B - jax.nn.logsumexp(scores_BV, axis=-1)


def cast_once(params: dict, dtype: jnp.dtype) -> dict:
    """Weights of matrix products and lookups in the compute type, as every layer would cast them at every token."""

    def cast(path, leaf):
        return leaf.astype(dtype) if path[-1].key in ("kernel", "embedding") else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def split_rows_and_heads(cached: jax.Array) -> jax.Array:
    """Keys or values [(R,) B, S, K, H] of a cache."""
    return constrain(cached, *(None,) * (cached.ndim - 4), "batch", None, "tensor", None)
