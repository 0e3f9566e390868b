"""Low-rank adapters in the format of the `peft` library, both ways: adapter_config.json, adapter_model.safetensors.

PEFT has an adapter for each linear module of transformers: lora_A [r, in] and lora_B [out, r], whatever way round the
module keeps its weight (GPT-2's is [in, out]: fan_in_fan_out). Ours stand beside parameters that are split and fused
otherwise (training/adapters.py). Where transformers fuses what is apart here (c_attn, Wqkv, Wi), the adapters of the
parts are one of the sum of their ranks: A stacked, B block by block, alpha grown so that the scale stays.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from espalier.errors import UserError
from espalier.files import appearing
from espalier.models.config import ModelConfig
from espalier.models.families import family_of
from espalier.models.heads import LANGUAGE_MODELS
from espalier.models.repository import local_folder
from espalier.models.tensor_files import open_file, write_file
from espalier.models.weight_map import Piece, Tensor, export, leaves_of, parts_by_path, plain_name, tensors_of, tree_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
TASK_TYPES = {
    "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS",
    "causal_lm": "CAUSAL_LM",
    "embedding": "FEATURE_EXTRACTION",
}
SAVED_WHOLE = ("classifier", "score", "qa_outputs")
"""Modules that PEFT saves whole for these task types by itself, with all that is in them."""
PLAIN = re.compile(r"\^?(?:\.\*\\?\.?)?(?:[\w\-]|\\?\.|\\-|\\d\+(?!\\d)|\[\w+\]|\(\w+(?:\|\w+)*\))*\$?")
"""Patterns of modules that are tried as they are: names, with digits left open. A file must not bring a regular
expression that takes for ever (nested repeats)."""
KEYS = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


def save_adapter(
    path: str | os.PathLike,
    config: ModelConfig,
    head: str,
    params: Mapping,
    base: str,
    *,
    rank: int,
    alpha: float,
    rslora: bool = False,
    dropout: float = 0.0,
    card: str | None = None,
) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained` puts on the base model, with the head of the task.

    params: complete, with adapters, NumPy or JAX arrays. base: folder or id of the base model in Hugging Face format.
    The folder must be new or empty. UserError where PEFT has no such adapter.
    """
    path = Path(path).expanduser()
    tensors, settings = adapter_of(config, head, params, rank=rank, alpha=alpha, rslora=rslora)
    settings |= {"base_model_name_or_path": base, "lora_dropout": dropout}
    with appearing(path) as folder:
        (folder / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        write_file(folder / WEIGHTS, tensors)
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")


def adapter_of(
    config: ModelConfig, head: str, params: Mapping, *, rank: int, alpha: float, rslora: bool = False
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(tensors, adapter_config.json) of a model with adapters of one rank."""
    leaves = dict(leaves_of(params))
    plain = {path: leaf for path, leaf in leaves.items() if not path[-1].startswith("lora_")}
    whole: dict[str, None] = {}
    ranks: dict[str, int] = {}
    found: dict[str, np.ndarray] = {}
    turned = set()
    for tensor in tensors_of(family_of(config.model_type), config, head, tree_of(plain)):
        module = tensor.name.rpartition(".")[0]
        if head not in LANGUAGE_MODELS and all(path[0] == "head" for path, _ in tensor.targets):
            first = module.split(".")[0]
            whole[first if first in SAVED_WHOLE else module] = None
            found |= {PREFIX + name: value for name, value in export([tensor], params)}
            continue
        if not any((*path[:-1], "lora_a") in leaves for path, _ in tensor.targets) or not tensor.name.endswith(
            "weight"
        ):
            continue
        a, b, fan_in_fan_out = _joined(tensor, leaves)
        turned.add(fan_in_fan_out)
        ranks[module] = len(a)
        found |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
    assert len(turned) == 1, "modules that keep their weight either way in one model"
    wider = {module: own for module, own in ranks.items() if own != rank}
    grown = {module: alpha * (math.sqrt(own / rank) if rslora else own / rank) for module, own in wider.items()}
    return found, {
        "peft_type": "LORA",
        "task_type": TASK_TYPES.get(head),
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "rank_pattern": {re.escape(module): own for module, own in wider.items()},
        "alpha_pattern": {re.escape(module): own for module, own in grown.items()},
        "target_modules": list(ranks),
        "modules_to_save": list(whole) or None,
        "fan_in_fan_out": turned.pop(),
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }


def read_adapter(folder: str | os.PathLike, config: ModelConfig, head: str, params: Mapping) -> dict:
    """The parameters of a base model with an adapter of PEFT merged into them; what it saved whole replaces theirs.

    folder: or the id of a repository on the Hub. UserError for an adapter of another kind or another model.
    """
    path = local_folder(folder, None)
    settings, tensors = _settings(path), open_file(path / WEIGHTS)
    family = family_of(config.model_type)
    modules: dict[str, dict[str, np.ndarray]] = {}
    whole: dict[str, np.ndarray] = {}
    for name, view in tensors.items():
        plain = plain_name(family, name.removeprefix(PREFIX))
        if match := KEYS.fullmatch(plain):
            modules.setdefault(match["module"], {})[match["side"]] = np.asarray(view, np.float32)
        else:
            whole[plain] = view
    full = {plain_name(family, name.removeprefix(PREFIX)): name for name in tensors}
    views, there = {}, tensors_of(family, config, head, dict(params))
    for tensor in there:
        plain = plain_name(family, tensor.name)
        module = plain.removesuffix(".weight")
        if plain in whole:
            views[tensor.name] = _shaped(path, plain, whole.pop(plain), tensor)
        elif module in modules:
            pair = modules.pop(module)
            if pair.keys() != {"A", "B"}:
                raise UserError(f"{path} has only one of lora_A and lora_B for {module}; copy the folder again")
            named = KEYS.fullmatch(full[f"{module}.lora_A.weight"].removeprefix(PREFIX))
            assert named
            change = pair["B"] @ pair["A"] * _scale(settings, named["module"], len(pair["A"]))
            (before,) = (value for name, value in export([tensor], params) if name == tensor.name)
            change = _shaped(path, module, change.T if settings.get("fan_in_fan_out") else change, tensor)
            views[tensor.name] = before + change
    if left := sorted([*modules, *whole]):
        raise UserError(
            f"{path} has adapters for {', '.join(left[:4])}{' and more' * (len(left) > 4)}, and a {config.model_type} "
            f"with head {head} has no such matrix; name the model that it was trained on, and its head with --head"
        )
    new = dict(leaves_of(params))
    for target, parts in parts_by_path([tensor for tensor in there if tensor.name in views], views).items():
        leaf = np.array(new[target])
        for index, part in parts:
            leaf[index][tuple(slice(size) for size in part.shape)] = part
        new[target] = leaf
    return tree_of(new)


def _joined(tensor: Tensor, leaves: Mapping) -> tuple[np.ndarray, np.ndarray, bool]:
    """(A [r, in], B [out, r], whether the weight is [in, out]) of all adapters on the parts of a tensor."""
    blocks_a, blocks_b, start, total, turned = [], [], 0, 0, False
    for piece in tensor.pieces:
        turned = _turned(piece)
        for number, (path, index) in enumerate(piece.targets):
            if (*path[:-1], "lora_a") not in leaves:
                continue
            a, b = (np.asarray(leaves[*path[:-1], name][index]) for name in ("lora_a", "lora_b"))
            axes = piece.order[len(piece.targets) > 1 :]
            inputs, outputs = axes[: a.ndim - 1], axes[a.ndim - 1 :]
            blocks_a.append(a.transpose(0, *(1 + np.argsort(inputs))).reshape(len(a), -1))
            if len(piece.targets) > 1:
                one = np.zeros((len(piece.targets), *b.shape), b.dtype)
                one[number] = b
                b, outputs = one, (piece.order[0], *outputs)
            blocks_b.append((start, b.transpose(*np.argsort(outputs), b.ndim - 1).reshape(-1, b.shape[-1])))
        total += piece.shape[1] if turned else piece.shape[0]
        start = total
    joined = np.zeros((total, sum(map(len, blocks_a))), np.float32)
    column = 0
    for row, block in blocks_b:
        joined[row : row + len(block), column : column + block.shape[1]] = block
        column += block.shape[1]
    return np.ascontiguousarray(np.concatenate(blocks_a)), joined, turned


def _turned(piece: Piece) -> bool:
    """Whether a weight is [in, out]: whether what its parameter sums over first is of the tensor's first axis."""
    rows, axes = 1, 0
    while rows < piece.shape[0]:
        rows *= piece.split[axes]
        axes += 1
    return piece.order[len(piece.targets) > 1] < axes


def _settings(path: Path) -> dict:
    try:
        settings = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        patterns = list(settings.get("alpha_pattern") or {})
    except (OSError, ValueError, RecursionError, AttributeError, TypeError) as error:
        raise UserError(f"{path} holds no adapter of PEFT ({error}); it has {CONFIG} and {WEIGHTS}") from None
    if odd := next((one for one in patterns if len(one) > 500 or not PLAIN.fullmatch(one)), None):
        raise UserError(f"{path} has alpha_pattern {odd[:100]!r}; read are names of modules, with .* and \\d+ at most")
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{path} is an adapter of type {settings.get('peft_type')}; only LORA is read")
    for name in ("use_dora", "lora_bias", "megatron_config", "trainable_token_indices", "target_parameters"):
        if settings.get(name):
            raise UserError(f"{path} has {name}={settings[name]!r}, which is not read; merge it with PEFT first")
    if settings.get("bias", "none") != "none":
        raise UserError(f"{path} has bias={settings['bias']!r}, which is not read; merge it with PEFT first")
    if not (path / WEIGHTS).is_file():
        raise UserError(f"{path} has no {WEIGHTS}; save the adapter anew with a PEFT that writes safetensors")
    return settings


def _scale(settings: dict, module: str, rank: int) -> float:
    patterns = settings.get("alpha_pattern") or {}
    own = next((alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), None)
    alpha = settings.get("lora_alpha", 8) if own is None else own
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _shaped(path: Path, name: str, found: np.ndarray, tensor: Tensor) -> np.ndarray:
    if found.shape != tensor.shape:
        raise UserError(f"{path}: {name} is {found.shape} and the model's {tensor.shape}; it is for another model")
    return np.asarray(found, np.float32)
