"""Span corruption (Raffel et al. 2020, section 3.1.4): spans of a text are hidden, a sentinel in the place of each, and
the decoder writes each behind its sentinel.

    input   the cat <0> on the <1> today </s>      target   <0> sat <1> mat </s>

Drawn on the device for the *global* batch from one key, so hosts, meshes and micro-batches change nothing. As in T5 the
number of hidden tokens and of spans follows from the length of the row, and each way to cut them is as likely as the
others; shapes are static. Documents of a row do not see each other: a span over the edge of one is cut there, for which
SPARE places are kept in a row; those beyond stay whole. Special tokens before documents are left out.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from espalier.errors import UserError
from espalier.models.config import Execution, ModelConfig
from espalier.models.encoder_decoder import encode_decode
from espalier.models.heads import seq2seq_lm_head
from espalier.models.vocabulary import token_logprobs
from espalier.training.step import Objective

if TYPE_CHECKING:
    from mlm.config import SpanConfig

SPARE = 2
"""Spans of a row that may be cut at the edge of a document."""


class SpanVocabulary(NamedTuple):
    """What span corruption must know of the tokenizer."""

    sentinels: np.ndarray
    """int32: their ids, the first one first."""
    eos: int
    start: int
    """What the decoder reads first."""
    special_V: np.ndarray
    """bool: not part of the text."""


def counts(config: SpanConfig, tokens):
    """(hidden tokens, spans) of a text of so many tokens (2 or more), as T5 rounds them; NumPy or traced."""
    xp = jnp if isinstance(tokens, jax.Array) else np
    tokens = xp.asarray(tokens, np.float32)
    hidden = xp.clip(xp.round(tokens * np.float32(config.density)), 1, xp.maximum(tokens - 1, 1))
    spans = xp.maximum(xp.round(hidden / np.float32(config.mean_length)), 1)
    return hidden.astype(np.int32), xp.minimum(spans, xp.minimum(hidden, tokens - hidden)).astype(np.int32)


def lengths(config: SpanConfig, sequence_length: int, spare: int = SPARE) -> tuple[int, int]:
    """Tokens of what is read and of what is written, for rows of so many; both with the end token."""
    # Rounding makes neither of them grow evenly.
    tokens = np.arange(2, max(sequence_length, 2) + 1)
    hidden, spans = counts(config, tokens)
    return int((tokens - hidden + spans).max()) + 1 + spare, int((hidden + spans).max()) + 1 + spare


def sentinels_needed(config: SpanConfig, sequence_length: int) -> int:
    return int(counts(config, np.arange(2, max(sequence_length, 2) + 1))[1].max()) + SPARE


def corrupt(batch: dict, key: jax.Array, config: SpanConfig, vocabulary: SpanVocabulary) -> dict:
    """What is read and what is written of the rows of a batch.

    batch: `input_ids`, `segment_ids` [B, T]. Returns {"source": {input_ids, segment_ids}, "target": {input_ids (of the
    decoder: one behind), segment_ids, labels}}, int32, of `lengths`; 0 in segment_ids is padding.
    """
    length = batch["input_ids"].shape[1]
    shapes = lengths(config, length)
    ordinary_BT = (batch["segment_ids"] > 0) & ~jnp.asarray(vocabulary.special_V)[batch["input_ids"]]
    # The text alone, from the first place on.
    place_BT = jnp.where(ordinary_BT, jnp.cumsum(ordinary_BT, axis=1) - 1, length)
    text_BT, segment_BT = (_placed(place_BT, batch[name], length) for name in ("input_ids", "segment_ids"))
    hidden_BT = _hidden(key, jnp.sum(ordinary_BT, axis=1, dtype=jnp.int32), length, config)

    real_BT, sentinels = segment_BT > 0, jnp.asarray(vocabulary.sentinels, jnp.int32)
    before_BT = jnp.pad(hidden_BT, ((0, 0), (1, 0)))[:, :-1]
    edge_BT = segment_BT != jnp.pad(segment_BT, ((0, 0), (1, 0)))[:, :-1]
    cut_BT = hidden_BT & before_BT & edge_BT
    begins_BT = hidden_BT & ~before_BT | cut_BT & (jnp.cumsum(cut_BT, axis=1) <= SPARE)
    sentinel_BT = sentinels[jnp.maximum(jnp.cumsum(begins_BT, axis=1) - 1, 0)]

    def ended(ids_BS, segments_BS):
        """With the end token behind the last of its row."""
        count_B1 = jnp.sum(segments_BS > 0, axis=1, keepdims=True)
        last_B1 = jnp.max(segments_BS, axis=1, keepdims=True)
        here_BS = jnp.arange(ids_BS.shape[1])[None] == count_B1
        return jnp.where(here_BS, jnp.int32(vocabulary.eos), ids_BS), jnp.where(here_BS, last_B1, segments_BS)

    read_BT = real_BT & ~hidden_BT | begins_BT
    place_BT = jnp.where(read_BT, jnp.cumsum(read_BT, axis=1) - 1, shapes[0])
    shown_BT = jnp.where(begins_BT, sentinel_BT, text_BT)
    source_BS, source_segments_BS = ended(*(_placed(place_BT, x, shapes[0]) for x in (shown_BT, segment_BT)))

    place_BT = jnp.cumsum(hidden_BT, axis=1) + jnp.cumsum(begins_BT, axis=1) - 1
    own_BT, mark_BT = jnp.where(hidden_BT, place_BT, shapes[1]), jnp.where(begins_BT, place_BT - 1, shapes[1])
    # Nobody writes where another does, and all begins as 0.
    labels_BS = _placed(own_BT, text_BT, shapes[1]) + _placed(mark_BT, sentinel_BT, shapes[1])
    segments_BS = _placed(own_BT, segment_BT, shapes[1]) + _placed(mark_BT, segment_BT, shapes[1])
    labels_BS, segments_BS = ended(labels_BS, segments_BS)
    previous_BS, left_BS = (jnp.pad(x, ((0, 0), (1, 0)))[:, :-1] for x in (labels_BS, segments_BS))
    inputs_BS = jnp.where(segments_BS != left_BS, jnp.int32(vocabulary.start), previous_BS)
    return {
        "source": {"input_ids": source_BS, "segment_ids": source_segments_BS},
        "target": {"input_ids": inputs_BS, "segment_ids": segments_BS, "labels": labels_BS},
    }


def span_corruption_objective(
    model: ModelConfig, config: SpanConfig, vocabulary: SpanVocabulary, *, execution: Execution
) -> Objective:
    """Maximise Σ log p(target token | those before it, what is read); metrics: loss (nats a token), accuracy."""

    def prepare(batch, key, step, train):
        batch = corrupt(batch, key, config, vocabulary)
        return batch, jnp.maximum(jnp.sum(batch["target"]["segment_ids"] > 0).astype(jnp.float32), 1.0)

    def loss(params, batch, key, norms, train):
        source, target = batch["source"], batch["target"]
        inputs = {name: target[name] for name in ("input_ids", "segment_ids")}
        x_BTD = encode_decode(model, params, source, inputs, execution=execution, key=key if train else None)
        head = seq2seq_lm_head(model, params, x_BTD, execution)
        softcap = model.final_logit_softcapping
        logprob_BT, correct_BT = token_logprobs(*head, target["labels"], vocab_size=model.vocab_size, softcap=softcap)
        weights_BT = (target["segment_ids"] > 0).astype(jnp.float32)
        loss_sum, weight = -jnp.sum(weights_BT * logprob_BT), jnp.sum(weights_BT)
        metrics = {"loss": (loss_sum, weight), "accuracy": (jnp.sum(weights_BT * correct_BT), weight)}
        return loss_sum / norms, jax.lax.stop_gradient(metrics)

    return Objective(prepare, loss)


def vocabulary_of(tokenizer, model: ModelConfig, config: SpanConfig, sequence_length: int) -> SpanVocabulary:
    """Sentinels are <extra_id_0> … of the tokenizer, or the last SENTINELS of the model's vocabulary. UserError where
    they are too few for a row."""
    from espalier.data.tokenizer import special_ids
    from mlm.span_corruption import own_sentinels

    needed, special_V = sentinels_needed(config, sequence_length), np.zeros(model.vocab_size, bool)
    if tokenizer is None:
        found, eos = np.arange(model.vocab_size - needed, model.vocab_size)[::-1], 1
    else:
        specials = special_ids(tokenizer, need=("eos",))
        assert specials.eos is not None
        special_V[[index for index in specials.all if index < model.vocab_size]] = True
        found, eos = own_sentinels(tokenizer, model), specials.eos
    if len(found) < needed:
        raise UserError(
            f"data.sequence_length={sequence_length} has up to {needed} hidden spans, and there are {len(found)} "
            f"sentinels; try --data.sequence-length {math.floor(sequence_length * len(found) / (needed + 3))} or a "
            "larger --spans.mean-length"
        )
    return SpanVocabulary(np.asarray(found, np.int32), eos, model.decoder_start_token_id, special_V)


def _hidden(key: jax.Array, tokens_B: jax.Array, length: int, config: SpanConfig) -> jax.Array:
    """bool [B, T]: which of the first tokens_B places of each row are hidden; a row of fewer than 2 hides none.

    Both the hidden tokens and the others are cut into as many parts, which take turns, the others first.
    """
    hidden_B, spans_B = counts(config, tokens_B)
    hidden_B, spans_B = (jnp.where(tokens_B < 2, 0, x) for x in (hidden_B, spans_B))
    keys = jax.random.split(key)
    hidden_BP = _parts(keys[0], hidden_B, spans_B, length)
    others_BP = _parts(keys[1], tokens_B - hidden_B, spans_B, length)
    begin_BP = jnp.cumsum(others_BP, axis=1) + jnp.cumsum(hidden_BP, axis=1) - hidden_BP
    part_1P = jnp.arange(length, dtype=jnp.int32)[None]
    used_BP = (part_1P < spans_B[:, None]).astype(jnp.int32)
    edges_BT = _added(begin_BP, used_BP, length + 1) - _added(begin_BP + hidden_BP, used_BP, length + 1)
    return jnp.cumsum(edges_BT, axis=1)[:, :length] > 0


def _parts(key: jax.Array, items_B: jax.Array, parts_B: jax.Array, length: int) -> jax.Array:
    """Sizes of parts_B parts, each at least 1, of so many items: each way to cut equally probable; int32 [B, T]."""
    item_1T = jnp.arange(length, dtype=jnp.int32)[None]
    draw_BT = jax.random.uniform(key, (items_B.shape[0], length))
    inside_BT = (item_1T > 0) & (item_1T < items_B[:, None])
    order_BT = jnp.argsort(jnp.argsort(jnp.where(inside_BT, draw_BT, 2.0), axis=1), axis=1)
    begins_BT = inside_BT & (order_BT < parts_B[:, None] - 1)
    part_BT = jnp.cumsum(begins_BT, axis=1, dtype=jnp.int32)
    return _added(part_BT, (item_1T < items_B[:, None]).astype(jnp.int32), length)


def _added(place_BT: jax.Array, value_BT: jax.Array, length: int) -> jax.Array:
    """Values added up at their places in rows of so many; those beyond are dropped."""
    return jax.vmap(lambda at, value: jnp.zeros((length,), jnp.int32).at[at].add(value, mode="drop"))(
        place_BT, value_BT
    )


def _placed(place_BT: jax.Array, value_BT: jax.Array, length: int) -> jax.Array:
    """Values at their places, 0 elsewhere; places are distinct, but for those beyond the row, which are dropped."""
    return _added(place_BT, value_BT.astype(jnp.int32), length)
