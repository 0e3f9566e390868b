"""Qwen 2 (Yang et al. 2024) and 3 (Yang et al. 2025): Llama with biases of q, k, v; or norms of q and k instead."""

from dataclasses import replace
from typing import Any

from espalier.models.config import ModelConfig
from espalier.models.families import Family, kinds_of, layer_types, stacked
from espalier.models.families.llama import ALIASES, HEADS, KEYS, LLAMA_1B, TRUNK, classes, read, write

QWEN2_500M = replace(
    LLAMA_1B,
    model_type="qwen2",
    vocab_size=151_936,
    hidden_size=896,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    head_dim=64,
    intermediate_size=4864,
    norm_eps=1e-6,
    attention_bias=True,
    attention_out_bias=False,
    max_position_embeddings=131_072,
    rope_theta=1_000_000.0,
    rope_scaling_factor=None,
)
"""Qwen2 0.5B."""

QWEN3_600M = replace(
    QWEN2_500M,
    model_type="qwen3",
    hidden_size=1024,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=3072,
    attention_bias=False,
    attention_out_bias=None,
    qk_norm=True,
    max_position_embeddings=40_960,
)
"""Qwen3 0.6B."""


def _read(hf: Any) -> dict[str, Any]:
    return read(hf) | {"sliding_window": hf.sliding_window} | stacked(kinds_of(hf.layer_types))


def _write(config: ModelConfig) -> dict[str, Any]:
    local = "local" in config.layers
    return write(config) | {
        "use_sliding_window": local,
        "sliding_window": config.sliding_window if local else None,
        "layer_types": layer_types(config),
    }


def _family(base: ModelConfig, name: str, more_keys: dict[str, str]) -> Family:
    return Family(
        base=base,
        classes=classes(name),
        keys=KEYS | more_keys,
        trunk=TRUNK,
        heads=HEADS,
        prefix="model.",
        prefixes={"question_answering": "transformer."},
        aliases=ALIASES,
        read=_read,
        write=_write,
    )


FAMILIES = {
    "qwen2": _family(QWEN2_500M, "Qwen2", {}),
    "qwen3": _family(QWEN3_600M, "Qwen3", {"attention_bias": "attention_bias"}),
}
