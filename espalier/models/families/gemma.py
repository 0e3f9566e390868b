"""Gemma 2 (Gemma Team 2024) and 3, text only (Gemma Team 2025): Llama with norms on both sides and local layers.

Gemma 2 squashes its scores by tanh, and every second layer is local; Gemma 3 normalises queries and keys instead, and
has five local layers to a global one, with a rotary base of their own.
"""

from dataclasses import replace
from typing import Any

from espalier.models.config import ModelConfig
from espalier.models.families import Family, kinds_of, layer_types, local_theta, read_rope, stacked, write_rope
from espalier.models.families.llama import ALIASES, EMBEDDINGS, HEADS, KEYS, LLAMA_1B, PROJECTIONS, classes, read, write

GEMMA3_1B = replace(
    LLAMA_1B,
    model_type="gemma3_text",
    vocab_size=262_144,
    hidden_size=1152,
    num_hidden_layers=26,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=256,
    intermediate_size=6912,
    hidden_act="gelu_pytorch_tanh",
    norm_eps=1e-6,
    norm_position="both",
    norm_plus_one=True,
    qk_norm=True,
    scale_embeddings=True,
    query_pre_attn_scalar=256,
    max_position_embeddings=32_768,
    rope_theta=1_000_000.0,
    rope_scaling_factor=None,
    local_rope_theta=10_000.0,
    layer_period=("local", "local", "local", "local", "local", "global"),
    suffix_layers=("local", "local"),
    sliding_window=512,
)
"""Gemma 3 1B."""
GEMMA2_2B = replace(
    GEMMA3_1B,
    model_type="gemma2",
    vocab_size=256_000,
    hidden_size=2304,
    num_attention_heads=8,
    num_key_value_heads=4,
    intermediate_size=9216,
    qk_norm=False,
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
    max_position_embeddings=8192,
    rope_theta=10_000.0,
    local_rope_theta=None,
    layer_period=("local", "global"),
    suffix_layers=(),
    sliding_window=4096,
)
"""Gemma 2 2B."""


def _read2(hf: Any) -> dict[str, Any]:
    return read(hf) | stacked(kinds_of(hf.layer_types))


def _write2(config: ModelConfig) -> dict[str, Any]:
    # An integer there.
    return write(config) | {"layer_types": layer_types(config), "query_pre_attn_scalar": int(config.attention_divisor)}


def _read(hf: Any) -> dict[str, Any]:
    return {
        **read_rope(hf.rope_parameters["full_attention"]),
        "head_dim": hf.head_dim,
        "num_key_value_heads": hf.num_key_value_heads,
        "local_rope_theta": local_theta(hf.rope_parameters["sliding_attention"]),
        **stacked(kinds_of(hf.layer_types)),
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    local = config.rope_theta if config.local_rope_theta is None else config.local_rope_theta
    return {
        "head_dim": config.head_size,
        "num_key_value_heads": config.kv_heads,
        "layer_types": layer_types(config),
        "rope_parameters": {
            "full_attention": write_rope(config),
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }


GEMMA_KEYS = {name: key for name, key in KEYS.items() if name != "hidden_act"} | {
    "hidden_act": "hidden_activation",
    "query_pre_attn_scalar": "query_pre_attn_scalar",
    "sliding_window": "sliding_window",
    "attention_bias": "attention_bias",
}
TRUNK = {
    **EMBEDDINGS,
    **PROJECTIONS,
    "layers.{}.input_layernorm.weight": "attention_norm/scale: D",
    "layers.{}.post_attention_layernorm.weight": "attention_post_norm/scale: D",
    "layers.{}.pre_feedforward_layernorm.weight": "mlp_norm/scale: D",
    "layers.{}.post_feedforward_layernorm.weight": "mlp_post_norm/scale: D",
}

FAMILIES = {
    "gemma2": Family(
        base=GEMMA2_2B,
        classes={head: name for head, name in classes("Gemma2").items() if head != "question_answering"},
        keys=GEMMA_KEYS
        | {
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        trunk=TRUNK,
        heads={name: where for name, where in HEADS.items() if name != "question_answering"},
        prefix="model.",
        aliases=ALIASES,
        only={"use_bidirectional_attention": (False, None)},
        read=_read2,
        write=_write2,
    ),
    "gemma3_text": Family(
        base=GEMMA3_1B,
        classes={
            "causal_lm": "Gemma3ForCausalLM",
            "sequence_classification": "Gemma3TextForSequenceClassification",
            "embedding": "Gemma3TextModel",
        },
        keys=GEMMA_KEYS,
        trunk=TRUNK,
        heads={name: HEADS[name] for name in ("causal_lm", "sequence_classification")},
        prefix="model.",
        aliases=ALIASES,
        only={
            "attn_logit_softcapping": (None,),
            "final_logit_softcapping": (None,),
            "use_bidirectional_attention": (False, None),
        },
        read=_read,
        write=_write,
    ),
}
