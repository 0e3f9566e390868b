"""Mistral (Jiang et al. 2023): Llama with a sliding window in every layer."""

from dataclasses import replace
from typing import Any

from espalier.models.config import ModelConfig
from espalier.models.families import Family
from espalier.models.families.llama import ALIASES, HEADS, KEYS, LLAMA_8B, TRUNK, classes, read, write

MISTRAL_7B = replace(
    LLAMA_8B,
    model_type="mistral",
    vocab_size=32_000,
    max_position_embeddings=32_768,
    rope_theta=10_000.0,
    rope_scaling_factor=None,
    layer_period=("local",),
    sliding_window=4096,
)
"""Mistral 7B v0.1."""


def _read(hf: Any) -> dict[str, Any]:
    return read(hf) | {"layer_period": ("local",) if hf.sliding_window else ("global",)}


def _write(config: ModelConfig) -> dict[str, Any]:
    return write(config) | {"sliding_window": config.sliding_window if "local" in config.layers else None}


FAMILIES = {
    "mistral": Family(
        base=MISTRAL_7B,
        classes=classes("Mistral"),
        keys=KEYS | {"sliding_window": "sliding_window"},
        trunk=TRUNK,
        heads=HEADS,
        prefix="model.",
        aliases=ALIASES,
        read=_read,
        write=_write,
    )
}
