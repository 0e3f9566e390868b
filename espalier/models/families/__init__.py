"""Model families of Hugging Face: one file each, with published shapes and the map to and from their files.

A family is data: which settings are called what, which are fixed, and one map from the tensors of a file to our
parameters that serves import and export alike (its language: models/weight_map.py). docs/adding-a-family.md says how
to add one. Imports nothing heavy.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from espalier.errors import UserError
from espalier.models.config import LayerKind, ModelConfig

MODULES = {
    "bert": "bert",
    "roberta": "roberta",
    "xlm-roberta": "roberta",
    "camembert": "roberta",
    "distilbert": "distilbert",
    "electra": "electra",
    "modernbert": "modernbert",
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen",
    "qwen3": "qwen",
    "gemma2": "gemma",
    "gemma3_text": "gemma",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "smollm3": "smollm3",
    "eurobert": "eurobert",
    "nomic_bert": "nomic_bert",
    "t5": "t5",
    "mt5": "t5",
}
"""`model_type` in a config.json → module in this package, which has it in its FAMILIES."""

UNMAPPED = "its files have no map here yet (docs/adding-a-family.md)"
RELATIVE = "its attention adds terms for relative positions, which this stack does not have"
SHARED = "its layers share one set of weights, and here each layer has its own"
EXPERTS = "its MLPs are mixtures of experts, which this stack does not have"
PARALLEL = "attention and MLP read the same input and are added up, and here the MLP follows attention"
UNSUPPORTED = {
    "mpnet": (RELATIVE, "roberta, modernbert"),
    "deberta": (RELATIVE, "modernbert, roberta"),
    "deberta-v2": (RELATIVE, "modernbert, roberta"),
    "xlnet": (RELATIVE, "modernbert, roberta"),
    "umt5": ("each of its layers has a table of relative positions of its own", "mt5"),
    "bart": ("its encoder and its decoder have position embeddings of their own", "t5"),
    "albert": (SHARED, "bert, electra"),
    "longformer": ("its global tokens attend with projections of their own", "modernbert"),
    "big_bird": ("its attention sees random blocks", "modernbert"),
    "bloom": ("its attention adds biases by distance (ALiBi)", "gpt2, llama"),
    "mpt": ("its attention adds biases by distance (ALiBi)", "llama"),
    "gpt_neox": (PARALLEL, "llama, gpt2"),
    "gptj": (PARALLEL, "llama, gpt2"),
    "phi": (PARALLEL, "phi3"),
    "falcon": (PARALLEL, "llama"),
    "cohere": (PARALLEL, "llama"),
    "opt": (UNMAPPED, "gpt2"),
    "gemma": (UNMAPPED, "gemma2"),
    "gemma3": ("it also reads images", "gemma3_text"),
    "mixtral": (EXPERTS, "mistral"),
    "qwen2_moe": (EXPERTS, "qwen2"),
    "qwen3_moe": (EXPERTS, "qwen3"),
    "phimoe": (EXPERTS, "phi3"),
    "olmoe": (EXPERTS, "olmo2"),
    "mamba": ("it is recurrent and has no attention", "llama"),
}
"""Well-known types that are not supported: why, and which are near."""
UNSUPPORTED_ROPE = {
    "dynamic": "its frequencies change with the length of the text",
    "longrope": "its frequencies are one of two lists, by the length of the text",
    "proportional": "it rotates a fraction of each head",
}
"""Kinds of scaled rotary positions that are not supported, and what they are."""

Weights = Mapping[str, str]
"""Tensor name in a file → where it goes (models/weight_map.py)."""


def _nothing(given: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Family:
    """How the models of one `model_type` look in the files of Hugging Face."""

    base: ModelConfig
    """What all its models have in common; the rest is replaced by what their config.json says."""
    classes: Mapping[str, str]
    """Head (models.heads.HEADS) → name of the class in transformers."""
    keys: Mapping[str, str]
    """Setting of ModelConfig → its name in transformers' config, where the value is the same."""
    trunk: Weights
    """Tensors of the stack, without the prefix; `{}` in a name is the number of a layer, first to last."""
    heads: Mapping[str, Weights]
    """Tensors of the heads, by head; those of `embedding` belong to the stack and are optional."""
    prefix: str
    """What names of the stack begin with where there is a head."""
    decoder: Weights = field(default_factory=dict)
    """Tensors of the second stack of an encoder-decoder, as in `trunk`."""
    prefixes: Mapping[str, str] = field(default_factory=dict)
    """Heads with another prefix."""
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Tensor → other names under which tied copies of it are found."""
    untied: Mapping[str, str] = field(default_factory=dict)
    """Tensor of a head → the name that counts where the output matrix is not tied; files then hold it under both."""
    ignored: str = r"\bposition_ids$|\binv_freq$"
    """Tensors that old files hold and no model needs (regular expression)."""
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Settings of transformers' config with the values that are supported, where others would be another model."""
    read: Callable[[Any], dict[str, Any]] = _nothing
    """Further settings of ModelConfig, from transformers' config."""
    write: Callable[[ModelConfig], dict[str, Any]] = _nothing
    """Further settings of transformers' config, from ours."""
    since: str = "5.0"
    """The first version of transformers that has it."""
    passes_auto_map: bool = False
    """Whether published files name code of their repository although transformers has the model: it is passed over."""


