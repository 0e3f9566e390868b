"""SmolLM 3 (Bakouch et al. 2025): Llama whose every fourth layer goes without rotary positions (Yang et al. 2025)."""

from dataclasses import replace
from typing import Any

from espalier.errors import UserError
from espalier.models.config import LayerKind, ModelConfig
from espalier.models.families import stacked
from espalier.models.families.llama import FAMILIES as LLAMA
from espalier.models.families.llama import LLAMA_1B, classes, read, write

SMOLLM3_3B = replace(
    LLAMA_1B,
    model_type="smollm3",
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=128,
    intermediate_size=11_008,
    norm_eps=1e-6,
    max_position_embeddings=65_536,
    rope_theta=5_000_000.0,
    rope_scaling_factor=None,
    layer_period=("global", "global", "global", "nope"),
)
"""SmolLM3 3B."""


def _read(hf: Any) -> dict[str, Any]:
    if "sliding_attention" in hf.layer_types:
        raise UserError(
            "smollm3 with sliding layers is not supported; every entry of layer_types must be full_attention"
        )
    kinds: list[LayerKind] = ["global" if rope else "nope" for rope in hf.no_rope_layers[: hf.num_hidden_layers]]
    return read(hf) | stacked(kinds)


def _write(config: ModelConfig) -> dict[str, Any]:
    return write(config) | {
        "no_rope_layers": [int(kind != "nope") for kind in config.layers],
        "layer_types": ["full_attention"] * config.num_hidden_layers,
    }


FAMILIES = {
    "smollm3": replace(
        LLAMA["llama"],
        base=SMOLLM3_3B,
        classes=classes("SmolLM3"),
        only={"use_sliding_window": (False,)},
        read=_read,
        write=_write,
    )
}
