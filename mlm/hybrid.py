"""One model, causal in some rows and masked in the others (GPT-BERT; Charpentier & Samuel 2024, section 2).

Both kinds of rows predict the token behind each state: in causal rows every one, seeing what came before; in the
others those that are hidden, seeing both sides. The loss is Σ over kinds of (its part of the rows) × (its mean nats a
predicted token): the mean over devices of their code, where every device has rows of one kind.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from espalier.models.config import Execution, ModelConfig
from espalier.models.heads import causal_lm_head
from espalier.models.transformer import apply
from espalier.models.vocabulary import token_logprobs
from espalier.training.step import Objective
from mlm.loss import masked_lm_objective
from mlm.masking import Vocabulary, from_before, mask_batch

if TYPE_CHECKING:
    from mlm.config import MaskingConfig

PERIOD = 10_000
"""The causal part of the rows is rounded to this part of them: the count of rows so far stays a whole number."""


def hybrid_objective(
    model: ModelConfig,
    masking: MaskingConfig,
    vocabulary: Vocabulary,
    *,
    rate: Callable,
    causal_share: float,
    execution: Execution,
    mask: Callable = mask_batch,
) -> Objective:
    """The objective of a causal `model`; rate, mask: as in `masked_lm_objective`.

    Which rows are causal is drawn for the global batch; their count is causal_share of all rows so far, to within one.
    An evaluation takes every row both ways: causal_loss, causal_accuracy and bits_per_byte are those of causal LM,
    masked_loss and masked_accuracy those of masked next-token prediction, and loss is their mean by causal_share.
    """
    mask = from_before(mask)
    both_sides = masked_lm_objective(
        dataclasses.replace(model, causal=False),
        masking,
        vocabulary,
        rate=rate,
        execution=execution,
        mask=mask,
        head="causal_lm",
    )

    def prepare(batch, key, step, train):
        if not train:
            hidden, masked = both_sides.prepare(batch, key, step, train)
            batch = batch | {"hidden_ids": hidden["input_ids"]} | {name: hidden[name] for name in SLOTS}
            return batch, (jnp.maximum(jnp.sum(batch["loss_weights"]), 1.0), masked, _rows(batch))
        mask_key, rows_key = jax.random.split(key)
        hidden = mask(batch, mask_key, rate(step, train), masking, vocabulary)
        causal_B = causal_rows(rows_key, step, batch["input_ids"].shape[0], causal_share)
        weights_BT = jnp.where(causal_B[:, None], batch["loss_weights"], _before(hidden))
        batch = batch | {
            "input_ids": jnp.where(causal_B[:, None], batch["input_ids"], hidden["input_ids"]),
            "loss_weights": weights_BT,
            "bidirectional": ~causal_B,
        }
        part = jnp.mean(causal_B.astype(jnp.float32))
        sums = (jnp.sum(jnp.where(kind_B[:, None], weights_BT, 0.0)) for kind_B in (causal_B, ~causal_B))
        scales = (one / jnp.maximum(total, 1.0) for one, total in zip((part, 1 - part), sums, strict=True))
        return batch, (*scales, _rows(batch))

    def loss(params, batch, key, norms, train):
        return (_trained if train else _measured)(params, batch, key, norms)

    def _trained(params, batch, key, norms):
        causal_scale, masked_scale, rows = norms
        weights_BT = batch["loss_weights"]
        logprob_BT, correct_BT = _next_tokens(model, params, batch, execution, key)
        scale_B1 = jnp.where(batch["bidirectional"], masked_scale, causal_scale)[:, None]
        total = -jnp.sum(scale_B1 * weights_BT * logprob_BT)
        metrics = {
            "loss": (total * rows, _rows(batch)),
            "accuracy": (jnp.sum(weights_BT * correct_BT), jnp.sum(weights_BT)),
        }
        return total, jax.lax.stop_gradient(metrics)

    def _measured(params, batch, key, norms):
        causal, masked, rows = norms
        hidden = batch | {"input_ids": batch["hidden_ids"]}
        _, sums = both_sides.loss(params, hidden, key, masked, False)
        metrics = {f"masked_{name}": sums[name] for name in ("loss", "accuracy")}
        weights_BT = batch["loss_weights"]
        logprob_BT, correct_BT = _next_tokens(model, params, batch, execution, None)
        nats, weight = -jnp.sum(weights_BT * logprob_BT), jnp.sum(weights_BT)
        size = jnp.sum(weights_BT * batch["label_bytes"].astype(jnp.float32))
        metrics |= {
            "causal_loss": (nats, weight),
            "causal_accuracy": (jnp.sum(weights_BT * correct_BT), weight),
            "bits_per_byte": (nats / math.log(2), size),
        }
        total = causal_share * nats / causal + (1 - causal_share) * sums["loss"][0] / masked
        return total, metrics | {"loss": (total * rows, _rows(batch))}

    return Objective(prepare, loss)


SLOTS = ("masked_positions", "masked_labels", "masked_weights")


def causal_rows(key: jax.Array, step, rows: int, share: float) -> jax.Array:
    """bool [B]: which rows of a (traced) step are causal, of `share` of all rows up to its end, to within one."""
    part = round(share * PERIOD)
    before = (jnp.asarray(step, jnp.int32) % PERIOD) * (rows % PERIOD) % PERIOD
    count = (before + rows) * part // PERIOD - before * part // PERIOD
    place_B = jnp.argsort(jnp.argsort(jax.random.uniform(key, (rows,))))
    return place_B < count


def _next_tokens(model: ModelConfig, params, batch: dict, execution: Execution, key):
    """(log p, whether it is the most probable one), [B, T], of the token behind each."""
    x_BTD = apply(model, params, batch, execution=execution, key=key)
    features_BTD, table_VD, bias_V = causal_lm_head(model, params, x_BTD, execution)
    return token_logprobs(
        features_BTD,
        table_VD,
        bias_V,
        batch["labels"],
        vocab_size=model.vocab_size,
        softcap=model.final_logit_softcapping,
    )


def _before(hidden: dict) -> jax.Array:
    """float32 [B, T]: 1 where the next token is one that is to be predicted."""
    row_T = jnp.zeros(hidden["input_ids"].shape[1], jnp.float32)
    places_BM = jnp.maximum(hidden["masked_positions"] - 1, 0)
    return jax.vmap(lambda at_M, weights_M: row_T.at[at_M].add(weights_M))(places_BM, hidden["masked_weights"])


def _rows(batch: dict) -> jax.Array:
    """How many rows hold a token, float32."""
    return jnp.sum(batch["segment_ids"][:, 0] > 0).astype(jnp.float32)
