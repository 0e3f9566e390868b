"""config.json of Hugging Face ↔ ModelConfig, by what the families say; transformers fills in and spells what is old."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from cli import UserError
from models.config import ModelConfig
from models.families import family_of
from models.heads import LANGUAGE_MODELS

CLASSIFIERS = ("sequence_classification", "token_classification")


def read_config(folder: Path) -> tuple[Any, ModelConfig]:
    """transformers' configuration, with the defaults of what an old file leaves out, and ours.

    UserError for remote code and for values that do not fit.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no config.json; expected a folder in Hugging Face format")
    values = _json(path)
    model_type = str(values.get("model_type"))
    family = family_of(model_type)
    for name in ("config.json", "tokenizer_config.json"):
        passed_over = name == "config.json" and family.passes_auto_map
        if not passed_over and (folder / name).is_file() and "auto_map" in _json(folder / name):
            raise UserError(f"{folder / name} asks for code from the repository (auto_map), which is never run")
    if values.get("quantization_config"):
        raise UserError(f"{path}: the weights are quantised; take the model in float32, bfloat16 or float16")
    made = _config_class(model_type)
    try:
        hf = made.from_dict(values)
        return hf, to_ours(hf)
    except UserError:
        raise
    except Exception as error:  # many kinds, for values that do not fit
        raise UserError(f"{path} is no configuration of {model_type}: {' '.join(str(error).split())}") from None


def to_ours(hf: Any) -> ModelConfig:
    """Our configuration of a model from transformers' (labels apart); UserError where it is another architecture."""
    family = family_of(hf.model_type)
    for key, accepted in family.only.items():
        value = getattr(hf, key, accepted[0])
        if value not in accepted:
            raise UserError(f"{hf.model_type} with {key}={value!r} is not supported; it must be {accepted[0]!r}")
    settings = {ours: getattr(hf, theirs) for ours, theirs in family.keys.items()}
    return dataclasses.replace(family.base, **settings | family.read(hf), labels=())


def to_hf(config: ModelConfig, head: str, tokenizer: Any = None, dtype: str = "float32") -> Any:
    """transformers' configuration of a model with this head.

    UserError where the model is not of the class that would load it: the way back must give the same architecture.
    """
    family = family_of(config.model_type)
    made = _config_class(config.model_type)
    if head not in family.classes:
        raise UserError(
            f"transformers has no {config.model_type} with the head {head}; there are {', '.join(family.classes)}"
        )
    values: dict[str, Any] = {theirs: getattr(config, ours) for ours, theirs in family.keys.items()}
    values |= {f"{name}_token_id": None for name in ("pad", "bos", "eos")}
    if tokenizer is not None:
        more = {"modernbert": ("cls", "sep"), "eurobert": ("mask",)}
        names = ("pad", "bos", "eos") + more.get(config.model_type, ())
        values |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in names}
    pad = values["pad_token_id"]
    values |= family.write(config)
    if tokenizer is not None and values["pad_token_id"] != pad:
        raise UserError(
            f"{config.model_type} counts positions from its padding token, here {values['pad_token_id']}, and the "
            f"tokenizer's is {pad}; train with --model.position-offset {(pad or 0) + 1}, or export as bert"
        )
    if head in CLASSIFIERS:
        values["id2label"] = dict(enumerate(config.labels))
        values["label2id"] = {label: number for number, label in enumerate(config.labels)}
    must = {"nomic_bert": "pad_token_id", "eurobert": "mask_token_id"}.get(config.model_type)
    if must and values.get(must) is None:
        # None is no value there: without a tokenizer the class's own stays.
        values.pop(must, None)
    hf = made(**values, architectures=[family.classes[head]], dtype=dtype)
    there, here = _essence(to_ours(hf), head), _essence(config, head)
    # What decides nothing in one of the two follows from another difference.
    both = [name for name in here if name in there]
    differences = [f"{name}={here[name]!r} (it has {there[name]!r})" for name in both if here[name] != there[name]]
    if differences:
        raise UserError(
            f"no class of transformers has this architecture: {family.classes[head]} cannot have "
            f"{', '.join(differences)}"
        )
    return hf


def generation_config(hf: Any) -> Any:
    """generation_config.json that goes with a configuration: its special tokens."""
    from transformers import GenerationConfig

    ids = {name: getattr(hf, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return GenerationConfig(**ids)


def _config_class(model_type: str) -> Any:
    """UserError where the installed transformers is older than the family."""
    import transformers

    if model_type not in transformers.CONFIG_MAPPING:
        raise UserError(
            f"transformers {transformers.__version__} has no {model_type}, which came with version "
            f"{family_of(model_type).since}; try pip install --upgrade transformers"
        )
    return transformers.CONFIG_MAPPING[model_type]


def _json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object")
    return values


def _essence(config: ModelConfig, head: str) -> dict[str, Any]:
    """What decides the function that a model with this head computes, in one spelling."""
    c = dataclasses.asdict(config)
    for name in ("prefix_layers", "layer_period", "suffix_layers", "labels", "hidden_dropout", "attention_dropout"):
        del c[name]
    c |= {"layers": config.layers, "head_dim": config.head_size, "num_key_value_heads": config.kv_heads}
    c |= {"embedding_size": config.embedding_width, "query_pre_attn_scalar": config.attention_divisor}
    if config.attention_out_bias is None:
        c["attention_out_bias"] = config.attention_bias
    irrelevant: list[str] = []
    if head != "sequence_classification":
        irrelevant += ["classifier_pooling"]
    if head not in CLASSIFIERS + ("question_answering", "embedding") or config.causal:
        irrelevant += ["classifier_pooler", "classifier_pooling"]
    if head != "masked_lm" and not (config.classifier_pooler == "transform" and head in CLASSIFIERS):
        irrelevant += ["head_transform_bias"]
    if head not in LANGUAGE_MODELS:
        irrelevant += ["head_bias", "head_transform", "tie_word_embeddings", "final_logit_softcapping"]
    if not config.qk_norm:
        c["qk_norm_over"] = "head"
    if "local" not in config.layers:
        irrelevant += ["sliding_window", "local_rope_theta"]
    elif config.local_rope_theta is None and config.rope_scaling_factor is None:
        c["local_rope_theta"] = config.rope_theta
    if config.position_embedding == "learned":
        irrelevant += ["rope_theta", "local_rope_theta", "rope_scaling_factor", "partial_rotary_factor"]
    if config.rope_scaling_factor is None:
        irrelevant += ["rope_type"]
    if config.rope_scaling_factor is None or config.rope_type != "llama3":
        irrelevant += ["rope_original_max_position_embeddings", "rope_low_freq_factor", "rope_high_freq_factor"]
    return {name: value for name, value in c.items() if name not in irrelevant}
