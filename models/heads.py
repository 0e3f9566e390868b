"""What stands on the stack: language-model heads and the classification head.

A language-model head returns what `models.vocabulary` multiplies (features, table, bias), never the logits.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cli import UserError
from models.config import Execution, ModelConfig
from models.layers import Einsum, activation, compute_dtype, dropout, make_norm, named_key

HEADS = ("masked_lm", "causal_lm", "sequence_classification")


def init_heads(config: ModelConfig, key: jax.Array, heads: tuple[str, ...], num_labels: int | None) -> dict:
    """Parameters of the heads in `heads`, by their place in the tree; a head that has none is left out."""
    unknown = [name for name in heads if name not in HEADS]
    assert not unknown, f"heads {unknown}; there are {HEADS}"
    V, D = config.padded_vocab_size, config.hidden_size
    x_BTD = jnp.zeros((1, 1, D), jnp.float32)
    params: dict = {name: {} for name in ("masked_lm", "causal_lm", "classification")}
    for name in ("masked_lm", "causal_lm"):
        if name in heads and config.head_bias:
            params[name]["bias"] = jnp.zeros((V,), jnp.float32)
    if "masked_lm" in heads:
        if not config.tie_word_embeddings:
            raise UserError("masked-LM heads share the token embedding; set tie_word_embeddings=True")
        if config.head_transform:
            transform = MaskedLMTransform(config, x_BTD.dtype)
            params["masked_lm"] |= transform.init(named_key(key, "masked_lm"), x_BTD)["params"]
    if "causal_lm" in heads and not config.tie_word_embeddings:
        init = nn.initializers.truncated_normal(config.initializer_range)
        params["causal_lm"]["kernel"] = init(named_key(key, "causal_lm"), (V, D), jnp.float32)
    if "sequence_classification" in heads:
        assert num_labels, "sequence_classification needs num_labels"
        classifier = Classifier(config, num_labels)
        segments_BT = jnp.ones((1, 1), jnp.int32)
        params["classification"] = classifier.init(named_key(key, "classification"), x_BTD, segments_BT)["params"]
    return {name: head for name, head in params.items() if head}


def masked_lm_head(config: ModelConfig, params: dict, hidden_BMD: jax.Array, execution: Execution):
    """(features_BMD, table_VD, bias_V or None) of the masked-LM scores at M positions a row."""
    head = params.get("head", {}).get("masked_lm", {})
    if config.head_transform:
        weights = {name: head[name] for name in ("transform", "norm")}
        transform: Any = MaskedLMTransform(config, compute_dtype(execution))
        hidden_BMD = transform.apply({"params": weights}, hidden_BMD)
    return hidden_BMD, params["embeddings"]["token"]["embedding"], head.get("bias")


def causal_lm_head(config: ModelConfig, params: dict, hidden_BTD: jax.Array, execution: Execution):
    """(features_BTD, table_VD, bias_V or None) of the next-token scores."""
    head = params.get("head", {}).get("causal_lm", {})
    table_VD = params["embeddings"]["token"]["embedding"] if config.tie_word_embeddings else head["kernel"]
    return hidden_BTD.astype(compute_dtype(execution)), table_VD, head.get("bias")


def classification_logits(
    config: ModelConfig,
    params: dict,
    hidden_BTD: jax.Array,
    segment_ids_BT: jax.Array,
    key: jax.Array | None = None,
) -> jax.Array:
    """Class scores, float32 [B, C], of rows that hold one example each; a key turns dropout on."""
    weights = params["head"]["classification"]
    classifier: Any = Classifier(config, weights["out"]["kernel"].shape[-1])
    return classifier.apply({"params": weights}, hidden_BTD, segment_ids_BT, key)


class MaskedLMTransform(nn.Module):
    """Dense, activation, norm: what BERT and ModernBERT put before the vocabulary."""

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BMD: jax.Array) -> jax.Array:
        c = self.config
        dense = Einsum(
            (c.hidden_size, c.hidden_size), c.head_transform_bias, c.initializer_range, self.dtype, name="transform"
        )
        return make_norm(c, self.dtype, "norm")(activation(c.hidden_act)(dense("BMD,DE->BME", x_BMD)))


class Classifier(nn.Module):
    """Encoders: first token, or the mean of all → dense, tanh (or activation and norm) → out.

    Causal models: last token → out without bias.
    """

    config: ModelConfig
    num_labels: int

    @nn.compact
    def __call__(self, x_BTD: jax.Array, segment_ids_BT: jax.Array, key: jax.Array | None = None) -> jax.Array:
        c, dtype = self.config, x_BTD.dtype
        D = c.hidden_size
        real_BT = segment_ids_BT != 0
        if c.causal or c.classifier_pooling == "cls":
            at_B = real_BT.shape[1] - 1 - real_BT[:, ::-1].argmax(1) if c.causal else real_BT.argmax(1)
            x_BMD = jnp.take_along_axis(x_BTD, at_B[:, None, None], axis=1)
        else:
            count_B1 = jnp.maximum(real_BT.sum(1, keepdims=True), 1).astype(dtype)
            x_BMD = jnp.einsum("BTD,BT->BD", x_BTD, real_BT.astype(dtype) / count_B1)[:, None]
        if not c.causal:
            bias = c.head_transform_bias or c.classifier_pooler == "tanh"
            x_BMD = Einsum((D, D), bias, c.initializer_range, dtype, name="dense")("BMD,DE->BME", x_BMD)
            if c.classifier_pooler == "tanh":
                x_BMD = jnp.tanh(x_BMD)
            else:
                x_BMD = make_norm(c, dtype, "norm")(activation(c.hidden_act)(x_BMD))
            x_BMD = dropout(x_BMD, c.hidden_dropout, key)
        out = Einsum((D, self.num_labels), not c.causal, c.initializer_range, jnp.dtype("float32"), name="out")
        return out("BMD,DC->BMC", x_BMD)[:, 0]
