"""ModernBERT (Warner et al. 2024): pre-norm encoder without biases, GeGLU, rotary, every third layer global."""

from typing import Any

from espalier.errors import UserError
from espalier.models.config import ModelConfig
from espalier.models.families import Family, kinds_of, layer_types, local_theta, read_rope, stacked, write_rope

MODERNBERT_BASE = ModelConfig(
    model_type="modernbert",
    vocab_size=50368,
    num_hidden_layers=22,
    intermediate_size=1152,
    gated_mlp=True,
    norm_position="pre",
    norm_bias=False,
    norm_eps=1e-5,
    final_norm=True,
    first_attention_norm=False,
    attention_bias=False,
    mlp_bias=False,
    position_embedding="rotary",
    max_position_embeddings=8192,
    rope_theta=160_000.0,
    local_rope_theta=10_000.0,
    prefix_layers=("global",),
    layer_period=("local", "local", "global"),
    sliding_window=128,
    head_transform_bias=False,
    classifier_pooler="transform",
    hidden_dropout=0.0,
    attention_dropout=0.0,
)


def _read(hf: Any) -> dict[str, Any]:
    if hf.classifier_activation != hf.hidden_activation:
        raise UserError(
            f"classifier_activation={hf.classifier_activation!r} is not supported beside hidden_activation="
            f"{hf.hidden_activation!r}; they must be the same"
        )
    return {
        **stacked(kinds_of(hf.layer_types), first_apart=True),
        **read_rope(hf.rope_parameters["full_attention"]),
        "local_rope_theta": local_theta(hf.rope_parameters["sliding_attention"]),
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    local = config.rope_theta if config.local_rope_theta is None else config.local_rope_theta
    return {
        "layer_types": layer_types(config),
        "rope_parameters": {
            "full_attention": write_rope(config),
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
        "embedding_dropout": config.hidden_dropout,
        "mlp_dropout": config.hidden_dropout,
        "classifier_dropout": config.hidden_dropout,
        "classifier_activation": config.hidden_act,
    }


HEAD = {"head.dense.weight": "dense/kernel: O D -> D O", "head.dense.bias": "dense/bias: O"}
NORM = {"head.norm.weight": "norm/scale: D", "head.norm.bias": "norm/bias: D"}
CLASSIFIER = HEAD | NORM | {"classifier.weight": "out/kernel: C D -> D C", "classifier.bias": "out/bias: C"}

FAMILIES = {
    "modernbert": Family(
        base=MODERNBERT_BASE,
        classes={
            "masked_lm": "ModernBertForMaskedLM",
            "sequence_classification": "ModernBertForSequenceClassification",
            "token_classification": "ModernBertForTokenClassification",
            "question_answering": "ModernBertForQuestionAnswering",
            "embedding": "ModernBertModel",
        },
        keys={
            "vocab_size": "vocab_size",
            "hidden_size": "hidden_size",
            "num_hidden_layers": "num_hidden_layers",
            "num_attention_heads": "num_attention_heads",
            "intermediate_size": "intermediate_size",
            "hidden_act": "hidden_activation",
            "norm_eps": "norm_eps",
            "norm_bias": "norm_bias",
            "attention_bias": "attention_bias",
            "mlp_bias": "mlp_bias",
            "max_position_embeddings": "max_position_embeddings",
            "sliding_window": "local_attention",
            "head_bias": "decoder_bias",
            "head_transform_bias": "classifier_bias",
            "classifier_pooling": "classifier_pooling",
            "attention_dropout": "attention_dropout",
            "hidden_dropout": "mlp_dropout",
            "initializer_range": "initializer_range",
            "tie_word_embeddings": "tie_word_embeddings",
        },
        trunk={
            "embeddings.tok_embeddings.weight": "embeddings/token/embedding: V E",
            "embeddings.norm.weight": "embeddings/norm/scale: E",
            "embeddings.norm.bias": "embeddings/norm/bias: E",
            "layers.{}.attn_norm.weight": "attention_norm/scale: D",
            "layers.{}.attn_norm.bias": "attention_norm/bias: D",
            "layers.{}.attn.Wqkv.weight": "attention/q/kernel attention/kv/kernel[0] attention/kv/kernel[1]: "
            "(3 N H) D -> 3 D N H",
            "layers.{}.attn.Wqkv.bias": "attention/q/bias attention/kv/bias[0] attention/kv/bias[1]: (3 N H) -> 3 N H",
            "layers.{}.attn.Wo.weight": "attention/out/kernel: D (N H) -> N H D",
            "layers.{}.attn.Wo.bias": "attention/out/bias: D",
            "layers.{}.mlp_norm.weight": "mlp_norm/scale: D",
            "layers.{}.mlp_norm.bias": "mlp_norm/bias: D",
            "layers.{}.mlp.Wi.weight": "mlp/gate_up/kernel[0] mlp/gate_up/kernel[1]: (2 F) D -> 2 D F",
            "layers.{}.mlp.Wi.bias": "mlp/gate_up/bias[0] mlp/gate_up/bias[1]: (2 F) -> 2 F",
            "layers.{}.mlp.Wo.weight": "mlp/down/kernel: D F -> F D",
            "layers.{}.mlp.Wo.bias": "mlp/down/bias: D",
            "final_norm.weight": "final_norm/scale: D",
            "final_norm.bias": "final_norm/bias: D",
        },
        heads={
            "masked_lm": {
                "head.dense.weight": "transform/kernel: E D -> D E",
                "head.dense.bias": "transform/bias: E",
                **NORM,
                "decoder.bias": "bias: V",
                "decoder.weight": "kernel: V E",
            },
            "sequence_classification": CLASSIFIER,
            "token_classification": CLASSIFIER,
            "question_answering": HEAD
            | NORM
            | {"classifier.weight": "out/kernel: 2 D -> D 2", "classifier.bias": "out/bias: 2"},
        },
        prefix="model.",
        aliases={"embeddings.tok_embeddings.weight": ("decoder.weight",)},
        read=_read,
        write=_write,
    )
}
