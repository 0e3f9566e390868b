"""Llama 3 (Grattafiori et al. 2024): pre-norm decoder, RMSNorm, SwiGLU, grouped-query attention, scaled rotary."""

from dataclasses import replace

from models.config import ModelConfig

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
