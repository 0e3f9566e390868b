"""What a model comes to: its parameters, and the operations that a token costs."""

from __future__ import annotations

import math

import jax

from models.attention import spec_for
from models.config import ModelConfig
from models.transformer import init_params


def count_params(config: ModelConfig, head: str | None = None) -> int:
    """Parameters of the stack with one head (None = without), the padding of the vocabulary not counted."""
    shapes = jax.eval_shape(lambda key: init_params(config, key, (head,) if head else ()), jax.random.key(0))
    padding = config.padded_vocab_size - config.vocab_size
    count = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        names = tuple(entry.key for entry in path)
        padded = names in {
            ("embeddings", "token", "embedding"),
            ("head", "causal_lm", "kernel"),
            ("head", head, "bias"),
        }
        count += math.prod(leaf.shape) - (padding * math.prod(leaf.shape[1:]) if padded else 0)
    return count


def flops_per_token(config: ModelConfig, sequence_length: int, predicted_fraction: float = 1.0) -> float:
    """Floating-point operations a token costs in training, backward pass included and recomputation not.

    6 × (parameters of the matrix products) + 12 × N × H × (keys within reach) a layer, as in Chowdhery et al. 2022,
    appendix B: causal layers are counted as if they saw all T keys, local ones with their window. The head
    counts for the predicted_fraction of the tokens that reach it.
    """
    c = config
    D, F = c.hidden_size, c.intermediate_size
    E = c.embedding_width
    projections = D * c.head_size * (2 * c.num_attention_heads + 2 * c.kv_heads) + (3 if c.gated_mlp else 2) * D * F
    head = E * c.vocab_size + (D * E if c.head_transform and not c.causal else 0)
    embeddings = D * E if E != D else 0
    total = 6.0 * (c.num_hidden_layers * projections + embeddings + predicted_fraction * head)
    for kind in c.layers:
        keys = sequence_length
        if kind == "local":
            spec = spec_for(c, kind)
            keys = min(keys, (spec.left or 0) + (spec.right or 0) + 1)
        total += 12.0 * c.num_attention_heads * c.head_size * keys
    return total
