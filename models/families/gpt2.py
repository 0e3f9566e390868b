"""GPT-2 (Radford et al. 2019): pre-norm decoder, learned positions, tied embeddings, GELU by its tanh approximation."""

from dataclasses import replace

from models.config import ModelConfig

GPT2 = ModelConfig(
    model_type="gpt2",
    vocab_size=50257,
    hidden_act="gelu_new",
    norm_position="pre",
    norm_eps=1e-5,
    embedding_norm=False,
    final_norm=True,
    max_position_embeddings=1024,
    causal=True,
    head_transform=False,
    head_bias=False,
)

GPT2_MEDIUM = replace(GPT2, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
