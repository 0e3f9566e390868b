"""Heads on the stack: language models, classifiers of sequences, tokens and spans, embeddings of texts.

A language-model head returns what `models.vocabulary` multiplies (features, table, bias), never the logits. The
parameters of a head stand under its name: head/<name>/…
"""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from espalier.errors import UserError
from espalier.models.config import Execution, ModelConfig
from espalier.models.layers import Einsum, activation, compute_dtype, dropout, make_norm, named_key, product_dtype

LANGUAGE_MODELS = ("masked_lm", "causal_lm")
"""Of one stack."""
WRITERS = (*LANGUAGE_MODELS, "seq2seq_lm")
"""Heads that score the vocabulary; the last one stands on the decoder of an encoder-decoder."""
HEADS = (
    *WRITERS,
    "sequence_classification",
    "token_classification",
    "question_answering",
    "replaced_token_detection",
    "embedding",
    "rationale",
)


def init_heads(config: ModelConfig, key: jax.Array, heads: tuple[str, ...]) -> dict:
    """Parameters of the heads in `heads`, by name; a head that has none is left out."""
    unknown = [name for name in heads if name not in HEADS]
    assert not unknown, f"heads {unknown}; there are {HEADS}"
    c, V = config, config.padded_vocab_size
    x_BTD = jnp.zeros((1, 1, c.hidden_size), jnp.float32)
    segments_BT = jnp.ones((1, 1), jnp.int32)
    params: dict = {name: {} for name in heads}
    init = nn.initializers.truncated_normal(c.initializer_range)
    for name in set(heads) & set(WRITERS):
        if c.head_bias:
            params[name]["bias"] = jnp.zeros((V,), jnp.float32)
    if "masked_lm" in heads:
        if c.head_transform:
            transform = MaskedLMTransform(c, x_BTD.dtype)
            params["masked_lm"] |= transform.init(named_key(key, "masked_lm"), x_BTD)["params"]
        if not c.tie_word_embeddings:
            key_of_kernel = named_key(key, "masked_lm/kernel")
            params["masked_lm"]["kernel"] = init(key_of_kernel, (V, c.embedding_width), jnp.float32)
    for name in {"causal_lm", "seq2seq_lm"} & set(heads):
        if not c.tie_word_embeddings:
            params[name]["kernel"] = init(named_key(key, name), (V, c.hidden_size), jnp.float32)
    modules: dict[str, tuple[Any, tuple]] = {
        "sequence_classification": (SequenceClassifier(c), (x_BTD, segments_BT)),
        "token_classification": (TokenClassifier(c, len(c.labels)), (x_BTD,)),
        "question_answering": (TokenClassifier(c, 2), (x_BTD,)),
        "replaced_token_detection": (ReplacedTokenDetector(c), (x_BTD,)),
        "rationale": (TokenClassifier(c, 2), (x_BTD,)),
    }
    for name in modules.keys() & set(heads):
        if name.endswith("classification"):
            assert c.labels, f"{name} needs config.labels"
        module, inputs = modules[name]
        params[name] = module.init(named_key(key, name), *inputs)["params"]
    if "embedding" in heads and has_pooler(c):
        pooler = Pooler(c, x_BTD.dtype)
        params["pooler"] = pooler.init(named_key(key, "pooler"), x_BTD)["params"]
    return {name: head for name, head in params.items() if head}


def bare_head(config: ModelConfig) -> str | None:
    """The language-model head that has no parameters of its own; None where it has some."""
    if not config.tie_word_embeddings or config.head_bias:
        return None
    if config.num_decoder_layers:
        return "seq2seq_lm"
    if config.head_transform and not config.causal:
        return None
    return "causal_lm" if config.causal else "masked_lm"


def has_pooler(config: ModelConfig) -> bool:
    """Whether models of this kind pool their first token by a layer of its own (BERT, RoBERTa)."""
    return not config.causal and not config.num_decoder_layers and config.classifier_pooler == "tanh"


def masked_lm_head(config: ModelConfig, params: dict, hidden_BMD: jax.Array, execution: Execution):
    """(features_BME, table_VE, bias_V or None) of the masked-LM scores at M positions a row."""
    head = params.get("head", {}).get("masked_lm", {})
    if config.head_transform:
        weights = {name: head[name] for name in ("transform", "norm")}
        transform: Any = MaskedLMTransform(config, compute_dtype(execution), product_dtype(execution))
        hidden_BMD = transform.apply({"params": weights}, hidden_BMD)
    table_VE = params["embeddings"]["token"]["embedding"] if config.tie_word_embeddings else head["kernel"]
    return hidden_BMD.astype(product_dtype(execution)), table_VE, head.get("bias")


def causal_lm_head(config: ModelConfig, params: dict, hidden_BTD: jax.Array, execution: Execution):
    """(features_BTD, table_VD, bias_V or None) of the next-token scores."""
    return _next_token_head(config, params, "causal_lm", hidden_BTD, execution)


