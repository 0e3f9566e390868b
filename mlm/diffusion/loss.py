"""The objective of masked diffusion (Sahoo et al. 2024, eq. 10; Nie et al. 2025, eq. 3): E_t [1/t Σ −log p(hidden)].

It is masked LM in which the part t of the tokens that is hidden is drawn from U(0, 1) for each row. The expectation is
an upper bound of −log p(row), for p the mean over all orders in which tokens could be written one by one (Uria et al.
2014; Hoogeboom et al. 2022): a set of k of the n tokens is hidden with the weight ∫ tᵏ⁻¹(1−t)ⁿ⁻ᵏ dt = (k−1)!(n−k)!/n!.
That is as if k were uniform in 1 … n, the set uniform among those of k tokens, and the weight n/k, which is how it is
drawn here: a rate near 0 would hide no token or weigh one by its inverse, whose variance has no bound.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from espalier.models.config import Execution, ModelConfig
from espalier.training.step import Objective
from mlm.config import MaskingConfig
from mlm.loss import masked_lm_objective
from mlm.masking import Vocabulary, choose


def diffusion_objective(
    model: ModelConfig, vocabulary: Vocabulary, bytes_V: np.ndarray, *, execution: Execution
) -> Objective:
    """The objective. bytes_V: int [V], what each token stands for.

    Metrics, both upper bounds given how long each document is: loss (nats a token), bits_per_byte_bound; and accuracy
    at the hidden tokens, weighted as they are in the loss.
    """
    one = masked_lm_objective(
        model,
        MaskingConfig(),
        vocabulary,
        rate=lambda step, train: None,
        execution=execution,
        mask=lambda batch, key, rate, config, vocabulary: noised(batch, key, vocabulary),
    )

    def prepare(batch, key, step, train):
        ordinary_BT = ordinary(batch, vocabulary)
        sizes_BT = jnp.asarray(bytes_V, jnp.float32)[batch["input_ids"]]
        bytes_B = jnp.sum(jnp.where(ordinary_BT, sizes_BT, 0.0), axis=1)
        batch, norms = one.prepare(batch, key, step, train)
        return batch | {"bytes": bytes_B}, norms

    def loss(params, batch, key, norms, train):
        total, metrics = one.loss(params, batch, key, norms, train)
        nats, _ = metrics["loss"]
        return total, {**metrics, "bits_per_byte_bound": (nats / math.log(2), jnp.sum(batch["bytes"]))}

    return dataclasses.replace(one, prepare=prepare, loss=loss)


def noised(batch: dict, key: jax.Array, vocabulary: Vocabulary) -> dict:
    """Hide k of the n ordinary tokens of each row, k uniform in 1 … n, all as [MASK].

    As `mlm.masking.mask_batch` returns it, with M = T places; weights are n/k in the k used ones, so that those of a
    row add up to n. The parts k/n of the rows of a batch are spread evenly (Kingma et al. 2021, appendix I.1).
    """
    count_key, choose_key = jax.random.split(key)
    input_BT = batch["input_ids"]
    rows, length = input_BT.shape
    count_B1 = jnp.sum(ordinary(batch, vocabulary), axis=1, keepdims=True, dtype=jnp.float32)
    place_B1 = (jnp.arange(rows, dtype=jnp.float32)[:, None] + jax.random.uniform(count_key)) / rows
    hidden_B1 = jnp.clip(jnp.ceil(place_B1 * count_B1), 1.0, jnp.maximum(count_B1, 1.0))
    part_B1 = hidden_B1 / jnp.maximum(count_B1, 1.0)
    positions_BM, weights_BM = choose(choose_key, batch, part_B1, length, False, vocabulary)
    labels_BM = jnp.take_along_axis(input_BT, positions_BM, axis=1)
    hidden_BM = jnp.where(weights_BM > 0, vocabulary.mask_id, labels_BM)
    return batch | {
        "input_ids": jax.vmap(lambda row, at, values: row.at[at].set(values))(input_BT, positions_BM, hidden_BM),
        "masked_positions": positions_BM,
        "masked_labels": labels_BM,
        "masked_weights": weights_BM / part_B1,
    }


def ordinary(batch: dict, vocabulary: Vocabulary) -> jax.Array:
    """Which tokens are hidden and scored, bool [B, T]: all but special ones."""
    return jnp.asarray(vocabulary.ordinary_V)[batch["input_ids"]] & (batch["segment_ids"] > 0)
