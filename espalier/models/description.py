"""A model in words: what it is, its size, and the precision and attention backend it runs with."""

from __future__ import annotations

import jax

from espalier.models.attention import choose_backend, kernels
from espalier.models.attention_backend import Use
from espalier.models.config import Execution, ModelConfig
from espalier.models.counts import count_params
from espalier.models.layers import compute_dtype, product_dtype
from espalier.progress import amount

PURPOSES = {
    "masked_lm": "masked LM",
    "causal_lm": "causal LM",
    "seq2seq_lm": "one text from another",
    "sequence_classification": "classification",
}


def architecture(config: ModelConfig, head: str) -> str:
    """What a model is and its size, on one line."""
    decoder = f" + {config.num_decoder_layers}" if config.num_decoder_layers else ""
    layers = f"{config.num_hidden_layers}{decoder} layers × {config.hidden_size} wide"
    return (
        f"{config.model_type} for {PURPOSES.get(head, head.replace('_', ' '))}: {layers}, "
        f"{config.vocab_size:,} tokens in the vocabulary, {amount(count_params(config, head))} parameters"
    )


def describe(
    config: ModelConfig,
    head: str,
    execution: Execution,
    length: int,
    mesh: jax.sharding.Mesh,
    *,
    packed: bool = True,
    mixed: bool = False,
) -> dict[str, str]:
    """Rows on the model, its precision, and the attention where there was a choice, for rows of `length` tokens."""
    with jax.set_mesh(mesh):
        compute, factors = compute_dtype(execution).name, product_dtype(execution).name
        dropping = config.attention_dropout > 0
        use = Use.of(config, length, dtype=compute, dropping=dropping, packed=packed, mixed=mixed)
        backend, reason = choose_backend(execution.attention, use)
    rows = {
        "model": architecture(config, head),
        "precision": precision(compute, factors),
    }
    # Elsewhere there is one backend.
    if kernels(use.platform) or execution.attention != "auto":
        rows["attention"] = f"{backend.name}: {reason}"
    return rows


def precision(compute: str, factors: str) -> str:
    """In words, of the names of two dtypes."""
    if compute != "float32":
        return f"{compute}, parameters in float32"
    return compute if factors == compute else f"{compute}, factors of products in {factors}"
