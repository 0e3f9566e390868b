"""Beam search: several continuations of each row followed at once, the best kept at the end.

As transformers searches (`generate(num_beams=K)`, early_stopping=False), so that both find the same: of 2K candidates
or more, those among the best K that end are kept by log p / length^penalty, and a row is finished where the best open
beam, at its present length, is worse than the worst of K ended ones.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from espalier.models.config import Execution, ModelConfig
from espalier.models.decoding import (
    Drawn,
    Sampling,
    begun,
    cast_once,
    next_logits,
    penalised,
    repeated_cache,
    split_rows_and_heads,
)
from espalier.models.layers import compute_dtype
from espalier.models.transformer import DEFAULT_EXECUTION

NEVER = -1.0e9
"""The score of what must not be chosen."""


class Beams(NamedTuple):
    """K continuations of each of B rows."""

    tokens_BKG: jax.Array
    logprobs_BKG: jax.Array
    """Of each token under the model itself."""
    scores_BK: jax.Array
    """Open: Σ log p; ended: that, divided by length^penalty. In order."""

    def at(self, index_BJ: jax.Array) -> Beams:
        """Some of them, by number."""
        return Beams(*(_take(array, index_BJ) for array in self))


class Search(NamedTuple):
    count: jax.Array
    logprob_BKV: jax.Array
    """Of the next token of each open beam."""
    cache: dict
    """Of B·K rows."""
    seen_BKV: jax.Array | None
    open: Beams
    ended: Beams
    is_ended_BK: jax.Array
    improvable_B: jax.Array
    """Rows whose search goes on."""


def search(
    config: ModelConfig,
    params: dict,
    prompt: dict[str, jax.Array],
    sampling: Sampling,
    execution: Execution = DEFAULT_EXECUTION,
) -> Drawn:
    """The best of K = sampling.beams continuations of every row; arguments as in models.decoding.sample."""
    params = cast_once(params, compute_dtype(execution))
    K, G = sampling.beams, sampling.max_new_tokens
    end_ids = jnp.asarray(sampling.end_ids, jnp.int32)
    kept = max(2, 1 + len(sampling.end_ids)) * K
    start = begun(config, params, prompt, sampling, execution)
    B, V = start.logits_BV.shape
    last = {name: jnp.repeat(array, K, axis=0) for name, array in start.last.items()}

    def turn(state: Search) -> Search:
        score_BKV = penalised(state.logprob_BKV, state.seen_BKV, sampling.repetition_penalty)
        score_BC = (score_BKV + state.open.scores_BK[:, :, None]).reshape(B, K * V)
        best_BJ, index_BJ = jax.lax.top_k(score_BC, kept)
        beam_BJ, token_BJ = index_BJ // V, (index_BJ % V).astype(jnp.int32)
        logprob_BJ = jnp.take_along_axis(state.logprob_BKV.reshape(B, K * V), index_BJ, axis=1)
        found = state.open.at(beam_BJ)
        found = Beams(
            found.tokens_BKG.at[:, :, state.count].set(token_BJ),
            found.logprobs_BKG.at[:, :, state.count].set(logprob_BJ),
            best_BJ,
        )
        length = (state.count + 1).astype(jnp.float32)
        ends_BJ = jnp.isin(token_BJ, end_ids) | (state.count + 1 == G)

        # Those that end, if they are among the first K, beside those that ended before.
        among_BJ = ends_BJ & (jnp.arange(kept) < K)[None] & state.improvable_B[:, None]
        ended = found._replace(
            scores_BK=jnp.where(among_BJ, best_BJ / length**sampling.length_penalty, jnp.float32(NEVER))
        )
        both = Beams(*(jnp.concatenate(pair, axis=1) for pair in zip(state.ended, ended, strict=True)))
        _, order_BK = jax.lax.top_k(both.scores_BK, K)
        is_ended_BK = _take(jnp.concatenate([state.is_ended_BK, among_BJ], axis=1), order_BK)
        ended = both.at(order_BK)

        # The best K that go on.
        open_BJ = best_BJ + jnp.where(ends_BJ, jnp.float32(NEVER), 0.0)
        _, order_BK = jax.lax.top_k(open_BJ, K)
        going = found._replace(scores_BK=open_BJ).at(order_BK)
        beam_BK, token_BK = _take(beam_BJ, order_BK), _take(token_BJ, order_BK)
        possible_B1 = going.scores_BK[:, :1] / length**sampling.length_penalty
        worst_BK = jnp.where(is_ended_BK, ended.scores_BK.min(axis=1, keepdims=True), jnp.float32(NEVER))
        improvable_B = state.improvable_B & jnp.any(possible_B1 > worst_BK, axis=1)

        cache = state.cache | {"layers": jax.tree.map(lambda cached: _reorder(cached, beam_BK), state.cache["layers"])}
        seen_BKV = state.seen_BKV
        if seen_BKV is not None:
            rows_B1, beams_1K = jnp.arange(B)[:, None], jnp.arange(K)[None]
            seen_BKV = _take(seen_BKV, beam_BK).at[rows_B1, beams_1K, token_BK].set(True)
        inputs = {
            "input_ids": token_BK.reshape(B * K, 1),
            "segment_ids": last["segment_ids"],
            "positions": last["positions"] + 1 + state.count,
        }
        logits_RV, cache = next_logits(config, params, inputs, cache, execution)
        logprob_BKV = jax.nn.log_softmax(logits_RV).reshape(B, K, V)
        return Search(state.count + 1, logprob_BKV, cache, seen_BKV, going, ended, is_ended_BK, improvable_B)

    def unfinished(state: Search):
        return (state.count < G) & jnp.any(state.improvable_B)

    def repeated(array, axis=0):
        return jnp.repeat(array, K, axis=axis)

    cache = repeated_cache(start.cache, K)
    none = Beams(
        jnp.full((B, K, G), -1, jnp.int32), jnp.zeros((B, K, G), jnp.float32), jnp.full((B, K), NEVER, jnp.float32)
    )
    # At first the beams are the same: one of them counts.
    first = none._replace(scores_BK=none.scores_BK.at[:, 0].set(0.0))
    logprob_BKV = repeated(jax.nn.log_softmax(start.logits_BV)[:, None], 1)
    seen_BKV = None if start.seen_BV is None else repeated(start.seen_BV[:, None], 1)
    state = Search(jnp.int32(0), logprob_BKV, cache, seen_BKV, first, none, jnp.zeros((B, K), bool), ~start.done_B)
    ended = jax.lax.while_loop(unfinished, turn, state).ended
    return Drawn(ended.tokens_BKG[:, 0], ended.logprobs_BKG[:, 0])


def _take(array: jax.Array, index_BJ: jax.Array) -> jax.Array:
    """array [B, K, …] → [B, J, …]: in each row those with these numbers."""
    index = index_BJ.reshape(*index_BJ.shape, *(1,) * (array.ndim - 2))
    return jnp.take_along_axis(array, index, axis=1)


def _reorder(cached: jax.Array, beam_BK: jax.Array) -> jax.Array:
    """Keys or values [(R,) B·K, S, H, …] in the order of the beams that go on."""
    B, K = beam_BK.shape
    leading = cached.shape[: cached.ndim - 4]
    rows = cached.reshape(*leading, B, K, *cached.shape[len(leading) + 1 :])
    index = beam_BK.reshape(*(1,) * len(leading), B, K, 1, 1, 1)
    return split_rows_and_heads(jnp.take_along_axis(rows, index, axis=len(leading) + 1).reshape(cached.shape))
