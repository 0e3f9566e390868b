"""OLMo 2 (OLMo Team 2025): Llama with norms after attention and MLP only, and of queries and keys over all heads."""

from dataclasses import replace

from espalier.models.config import ModelConfig
from espalier.models.families import Family
from espalier.models.families.llama import ALIASES, EMBEDDINGS, HEADS, KEYS, LLAMA_1B, PROJECTIONS, classes, read, write

OLMO2_1B = replace(
    LLAMA_1B,
    model_type="olmo2",
    vocab_size=100_352,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=128,
    norm_eps=1e-6,
    norm_position="output",
    qk_norm=True,
    qk_norm_over="all",
    max_position_embeddings=4096,
    rope_scaling_factor=None,
    tie_word_embeddings=False,
)
"""OLMo 2 0425 1B."""
OLMO2_7B: ModelConfig = replace(
    OLMO2_1B,
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    intermediate_size=11_008,
)
"""OLMo 2 1124 7B."""
HEADS_THERE = ("causal_lm", "sequence_classification", "embedding")

FAMILIES = {
    "olmo2": Family(
        base=OLMO2_1B,
        classes={head: name for head, name in classes("Olmo2").items() if head in HEADS_THERE},
        keys=KEYS | {"attention_bias": "attention_bias"},
        trunk={
            **EMBEDDINGS,
            **PROJECTIONS,
            "layers.{}.self_attn.q_norm.weight": "attention/q_norm/scale: (N H) -> N H",
            "layers.{}.self_attn.k_norm.weight": "attention/k_norm/scale: (K H) -> K H",
            "layers.{}.post_attention_layernorm.weight": "attention_post_norm/scale: D",
            "layers.{}.post_feedforward_layernorm.weight": "mlp_post_norm/scale: D",
        },
        heads={name: HEADS[name] for name in ("causal_lm", "sequence_classification")},
        prefix="model.",
        aliases=ALIASES,
        read=read,
        write=write,
    )
}