def seq2seq_lm_head(config: ModelConfig, params: dict, hidden_BTD: jax.Array, execution: Execution):
    """(features_BTD, table_VD, bias_V or None) of the next-token scores of an encoder-decoder."""
    if config.scale_decoder_outputs:
        hidden_BTD = hidden_BTD * jnp.asarray(config.hidden_size**-0.5, hidden_BTD.dtype)
    return _next_token_head(config, params, "seq2seq_lm", hidden_BTD, execution)


def _next_token_head(config: ModelConfig, params: dict, name: str, hidden_BTD: jax.Array, execution: Execution):
    head = params.get("head", {}).get(name, {})
    table_VD = params["embeddings"]["token"]["embedding"] if config.tie_word_embeddings else head["kernel"]
    return hidden_BTD.astype(product_dtype(execution)), table_VD, head.get("bias")


def hidden_token_head(
    config: ModelConfig, head: str, params: dict, x_BTD: jax.Array, positions_BM: jax.Array, execution: Execution
):
    """(features_BME, table_VE, bias_V or None) of the scores of the tokens hidden at these positions.

    A masked_lm head reads the state at the position itself, a causal_lm one the state before it: masked next-token
    prediction (BehnamGhader et al. 2024, section 2.1). What position 0 has there means nothing.
    """
    masked = head == "masked_lm"
    at_BM = positions_BM if masked else jnp.maximum(positions_BM - 1, 0)
    hidden_BMD = jnp.take_along_axis(x_BTD, at_BM[:, :, None], axis=1)
    return (masked_lm_head if masked else causal_lm_head)(config, params, hidden_BMD, execution)


def sequence_logits(
    config: ModelConfig,
    params: dict,
    hidden_BTD: jax.Array,
    segment_ids_BT: jax.Array,
    key: jax.Array | None = None,
    examples: int | None = None,
) -> jax.Array:
    """Class scores, float32 [B, C], of rows that hold one example each; a key turns dropout on.

    examples: E, where each row holds so many at most, as segments 1 … E; then [B, E, C].
    """
    classifier: Any = SequenceClassifier(config)
    weights = params["head"]["sequence_classification"]
    scores_BMC = classifier.apply({"params": weights}, hidden_BTD, segment_ids_BT, key, examples)
    return scores_BMC if examples else scores_BMC[:, 0]


