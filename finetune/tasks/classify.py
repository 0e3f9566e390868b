"""The classification objective: maximise Σ log p(label | text) over the examples of a batch.

Encoders read the label off their first token or the mean of all, causal models off their last (models.heads).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from models.config import Execution, ModelConfig
from models.heads import classification_logits
from models.transformer import apply
from training.step import Objective


def class_logits(model: ModelConfig, params, batch: dict, execution: Execution, key: jax.Array | None = None):
    """Class scores, float32 [B, C]; a key turns dropout on."""
    body_key, head_key = (None, None) if key is None else jax.random.split(key)
    x_BTD = apply(model, params, batch, execution=execution, key=body_key)
    return classification_logits(model, params, x_BTD, batch["segment_ids"], head_key)


def classification_objective(model: ModelConfig, *, execution: Execution) -> Objective:
    """The two pure functions of the objective; metrics: loss (nats an example), accuracy.

    batch: also `labels` int32 [B] and `example_weights` float32 [B], 0 for rows that count nothing.
    """

    def prepare(batch, key, step):
        return batch, jnp.maximum(jnp.sum(batch["example_weights"]), 1.0)

    def loss_fn(trainable, frozen, batch, key, norms):
        logits_BC = class_logits(model, trainable | frozen, batch, execution, key)
        labels_B, weights_B = batch["labels"], batch["example_weights"]
        logprob_B = jnp.take_along_axis(jax.nn.log_softmax(logits_BC), labels_B[:, None], axis=1)[:, 0]
        correct_B = (jnp.argmax(logits_BC, axis=1) == labels_B).astype(jnp.float32)
        loss_sum, weight = -jnp.sum(weights_B * logprob_B), jnp.sum(weights_B)
        metrics = {"loss": (loss_sum, weight), "accuracy": (jnp.sum(weights_B * correct_B), weight)}
        return loss_sum / norms, jax.lax.stop_gradient(metrics)

    return Objective(prepare, loss_fn)
