"""The files that make a folder in Hugging Face format one of sentence-transformers: pooling, norm, length of a text.

    modules.json                       transformer → pooling → normalise, in this order
    1_Pooling/config.json              which pooling
    sentence_bert_config.json          tokens of a text at most
    config_sentence_transformers.json  how vectors are compared, and what is put before a text

They are written in the spelling that every version since 2 reads, and read in that and in the one of version 5.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from espalier.errors import UserError
from espalier.files import inside, read_json

Pooling = Literal["mean", "first", "last"]
MODULES = "modules.json"
POOLINGS = {
    "mean": "pooling_mode_mean_tokens",
    "first": "pooling_mode_cls_token",
    "last": "pooling_mode_lasttoken",
}
SPELLED = {"mean": "mean", "cls": "first", "lasttoken": "last"}
"""Poolings as version 5 calls them → as they are called here."""
NOT_OURS = ("max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens")


def module_files(saved: Mapping[str, Any], width: int) -> dict[str, Any]:
    """Path in the folder → JSON value, for the run of a bi-encoder with config.json `saved`; empty for another run.

    width: D, numbers of an embedding.
    """
    if not saved.get("pooling"):
        return {}
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")]
    kinds += [("2_Normalize", "Normalize")] * saved.get("normalize", True)
    prompt = saved.get("prompt")
    modules = [
        {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for at, (path, kind) in enumerate(kinds)
    ]
    chosen = POOLINGS[saved["pooling"]]
    names = (*POOLINGS.values(), *(f"pooling_mode_{name}" for name in NOT_OURS))
    pooling = {"word_embedding_dimension": width} | {name: name == chosen for name in names} | {"include_prompt": True}
    return {
        MODULES: modules,
        "1_Pooling/config.json": pooling,
        "sentence_bert_config.json": {"max_seq_length": saved.get("longest"), "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": {"default": prompt} if prompt else {},
            "default_prompt_name": "default" if prompt else None,
            "similarity_fn_name": "cosine",
        },
    }


def read_modules(folder: Path) -> dict[str, Any]:
    """What a folder of sentence-transformers says, as the run of a bi-encoder has it; empty for another folder.

    `pooling`, `normalize` (whether vectors have length 1), `longest` (tokens of a text at most, or None), `prompt`
    (what is put before every text, or None), `framed`: that texts are tokenized as its tokenizer does. UserError for
    modules that are not known here.
    """
    if not (folder / MODULES).is_file():
        return {}
    modules = _modules(folder)
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UserError(
            f"{folder / MODULES} has the modules {', '.join(kinds) or 'none'}; those of Transformer, Pooling and "
            "Normalize, in this order, are supported"
        )
    pooling = modules[1].get("path", "1_Pooling")
    path = inside(folder, f"{pooling}/config.json" if pooling else "config.json", folder / MODULES)
    if modules[0].get("path") or not path.is_file():
        lacks = f"its transformer in {modules[0]['path']}" if modules[0].get("path") else f"no {path}"
        raise UserError(f"{folder} has {lacks}; expected the transformer in the folder itself and {path}")
    settings = folder / "sentence_bert_config.json"
    given = read_json(settings) if settings.is_file() else {}
    if given.get("do_lower_case") and not read_json(folder / "tokenizer_config.json").get("do_lower_case"):
        raise UserError(f"{settings} lowers the case of texts and its tokenizer does not; that is not supported")
    length = given.get("max_seq_length")
    found = {"pooling": _pooling(path), "normalize": len(kinds) == 3, "longest": length, "prompt": _prompt(folder)}
    if found["prompt"] and not read_json(path).get("include_prompt", True):
        raise UserError(f"{path} leaves the prompt out of the pooling, which is not supported")
    return found | {"framed": True}


def _modules(folder: Path) -> list[dict[str, Any]]:
    path = folder / MODULES
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise UserError(f"{path} does not hold a list of modules")
    return sorted(modules, key=lambda module: module.get("idx", 0))


def _prompt(folder: Path) -> str | None:
    path = folder / "config_sentence_transformers.json"
    values = read_json(path) if path.is_file() else {}
    return (values.get("prompts") or {}).get(values.get("default_prompt_name")) or None


def _pooling(path: Path) -> str:
    values = read_json(path)
    named = values.get("pooling_mode")
    if named is None:
        found = [name for name, key in POOLINGS.items() if values.get(key)]
        others = [name for name in NOT_OURS if values.get(f"pooling_mode_{name}")]
    else:
        names = [named] if isinstance(named, str) else list(named)
        found = [SPELLED[name] for name in names if name in SPELLED]
        others = [name for name in names if name not in SPELLED]
    if len(found) != 1 or others:
        there = ", ".join([*found, *others]) or "none"
        raise UserError(f"{path} pools by {there}; one of mean, first (cls) and last (lasttoken) is supported")
    return found[0]
