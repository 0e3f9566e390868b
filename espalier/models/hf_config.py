"""config.json of Hugging Face ↔ ModelConfig, by the families' maps; transformers fills in defaults, reads old keys."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

from espalier.errors import UserError
from espalier.files import read_json
from espalier.models.config import ModelConfig
from espalier.models.families import family_of
from espalier.models.heads import WRITERS
from espalier.models.published import TOKENS, Published

CLASSIFIERS = ("sequence_classification", "token_classification")


def read_config(folder: Path) -> tuple[Any, ModelConfig]:
    """transformers' configuration, with the defaults of what an old file leaves out, and ours.

    UserError for remote code and for values that do not fit.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no config.json; expected a folder in Hugging Face format")
    values = read_json(path)
    model_type = str(values.get("model_type"))
    family = family_of(model_type)
    for name in ("config.json", "tokenizer_config.json"):
        passed_over = name == "config.json" and family.passes_auto_map
        if not passed_over and (folder / name).is_file() and "auto_map" in read_json(folder / name):
            raise UserError(f"{folder / name} asks for code from the repository (auto_map), which is never run")
    if values.get("quantization_config"):
        raise UserError(f"{path}: the weights are quantised; take the model in float32, bfloat16 or float16")
    made = _config_class(model_type)
    try:
        hf = made.from_dict(values)
        return hf, to_ours(hf)
    except UserError:
        raise
    except Exception as error:  # of many kinds, for invalid values
        raise UserError(f"{path} is not a valid {model_type} configuration: {' '.join(str(error).split())}") from None


def to_ours(hf: Any) -> ModelConfig:
    """Our configuration from transformers', without labels; UserError for an architecture that is not supported."""
    family = family_of(hf.model_type)
    for key, accepted in family.only.items():
        value = getattr(hf, key, accepted[0])
        if value not in accepted:
            raise UserError(f"{hf.model_type} with {key}={value!r} is not supported; it must be {accepted[0]!r}")
    if not hasattr(hf, "tie_word_embeddings"):
        hf.tie_word_embeddings = True  # CamembertConfig of transformers 5.0 sets none.
    settings = {ours: getattr(hf, theirs) for ours, theirs in family.keys.items()}
    if family.base.causal:
        settings["causal"] = getattr(hf, "is_causal", True) is not False
    return dataclasses.replace(family.base, **settings | family.read(hf), labels=(), problem_type=None)


def to_hf(
    config: ModelConfig,
    head: str,
    tokenizer: Any = None,
    dtype: str = "float32",
    published: Published | None = None,
) -> Any:
    """transformers' configuration of a model with this head.

    published: files that the model comes from, whose settings stay but for those that have changed since. UserError
    where the model is not of the class that would load it: the way back must give the same architecture.
    """
    family = family_of(config.model_type)
    made = _config_class(config.model_type)
    if head not in family.classes:
        raise UserError(
            f"transformers has no {config.model_type} with the head {head}; there are {', '.join(family.classes)}"
        )
    if head == "sequence_classification" and family.base.causal and not config.causal:
        raise UserError(
            f"transformers has no {config.model_type} that sees both sides and classifies by its first token; leave "
            "out the export"
        )
    values = _theirs(config)
    source = published_config(published, config)
    if source is None:
        values = _special_tokens(config, tokenizer) | values
        _check_padding(config, tokenizer, values)
        must = {"nomic_bert": "pad_token_id", "eurobert": "mask_token_id"}.get(config.model_type)
        if must and values.get(must) is None:
            # None is not allowed there: without a tokenizer the class keeps its default.
            values.pop(must, None)
    else:
        assert published is not None
        before = _theirs(to_ours(source))
        changed = {name: value for name, value in values.items() if value != before.get(name)}
        values = source.to_dict() | changed
        if not published.fits(tokenizer):
            values |= _special_tokens(config, tokenizer) | family.write(config)
            _check_padding(config, tokenizer, values)
        if source.architectures and family.classes[head] not in source.architectures:
            for name in ("id2label", "label2id", "problem_type"):  # of the head that it had
                values.pop(name, None)
    if head in CLASSIFIERS:
        values["id2label"] = dict(enumerate(config.labels))
        values["label2id"] = {label: number for number, label in enumerate(config.labels)}
        values["problem_type"] = config.problem_type
    hf = made.from_dict(values | {"architectures": [family.classes[head]], "dtype": dtype})
    # T5's class takes it for another setting and forgets it; older versions of it, and ours, read it.
    tied = values.get("tie_word_embeddings", True)
    if getattr(hf, "tie_word_embeddings", True) != tied:
        hf.tie_word_embeddings = tied
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


