"""What a run takes from the model it starts from, be that another run or a folder of Hugging Face."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax

from cli import UserError
from models.config import ModelConfig


class Saved(Protocol):
    """Weights and what stands beside them (training.start.Origin)."""

    @property
    def config(self) -> dict: ...
    def restore_params(self, abstract: Any) -> Any: ...


def architecture_of(saved: dict, preset: ModelConfig, given: frozenset[str] = frozenset()) -> ModelConfig:
    """The model of a run that starts from a saved one: its architecture, but for the settings that were asked for.

    saved: the configuration beside the weights. given: settings of `preset` that the user named. UserError where an
    encoder should become a decoder or the other way round.
    """
    model = ModelConfig.from_dict(saved["model"])
    changes = {name: getattr(preset, name) for name in given}
    model = dataclasses.replace(model, **changes)
    if model.causal != preset.causal:
        kind, door = ("a decoder", "clm") if model.causal else ("an encoder", "mlm")
        raise UserError(f"--init-from names {kind} ({model.model_type}); pretrain it by `{door}`")
    return model


def load_weights(
    origin: Saved, model: ModelConfig, head: str, init: Callable[[jax.Array], dict], seed: int
) -> Callable[[Any], Any]:
    """Parameter shapes with shardings → the saved parameters, with the head of init(key) where theirs is another.

    A classifier keeps its head only if the labels of `model` are the same.
    """
    labels = tuple(origin.config["model"].get("labels", ()))

    def load(abstract: dict) -> dict:
        if origin.config.get("task") == head and labels == model.labels:
            return origin.restore_params(abstract)
        params = origin.restore_params({name: part for name, part in abstract.items() if name != "head"})
        if "head" not in abstract:
            return params
        layout = jax.tree.map(lambda leaf: leaf.sharding, abstract["head"])
        return params | {"head": jax.jit(lambda key: init(key)["head"], out_shardings=layout)(jax.random.key(seed))}

    return load
