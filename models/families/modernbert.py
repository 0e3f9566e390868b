"""ModernBERT (Warner et al. 2024): pre-norm encoder without biases, GeGLU, rotary, every third layer global."""

from models.config import ModelConfig

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
