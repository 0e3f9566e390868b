"""The size of a model: its parameters, and the floating-point operations per token."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

from espalier.models.config import LayerKind, ModelConfig


# Asked for several times in a run, and tracing the model takes most of a second.
@functools.lru_cache(maxsize=32)
def count_params(config: ModelConfig, head: str | None = None) -> int:
    """Parameters of the stack with one head (None = without), the padding of the vocabulary not counted."""
    import jax

    from espalier.models.transformer import init_params

    shapes = jax.eval_shape(lambda key: init_params(config, key, (head,) if head else ()), jax.random.key(0))
    padding = config.padded_vocab_size - config.vocab_size
    count = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        names = tuple(entry.key for entry in path)
        padded = names in {
            ("embeddings", "token", "embedding"),
            ("head", head, "kernel"),
            ("head", head, "bias"),
        }
        count += math.prod(leaf.shape) - (padding * math.prod(leaf.shape[1:]) if padded else 0)
    return count


def flops_per_token(config: ModelConfig, sequence_length: int, predicted_fraction: float = 1.0) -> float:
    """Floating-point operations a token costs in training, backward pass included and recomputation not.

    6 × (parameters of the matrix products that the token meets) + 12 × N × H × (keys it may see) a layer. A product of
    m parameters costs 2m forward and 4m backward; scores and values cost 2 × 2 × H a visible pair and head forward, as
    much for each of their two gradients. Keys are the exact mean over a row that is one document: causal (T+1)/2,
    bidirectional T, windows clipped at the row's edges. The head (transform and vocabulary) counts for the
    predicted_fraction of the tokens that reach it; looking up embeddings, norms and biases count nothing.

    Chowdhery et al. 2022, appendix B (PaLM's MFU, which many tables follow) count a causal layer as if all T keys were
    seen, 12 × N × H × T, and 6 × all parameters, also of embeddings that are only looked up.
    """
    config.check_one_stack("operations of a token are counted for")
    return 3.0 * _forward_flops(config, sequence_length, predicted_fraction)


def flops_per_pair(config: ModelConfig, source_length: int, target_length: int) -> float:
    """Floating-point operations of an encoder-decoder in training for a text of so many tokens that is read and one
    that is written, counted as by flops_per_token.

    Keys and values of what is read are formed in every layer of the decoder, and each token that is written sees them
    all.
    """
    decoder = dataclasses.replace(config.decoder, cross_attention=False)
    D, heads, L = config.hidden_size, config.num_attention_heads * config.head_size, config.num_decoder_layers
    reading = 2.0 * D * 2 * config.kv_heads * config.head_size * L
    writing = 2.0 * 2 * D * heads * L + 4.0 * heads * source_length * L
    reading += _forward_flops(config.encoder, source_length, 0.0)
    writing += _forward_flops(decoder, target_length, 1.0)
    return 3.0 * (source_length * reading + target_length * writing)


def _forward_flops(config: ModelConfig, sequence_length: int, predicted_fraction: float) -> float:
    """Of a token."""
    forward = sum(product.flops for product in products(config, predicted_fraction))
    return forward + sum(attention_flops(config, kind, sequence_length) for kind in config.layers)


@dataclass(frozen=True)
class Product:
    """A matrix product that tokens go through: [tokens, inputs] × [inputs, outputs]."""

    name: str
    inputs: int
    outputs: int
    times: float
    """How often a token goes through one of this shape in a forward pass: layers, or the part of the tokens."""
    split: str
    """The side that tensor parallelism splits: "inputs", "outputs", or "" for neither."""

    @property
    def flops(self) -> float:
        """Of a token's forward pass."""
        return 2.0 * self.inputs * self.outputs * self.times


def products(config: ModelConfig, predicted_fraction: float = 1.0) -> tuple[Product, ...]:
    """All products with parameters; the head's for the predicted_fraction of the tokens that reach it."""
    assert not config.cross_attention, "the length of a memory is not known here"
    c = config
    D, F, E, L = c.hidden_size, c.intermediate_size, c.embedding_width, c.num_hidden_layers
    heads = c.num_attention_heads * c.head_size
    found = [
        Product("qkv", D, heads + 2 * c.kv_heads * c.head_size, L, "outputs"),
        Product("out", heads, D, L, "inputs"),
        Product("up", D, 2 * F if c.gated_mlp else F, L, "outputs"),
        Product("down", F, D, L, "inputs"),
    ]
    if E != D:
        found.append(Product("embeddings", E, D, 1, ""))
    if c.head_transform and not c.causal:
        found.append(Product("transform", D, E, predicted_fraction, ""))
    found.append(Product("vocabulary", E, c.vocab_size, predicted_fraction, "outputs"))
    return tuple(found)


def attention_flops(config: ModelConfig, kind: LayerKind, sequence_length: int) -> float:
    """Scores and values of one layer for one token, forward: 4 × N × H × the keys it may see on average."""
    return 4.0 * config.num_attention_heads * config.head_size * visible_keys(config, kind, sequence_length)


def visible_keys(config: ModelConfig, kind: LayerKind, sequence_length: int) -> float:
    """Keys that a query of a layer sees, itself included: the exact mean over a row that is one document."""
    from espalier.models.attention_spec import spec_for

    spec = spec_for(config, kind)
    before = _reach(spec.left, sequence_length)
    after = 0.0 if spec.causal else _reach(spec.right, sequence_length)
    return 1 + before + after


def _reach(limit: int | None, length: int) -> float:
    """Mean of min(i, limit) over i = 0 … length - 1."""
    limit = length - 1 if limit is None else min(limit, length - 1)
    return limit - limit * (limit + 1) / (2 * length)