def token_logits(config: ModelConfig, params: dict, hidden_BTD: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Class scores of every token, float32 [B, T, C]; a key turns dropout on."""
    classifier: Any = TokenClassifier(config, len(config.labels))
    return classifier.apply({"params": params["head"]["token_classification"]}, hidden_BTD, key)


def span_logits(config: ModelConfig, params: dict, hidden_BTD: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Scores of every token as the start and the end of the answer, float32 [B, T, 2]; a key turns dropout on."""
    classifier: Any = TokenClassifier(config, 2)
    return classifier.apply({"params": params["head"]["question_answering"]}, hidden_BTD, key)


def gate_logits(config: ModelConfig, params: dict, hidden_BTD: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Scores of every token from which the gate of its word is made (models.gates), float32 [B, T, 2]; a key turns
    dropout on."""
    classifier: Any = TokenClassifier(config, 2)
    return classifier.apply({"params": params["head"]["rationale"]}, hidden_BTD, key)


def replaced_logits(config: ModelConfig, params: dict, hidden_BTD: jax.Array) -> jax.Array:
    """Log-odds that each token was replaced, float32 [B, T] (Clark et al. 2020, section 2)."""
    detector: Any = ReplacedTokenDetector(config)
    return detector.apply({"params": params["head"]["replaced_token_detection"]}, hidden_BTD)


def embed_rows(
    config: ModelConfig,
    params: dict,
    hidden_BTD: jax.Array,
    segment_ids_BT: jax.Array,
    pooling: Literal["mean", "first", "last", "pooler"] = "mean",
) -> jax.Array:
    """An embedding of each row [B, D]: the mean of its tokens, its first or last one, or BERT's pooler on the first.

    Rows hold one text each. UserError for the pooler of a model that came without.
    """
    if pooling == "mean":
        return mean_of_row(hidden_BTD, segment_ids_BT)[:, 0]
    x_BMD = token_of_row(hidden_BTD, segment_ids_BT, last=pooling == "last")
    if pooling == "pooler":
        if "pooler" not in params.get("head", {}):
            raise UserError("this model has no pooler; take pooling='mean' or 'first'")
        pooler: Any = Pooler(config, hidden_BTD.dtype)
        x_BMD = pooler.apply({"params": params["head"]["pooler"]}, x_BMD)
    return x_BMD[:, 0]


def mean_of_row(x_BTD: jax.Array, segment_ids_BT: jax.Array, examples: int | None = None) -> jax.Array:
    """The mean over the tokens of each row, [B, 1, D], or over those of each segment up to `examples`, [B, E, D]."""
    if examples:
        own_BET = segment_ids_BT[:, None] == jnp.arange(1, examples + 1)[:, None]
        count_BE1 = jnp.maximum(own_BET.sum(2, keepdims=True), 1).astype(x_BTD.dtype)
        return jnp.einsum("BTD,BET->BED", x_BTD, own_BET.astype(x_BTD.dtype) / count_BE1)
    real_BT = segment_ids_BT != 0
    count_B1 = jnp.maximum(real_BT.sum(1, keepdims=True), 1).astype(x_BTD.dtype)
    return jnp.einsum("BTD,BT->BD", x_BTD, real_BT.astype(x_BTD.dtype) / count_B1)[:, None]


def token_of_row(x_BTD: jax.Array, segment_ids_BT: jax.Array, *, last: bool, examples: int | None = None) -> jax.Array:
    """The first or last real token of each row, [B, 1, D], or of each segment up to `examples`, [B, E, D]."""
    if examples:
        own_BET = segment_ids_BT[:, None] == jnp.arange(1, examples + 1)[:, None]
        at_BE = own_BET.shape[2] - 1 - own_BET[:, :, ::-1].argmax(2) if last else own_BET.argmax(2)
        return jnp.take_along_axis(x_BTD, at_BE[:, :, None], axis=1)
    real_BT = segment_ids_BT != 0
    at_B = real_BT.shape[1] - 1 - real_BT[:, ::-1].argmax(1) if last else real_BT.argmax(1)
    return jnp.take_along_axis(x_BTD, at_B[:, None, None], axis=1)


class MaskedLMTransform(nn.Module):
    """Dense, activation, norm: what BERT and ModernBERT put before the vocabulary."""

    config: ModelConfig
    dtype: jnp.dtype
    factors: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x_BMD: jax.Array) -> jax.Array:
        c = self.config
        shape = (c.hidden_size, c.embedding_width)
        kind = c.head_transform_bias, c.initializer_range, self.dtype
        dense = Einsum(shape, *kind, factors=self.factors, name="transform")
        return make_norm(c, self.dtype, "norm")(activation(c.hidden_act)(dense("BMD,DE->BME", x_BMD)))


class Pooler(nn.Module):
    """Dense and tanh (Devlin et al. 2019)."""

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BMD: jax.Array) -> jax.Array:
        D = self.config.hidden_size
        return jnp.tanh(
            Einsum((D, D), True, self.config.initializer_range, self.dtype, name="dense")("BMD,DE->BME", x_BMD)
        )


class SequenceClassifier(nn.Module):
    """Encoders: first token, or the mean of all → dense, activation (and norm) → out; or the mean after `out` (late).

    Causal models: last token → out without bias.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        segment_ids_BT: jax.Array,
        key: jax.Array | None = None,
        examples: int | None = None,
    ) -> jax.Array:
        c = self.config
        late = not c.causal and c.classifier_pooling == "late"
        if late:
            x_BMD = x_BTD
        elif c.causal or c.classifier_pooling == "cls":
            x_BMD = token_of_row(x_BTD, segment_ids_BT, last=c.causal, examples=examples)
        else:
            x_BMD = mean_of_row(x_BTD, segment_ids_BT, examples)
        if not c.causal:
            x_BMD = _transformed(c, x_BMD)
            x_BMD = dropout(x_BMD, c.hidden_dropout, key)
        scores_BMC = _scores(c, len(c.labels), x_BMD, bias=not c.causal)
        return mean_of_row(scores_BMC, segment_ids_BT, examples) if late else scores_BMC


class TokenClassifier(nn.Module):
    """Scores of every token: out, after dense, activation and norm where the family classifies that way."""

    config: ModelConfig
    outputs: int

    @nn.compact
    def __call__(self, x_BTD: jax.Array, key: jax.Array | None = None) -> jax.Array:
        c = self.config
        if not c.causal and c.classifier_pooler == "transform":
            x_BTD = _transformed(c, x_BTD)
        return _scores(c, self.outputs, dropout(x_BTD, c.hidden_dropout, key), bias=True)


class ReplacedTokenDetector(nn.Module):
    """Dense, activation, out."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        dense = Einsum((c.hidden_size, c.hidden_size), True, c.initializer_range, x_BTD.dtype, name="dense")
        return _scores(c, 1, activation(c.hidden_act)(dense("BTD,DE->BTE", x_BTD)), bias=True)[:, :, 0]


def _transformed(c: ModelConfig, x_BMD: jax.Array) -> jax.Array:
    whole = c.classifier_pooler == "transform"
    bias = c.head_transform_bias or not whole
    dense = Einsum((c.hidden_size, c.hidden_size), bias, c.initializer_range, x_BMD.dtype, name="dense")
    x_BMD = activation(c.hidden_act if whole else c.classifier_pooler)(dense("BMD,DE->BME", x_BMD))
    return make_norm(c, x_BMD.dtype, "norm")(x_BMD) if whole else x_BMD


def _scores(c: ModelConfig, outputs: int, x_BMD: jax.Array, *, bias: bool) -> jax.Array:
    shape = (c.hidden_size, outputs)
    return Einsum(shape, bias, c.initializer_range, jnp.dtype("float32"), name="out")("BMD,DC->BMC", x_BMD)
