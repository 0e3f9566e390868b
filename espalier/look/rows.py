"""Many texts as examples with what is right for them, and the model's loss on each: what heads are judged by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from espalier.data.examples import Example
from espalier.data.tokenizer import special_ids
from espalier.errors import UserError
from espalier.look.asked import refuse_hidden_from_before
from espalier.models.config import Execution, ModelConfig
from espalier.models.heads import causal_lm_head, masked_lm_head, sequence_logits
from espalier.models.taps import Taps
from espalier.models.transformer import apply
from espalier.models.vocabulary import token_logprobs
from espalier.predict.loaded import LoadedModel

MASKED = 0.15
"""The part of a row's tokens that is masked, each by the mask (Devlin et al. 2019)."""
HEADS = "attention.heads"


class Losses(NamedTuple):
    nats_B: jax.Array
    """−log p of what is right; of a language model the mean over the row's tokens."""
    right_B: jax.Array
    """1.0 where it is the most probable; of a language model the mean."""


def labelled_rows(examples: Sequence[Example], labels: Sequence[int]) -> list[Example]:
    """Examples of a classifier, with their classes."""
    pairs = zip(examples, labels, strict=True)
    return [example._replace(of_row={"labels": np.int32(label)}, of_tokens={}) for example, label in pairs]


def text_rows(model: LoadedModel, ids: Any, length: int, count: int, seed: int = 0) -> list[Example]:
    """At most `count` rows of `length` tokens for a language model, out of the tokens of running text.

    A masked LM has 15 % of a row's tokens to find, all replaced by the mask; a causal one every token but the first.
    UserError where the text is too short for one row.
    """
    refuse_hidden_from_before(model)
    specials = special_ids(model.tokenizer, need=("bos",) if model.config.causal else ("cls", "sep", "mask"))
    room = length - (1 if model.config.causal else 2)
    rows = np.array(ids[: len(ids) // room * room][: count * room], np.int32).reshape(-1, room)
    if not len(rows):
        raise UserError(f"the text has {len(ids):,} tokens, and a row {room:,}; give more text, or a smaller length")
    if model.config.causal:
        assert specials.bos is not None
        whole = np.pad(rows, ((0, 0), (1, 0)), constant_values=specials.bos)
        places = np.arange(room, dtype=np.int32)
        targets = [{"places": places, "labels": row} for row in rows]
    else:
        assert specials.cls is not None and specials.sep is not None and specials.mask is not None
        whole = np.pad(rows, ((0, 0), (1, 1)))
        whole[:, 0], whole[:, -1] = specials.cls, specials.sep
        random, hidden = np.random.default_rng(seed), max(1, round(MASKED * room))
        targets = []
        for row in whole:
            places = np.sort(random.choice(room, hidden, replace=False) + 1).astype(np.int32)
            targets.append({"places": places, "labels": row[places].copy()})
            row[places] = specials.mask
    return [Example(row, np.zeros(length, np.int32), of_row=of) for row, of in zip(whole, targets, strict=True)]


def losses(
    config: ModelConfig, head: str, execution: Execution, params: Any, batch: dict, gates_LBN: jax.Array
) -> Losses:
    """Of rows with `labels` (and `places`), each head's output being multiplied by its gate."""

    def gated(x_BTNH: jax.Array, gate_BN: jax.Array) -> jax.Array:
        return x_BTNH * gate_BN[:, None, :, None].astype(x_BTNH.dtype)

    taps = Taps(change={HEADS: gated}, given={HEADS: gates_LBN})
    x_BTD, _ = apply(config, params, batch, execution=execution, taps=taps)
    labels = batch["labels"]
    if head == "sequence_classification":
        logprobs_BC = jax.nn.log_softmax(sequence_logits(config, params, x_BTD, batch["segment_ids"]))
        nats_B = -jnp.take_along_axis(logprobs_BC, labels[:, None], axis=-1)[:, 0]
        return Losses(nats_B, (logprobs_BC.argmax(-1) == labels).astype(jnp.float32))
    x_BMD = jnp.take_along_axis(x_BTD, batch["places"][..., None], axis=1)
    language_model = masked_lm_head if head == "masked_lm" else causal_lm_head
    features, table, bias = language_model(config, params, x_BMD, execution)
    size, cap = config.vocab_size, config.final_logit_softcapping
    logprobs_BM, right_BM = token_logprobs(features, table, bias, labels, vocab_size=size, softcap=cap)
    return Losses(-logprobs_BM.mean(-1), right_BM.mean(-1))