def family_of(model_type: str) -> Family:
    """The family of a `model_type`; UserError lists the known ones."""
    if model_type in UNSUPPORTED:
        why, near = UNSUPPORTED[model_type]
        raise UserError(f"model_type {model_type!r} is not supported: {why}; near: {near}")
    if model_type not in MODULES:
        raise UserError(
            f"model_type {model_type!r} is not known; known are {', '.join(MODULES)} (docs/adding-a-family.md)"
        )
    return importlib.import_module(f"espalier.models.families.{MODULES[model_type]}").FAMILIES[model_type]


def stacked(kinds: list[LayerKind], *, first_apart: bool = False) -> dict[str, tuple[LayerKind, ...]]:
    """prefix_layers, layer_period and suffix_layers of a stack with these layers, as few different ones as possible.

    first_apart: the first layer is unlike the others and stands by itself.
    """
    start = min(1 if first_apart else 0, len(kinds) - 1)
    body = kinds[start:]
    choices = []
    for size in range(1, len(body) + 1):
        repeats = next(
            (count for count in range(len(body) // size, 0, -1) if body[: size * count] == body[:size] * count), 1
        )
        choices.append((size + len(body) - size * repeats, size, size * repeats))
    _, size, end = min(choices)
    return {
        "prefix_layers": tuple(kinds[:start]),
        "layer_period": tuple(body[:size]),
        "suffix_layers": tuple(body[end:]),
    }


def kinds_of(layer_types: list[str]) -> list[LayerKind]:
    """transformers' `layer_types` as ours."""
    return ["local" if kind == "sliding_attention" else "global" for kind in layer_types]


def layer_types(config: ModelConfig) -> list[str]:
    """Our layers as transformers' `layer_types`."""
    return ["sliding_attention" if kind == "local" else "full_attention" for kind in config.layers]


def read_rope(rope: Mapping[str, Any], partial: bool = False) -> dict[str, Any]:
    """rope_theta and scaling from transformers' rope parameters; UserError for a kind that is not supported.

    partial: whether the family's class in transformers can rotate a fraction of each head.
    """
    kind = rope.get("rope_type", "default")
    settings: dict[str, Any] = {"rope_theta": float(rope["rope_theta"]), "rope_scaling_factor": None}
    if partial:
        settings["partial_rotary_factor"] = float(rope.get("partial_rotary_factor", 1.0))
    elif rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"partial_rotary_factor={rope['partial_rotary_factor']} is not supported; it must be 1")
    if kind == "default":
        return settings
    if kind not in ("linear", "llama3", "yarn"):
        because = f" ({UNSUPPORTED_ROPE[kind]})" if kind in UNSUPPORTED_ROPE else ""
        raise UserError(f"rope_type {kind!r} is not supported{because}; supported are default, linear, llama3 and yarn")
    if not isinstance(rope.get("factor"), int | float):
        raise UserError(f"rope_type {kind!r} comes with factor={rope.get('factor')!r}; it must be a number")
    settings |= {"rope_type": kind, "rope_scaling_factor": float(rope["factor"])}
    if kind == "yarn":
        settings |= {
            "rope_original_max_position_embeddings": int(rope["original_max_position_embeddings"]),
            # As in transformers, a 0 is as if it were left out.
            "rope_beta_fast": float(rope.get("beta_fast") or 32),
            "rope_beta_slow": float(rope.get("beta_slow") or 1),
            "rope_attention_factor": _attention_factor(rope),
            "rope_truncate": bool(rope.get("truncate", True)),
        }
    if kind == "llama3":
        settings |= {
            "rope_original_max_position_embeddings": int(rope["original_max_position_embeddings"]),
            "rope_low_freq_factor": float(rope["low_freq_factor"]),
            "rope_high_freq_factor": float(rope["high_freq_factor"]),
        }
    return settings


def _attention_factor(rope: Mapping[str, Any]) -> float | None:
    """YaRN's, as named, or by the mscale and mscale_all_dim that DeepSeek has in its place."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if not (rope.get("mscale") and rope.get("mscale_all_dim")):
        return None
    grown = math.log(max(1.0, rope["factor"]))
    return (0.1 * rope["mscale"] * grown + 1.0) / (0.1 * rope["mscale_all_dim"] * grown + 1.0)


def local_theta(rope: Mapping[str, Any]) -> float:
    """The rotary base of local layers, from transformers' rope parameters; UserError where they are scaled."""
    if rope.get("rope_type", "default") != "default":
        raise UserError(
            f"rope_type {rope['rope_type']!r} in sliding layers is not supported; only global ones may scale"
        )
    return float(rope["rope_theta"])


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """transformers' rope parameters of global layers."""
    c = config
    if c.rope_scaling_factor is None:
        return {"rope_type": "default", "rope_theta": c.rope_theta}
    rope = {"rope_type": c.rope_type, "rope_theta": c.rope_theta, "factor": c.rope_scaling_factor}
    if c.rope_type == "llama3":
        rope |= {
            "original_max_position_embeddings": c.rope_original_max_position_embeddings,
            "low_freq_factor": c.rope_low_freq_factor,
            "high_freq_factor": c.rope_high_freq_factor,
        }
    if c.rope_type == "yarn":
        rope |= {
            "original_max_position_embeddings": c.rope_original_max_position_embeddings,
            "beta_fast": c.rope_beta_fast,
            "beta_slow": c.rope_beta_slow,
            "truncate": c.rope_truncate,
        }
        if c.rope_attention_factor is not None:
            rope["attention_factor"] = c.rope_attention_factor
    return rope
