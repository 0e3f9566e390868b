"""Llama 2 (Touvron et al. 2023) and 3 (Grattafiori et al. 2024): pre-norm decoder, RMSNorm, SwiGLU, grouped queries.

Mistral, Qwen and Gemma share its map of weights.
"""

from dataclasses import replace
from typing import Any

from espalier.models.config import ModelConfig
from espalier.models.families import Family, read_rope, write_rope

LLAMA_1B = ModelConfig(
    model_type="llama",
    vocab_size=128_256,
    hidden_size=2048,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    intermediate_size=8192,
    hidden_act="silu",
    gated_mlp=True,
    norm="rmsnorm",
    norm_position="pre",
    norm_bias=False,
    norm_eps=1e-5,
    embedding_norm=False,
    final_norm=True,
    attention_bias=False,
    mlp_bias=False,
    position_embedding="rotary",
    max_position_embeddings=131_072,
    rope_theta=500_000.0,
    rope_scaling_factor=32.0,
    causal=True,
    head_transform=False,
    head_bias=False,
    hidden_dropout=0.0,
    attention_dropout=0.0,
)
"""Llama 3.2 1B."""

LLAMA_8B = replace(
    LLAMA_1B,
    hidden_size=4096,
    num_hidden_layers=32,
    head_dim=128,
    intermediate_size=14_336,
    rope_scaling_factor=8.0,
    tie_word_embeddings=False,
)
"""Llama 3.1 8B."""
LLAMA_70B = replace(LLAMA_8B, hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, intermediate_size=28_672)
"""Llama 3.1 70B."""
LLAMA_405B = replace(
    LLAMA_8B, hidden_size=16_384, num_hidden_layers=126, num_attention_heads=128, intermediate_size=53_248
)
"""Llama 3.1 405B."""


def read(hf: Any, partial: bool = False) -> dict[str, Any]:
    """What the Llama-like families have in common: size and number of heads, rotary frequencies."""
    size = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    return {"head_dim": size, "num_key_value_heads": hf.num_key_value_heads, **read_rope(hf.rope_parameters, partial)}


def write(config: ModelConfig) -> dict[str, Any]:
    """The reverse of `read`."""
    return {
        "head_dim": config.head_size,
        "num_key_value_heads": config.kv_heads,
        "rope_parameters": write_rope(config),
    }


def classes(name: str) -> dict[str, str]:
    """The classes of transformers whose names begin with `name`."""
    return {
        "causal_lm": f"{name}ForCausalLM",
        "sequence_classification": f"{name}ForSequenceClassification",
        "token_classification": f"{name}ForTokenClassification",
        "question_answering": f"{name}ForQuestionAnswering",
        "embedding": f"{name}Model",
    }


KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "hidden_act": "hidden_act",
    "norm_eps": "rms_norm_eps",
    "max_position_embeddings": "max_position_embeddings",
    "attention_dropout": "attention_dropout",
    "initializer_range": "initializer_range",
    "tie_word_embeddings": "tie_word_embeddings",
}
EMBEDDINGS = {"embed_tokens.weight": "embeddings/token/embedding: V E", "norm.weight": "final_norm/scale: D"}
PROJECTIONS = {
    "layers.{}.self_attn.q_proj.weight": "attention/q/kernel: (N H) D -> D N H",
    "layers.{}.self_attn.q_proj.bias": "attention/q/bias: (N H) -> N H",
    "layers.{}.self_attn.k_proj.weight": "attention/kv/kernel[0]: (K H) D -> D K H",
    "layers.{}.self_attn.k_proj.bias": "attention/kv/bias[0]: (K H) -> K H",
    "layers.{}.self_attn.v_proj.weight": "attention/kv/kernel[1]: (K H) D -> D K H",
    "layers.{}.self_attn.v_proj.bias": "attention/kv/bias[1]: (K H) -> K H",
    "layers.{}.self_attn.o_proj.weight": "attention/out/kernel: D (N H) -> N H D",
    "layers.{}.self_attn.o_proj.bias": "attention/out/bias: D",
    "layers.{}.self_attn.q_norm.weight": "attention/q_norm/scale: H",
    "layers.{}.self_attn.k_norm.weight": "attention/k_norm/scale: H",
    "layers.{}.mlp.gate_proj.weight": "mlp/gate_up/kernel[0]: F D -> D F",
    "layers.{}.mlp.gate_proj.bias": "mlp/gate_up/bias[0]: F",
    "layers.{}.mlp.up_proj.weight": "mlp/gate_up/kernel[1]: F D -> D F",
    "layers.{}.mlp.up_proj.bias": "mlp/gate_up/bias[1]: F",
    "layers.{}.mlp.down_proj.weight": "mlp/down/kernel: D F -> F D",
    "layers.{}.mlp.down_proj.bias": "mlp/down/bias: D",
}
NORMS = {
    "layers.{}.input_layernorm.weight": "attention_norm/scale: D",
    "layers.{}.post_attention_layernorm.weight": "mlp_norm/scale: D",
}
TRUNK = EMBEDDINGS | PROJECTIONS | NORMS
SCORE = {"score.weight": "out/kernel: C D -> D C"}
HEADS = {
    "causal_lm": {"lm_head.weight": "kernel: V D"},
    "sequence_classification": SCORE,
    "token_classification": SCORE | {"score.bias": "out/bias: C"},
    "question_answering": {"qa_outputs.weight": "out/kernel: 2 D -> D 2", "qa_outputs.bias": "out/bias: 2"},
}
ALIASES = {"embed_tokens.weight": ("lm_head.weight",)}

FAMILIES = {
    "llama": Family(
        base=LLAMA_1B,
        classes=classes("Llama"),
        keys=KEYS | {"attention_bias": "attention_bias", "mlp_bias": "mlp_bias"},
        trunk=TRUNK,
        heads=HEADS,
        prefix="model.",
        # transformers once called it so there, and kept it.
        prefixes={"question_answering": "transformer."},
        aliases=ALIASES,
        read=read,
        write=write,
    )
}
