"""EuroBERT (Boizard et al. 2025): Llama's layers as an encoder, with an output table of its own."""

from dataclasses import replace
from typing import Any

from espalier.models.config import ModelConfig
from espalier.models.families import Family
from espalier.models.families.llama import ALIASES, KEYS, LLAMA_1B, TRUNK, read, write

EUROBERT_210M = replace(
    LLAMA_1B,
    model_type="eurobert",
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=12,
    intermediate_size=3072,
    max_position_embeddings=8192,
    rope_theta=250_000.0,
    rope_scaling_factor=None,
    causal=False,
    tie_word_embeddings=False,
    classifier_pooler="gelu",
    classifier_pooling="late",
)
"""EuroBERT 210m, which counts the embeddings once: the output table comes on top."""
POOLINGS = {"cls": "bos", "mean": "mean", "late": "late"}
OUT = {"classifier.weight": "out/kernel: C D -> D C", "classifier.bias": "out/bias: C"}


def _read(hf: Any) -> dict[str, Any]:
    poolings = {theirs: ours for ours, theirs in POOLINGS.items()}
    # One setting there: biases in the MLPs and behind the output table.
    return read(hf) | {"head_bias": hf.mlp_bias, "classifier_pooling": poolings[hf.classifier_pooling]}


def _write(config: ModelConfig) -> dict[str, Any]:
    return write(config) | {"classifier_pooling": POOLINGS[config.classifier_pooling]}


FAMILIES = {
    "eurobert": Family(
        base=EUROBERT_210M,
        classes={
            "masked_lm": "EuroBertForMaskedLM",
            "sequence_classification": "EuroBertForSequenceClassification",
            "token_classification": "EuroBertForTokenClassification",
            "embedding": "EuroBertModel",
        },
        keys=KEYS | {"attention_bias": "attention_bias", "mlp_bias": "mlp_bias"},
        trunk=TRUNK,
        heads={
            "masked_lm": {"lm_head.weight": "kernel: V E", "lm_head.bias": "bias: V"},
            "sequence_classification": {
                "dense.weight": "dense/kernel: O D -> D O",
                "dense.bias": "dense/bias: O",
                **OUT,
            },
            "token_classification": OUT,
        },
        prefix="model.",
        aliases=ALIASES,
        read=_read,
        write=_write,
        since="5.3",
        passes_auto_map=True,
    )
}
