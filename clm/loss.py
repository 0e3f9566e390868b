"""The causal-LM objective: maximise Σ log p(w_t | w_1 … w_{t-1}), each document by itself.

Bits per byte = Σ -log2 p(w_t) / Σ UTF-8 bytes of w_t: comparable between tokenizers (the last token of a document
counts as a token and stands for no byte).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from espalier.models.config import Execution, ModelConfig
from espalier.models.heads import causal_lm_head
from espalier.models.transformer import apply
from espalier.models.vocabulary import token_logprobs
from espalier.training.step import Objective


def causal_lm_objective(model: ModelConfig, *, execution: Execution) -> Objective:
    """The two pure functions of the objective; metrics: loss (nats a token), accuracy, bits_per_byte."""

    def prepare(batch, key, step, train):
        return batch, jnp.maximum(jnp.sum(batch["loss_weights"]), 1.0)

    def loss(params, batch, key, norms, train):
        x_BTD = apply(model, params, batch, execution=execution, key=key if train else None)
        features_BTD, table_VD, bias_V = causal_lm_head(model, params, x_BTD, execution)
        logprob_BT, correct_BT = token_logprobs(
            features_BTD,
            table_VD,
            bias_V,
            batch["labels"],
            vocab_size=model.vocab_size,
            softcap=model.final_logit_softcapping,
        )
        weights_BT = batch["loss_weights"]
        loss_sum, weight = -jnp.sum(weights_BT * logprob_BT), jnp.sum(weights_BT)
        metrics = {
            "loss": (loss_sum, weight),
            "accuracy": (jnp.sum(weights_BT * correct_BT), weight),
            "bits_per_byte": (
                loss_sum / math.log(2),
                jnp.sum(weights_BT * batch["label_bytes"].astype(jnp.float32)),
            ),
        }
        return loss_sum / norms, jax.lax.stop_gradient(metrics)

    return Objective(prepare, loss)