def config_values(hf: Any, config: ModelConfig, published: Published | None) -> dict[str, Any]:
    """config.json: as it was published, but for what has changed since; else all that differs from the defaults."""
    plain = json.loads(hf.to_json_string())
    source = published_config(published, config)
    if source is None:
        return plain
    assert published is not None
    here, there = (json.loads(each.to_json_string(use_diff=False)) for each in (hf, source))
    changed = {name: value for name, value in here.items() if name not in there or there[name] != value}
    dtype = "torch_dtype" if "torch_dtype" in published.config and "dtype" not in published.config else "dtype"
    changed = changed | {dtype: changed.pop("dtype", here["dtype"])}
    gone = [name for name in there if name not in here] + ["num_labels"] * ("id2label" in changed)
    kept = {name: value for name, value in published.config.items() if name not in gone}
    unset = [name for name, value in changed.items() if value is None]
    spellings = ({name: value for name, value in (kept | changed).items() if name not in unset}, kept | changed)
    for values in spellings:
        # An older spelling may contradict a newer one beside it: what is read back decides.
        again = type(hf).from_dict(copy.deepcopy(values))
        if json.loads(again.to_json_string(use_diff=False)) == here:
            return values | {"transformers_version": plain["transformers_version"]}
    return plain


def published_config(published: Published | None, config: ModelConfig) -> Any | None:
    """transformers' configuration from the files that a model comes from; None where they are about another kind."""
    if published is None or not published.describes(config):
        return None
    return _config_class(config.model_type).from_dict(copy.deepcopy(published.config))


def _config_class(model_type: str) -> Any:
    """UserError where the installed transformers is older than the family."""
    import transformers

    if model_type not in transformers.CONFIG_MAPPING:
        raise UserError(
            f"transformers {transformers.__version__} has no {model_type}, which came with version "
            f"{family_of(model_type).since}; try pip install --upgrade transformers"
        )
    return transformers.CONFIG_MAPPING[model_type]


def _theirs(config: ModelConfig) -> dict[str, Any]:
    """Everything in transformers' config that ours decides."""
    family = family_of(config.model_type)
    # A decoder that sees both sides, from version 5.2 of transformers on.
    turned = {"is_causal": False} if family.base.causal and not config.causal else {}
    return {theirs: getattr(config, ours) for ours, theirs in family.keys.items()} | family.write(config) | turned


def _special_tokens(config: ModelConfig, tokenizer: Any) -> dict[str, int | None]:
    """Those that the tokenizer names, and none that it does not."""
    more = {"modernbert": ("cls_token_id", "sep_token_id"), "eurobert": ("mask_token_id",)} if tokenizer else {}
    return {name: getattr(tokenizer, name, None) for name in TOKENS + more.get(config.model_type, ())}


def _check_padding(config: ModelConfig, tokenizer: Any, values: dict[str, Any]) -> None:
    """UserError where positions are counted from a token other than the tokenizer's padding."""
    pad = _special_tokens(config, tokenizer)["pad_token_id"]
    if tokenizer is not None and values["pad_token_id"] != pad:
        raise UserError(
            f"{config.model_type} counts positions from its padding token, here {values['pad_token_id']}, and the "
            f"tokenizer's is {pad}; train with --model.position-offset {(pad or 0) + 1}, or export as bert"
        )


def _essence(config: ModelConfig, head: str) -> dict[str, Any]:
    """What decides the function that a model with this head computes, in one spelling."""
    c = dataclasses.asdict(config)
    for name in ("prefix_layers", "layer_period", "suffix_layers", "labels", "problem_type"):
        del c[name]
    del c["hidden_dropout"], c["attention_dropout"], c["adapter_dropout"], c["zero_outputs"]
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
    if head not in WRITERS:
        irrelevant += ["head_bias", "head_transform", "tie_word_embeddings", "final_logit_softcapping"]
    if not config.num_decoder_layers:
        irrelevant += ["scale_decoder_outputs", "decoder_start_token_id"]
    if config.position_embedding != "relative":
        irrelevant += ["relative_attention_num_buckets", "relative_attention_max_distance"]
    if not config.qk_norm:
        c["qk_norm_over"] = "head"
    if "local" not in config.layers:
        irrelevant += ["sliding_window", "local_rope_theta"]
    elif config.local_rope_theta is None and config.rope_scaling_factor is None:
        c["local_rope_theta"] = config.rope_theta
    if config.position_embedding != "rotary":
        irrelevant += ["rope_theta", "local_rope_theta", "rope_scaling_factor", "partial_rotary_factor"]
        irrelevant += ["rope_attention_factor"]
    if config.rope_scaling_factor is None:
        irrelevant += ["rope_type"]
    c["rope_attention_factor"] = config.rotary_length
    kind = None if config.rope_scaling_factor is None else config.rope_type
    if kind not in ("llama3", "yarn"):
        irrelevant += ["rope_original_max_position_embeddings"]
    if kind != "llama3":
        irrelevant += ["rope_low_freq_factor", "rope_high_freq_factor"]
    if kind != "yarn":
        irrelevant += ["rope_beta_fast", "rope_beta_slow", "rope_truncate"]
    return {name: value for name, value in c.items() if name not in irrelevant}
