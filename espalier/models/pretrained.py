"""What a run takes from the model it starts from, be that another run or a folder of Hugging Face."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from espalier.contracts import Origin
from espalier.errors import UserError
from espalier.models.config import ModelConfig
from espalier.models.heads import LANGUAGE_MODELS
from espalier.models.hub import Export
from espalier.models.weight_map import param_shapes

SINGLE_LABEL = "single_label_classification"


def architecture_of(saved: dict, preset: ModelConfig, given: frozenset[str] = frozenset()) -> ModelConfig:
    """The model of a run that starts from a saved one: its architecture, but for the settings that were asked for.

    saved: the configuration beside the weights. given: settings of `preset` that the user named.
    """
    model = ModelConfig.from_dict(saved["model"])
    changes = {name: getattr(preset, name) for name in given}
    return dataclasses.replace(model, **changes)


def part_of(params: Any, saved: dict) -> Any:
    """The parameters of the run's model, where several were trained. saved: config.json."""
    return params[saved["part"]] if saved.get("part") else params


def beside_of(params: Any, saved: dict) -> dict[str, Export]:
    """What is exported beside the run's model: the others that were trained. params, saved: as in `part_of`."""
    found = {}
    for name, one in saved.get("beside", {}).items():
        model, head = ModelConfig.from_dict(one["model"]), one["head"]
        whole = None if params is None else completed(params[name], params[saved["part"]], param_shapes(model, head))
        found[name] = Export(model, whole, head)
    return found


def completed(own: Any, main: Any, shapes: Any) -> Any:
    """The parameters of a model that has what `own` lacks in common with another. shapes: its tree."""

    def part(name: str, shape: Any) -> Any:
        if isinstance(shape, dict):
            return completed(own.get(name, {}), main.get(name, {}), shape)
        return own[name] if name in own else main[name]

    return {name: part(name, shape) for name, shape in shapes.items()}


def export_to(path: str | None, run_dir: Path, origin: Origin | None, steps: int) -> Path | None:
    """Where a run of so many steps exports to at its end; None if nowhere, or if it has ended and done so.

    UserError for the run's own folder.
    """
    if path is None:
        return None
    target = Path(path).expanduser().absolute()
    if target == run_dir or run_dir.is_relative_to(target):
        raise UserError(f"--export {path} is where the run is; name another folder")
    if origin is not None and (origin.done >= steps or _ended_early(run_dir, origin)) and _exported(target):
        print(f"exported already to {path}", flush=True)
        return None
    return target


def _exported(target: Path) -> bool:
    return any((target / name).is_file() for name in ("config.json", "modules.json"))


def _ended_early(run_dir: Path, origin: Origin) -> bool:
    """Whether the run itself ended before its last step because nothing got better, as its summary says."""
    try:
        best = json.loads((run_dir / "summary.json").read_text(encoding="utf-8")).get("best") or {}
    except (OSError, ValueError):
        return False
    return origin.resumed and bool(best.get("ended"))


def load_weights(
    origin: Origin, model: ModelConfig, head: str, init: Callable[[jax.Array], dict], seed: int
) -> Callable[[Any], Any]:
    """Parameter shapes with shardings → the saved parameters, with the head of init(key) where theirs is another.

    A classifier keeps its head only if the labels of `model` are the same. Of a run of several models it is the one
    that the run is about.
    """
    there, their_head = origin.config["model"], origin.config.get("head", origin.config.get("task"))
    labels, problem = tuple(there.get("labels", ())), there.get("problem_type") or SINGLE_LABEL
    same_classes = labels == model.labels and problem == (model.problem_type or SINGLE_LABEL)

    def load(abstract: dict) -> dict:
        if their_head == head and same_classes:
            return origin.restore_params(abstract)
        params = origin.restore_params({name: part for name, part in abstract.items() if name != "head"})
        if "head" not in abstract:
            return params
        said = f"{origin.name} has no head {head}" if head in LANGUAGE_MODELS else ""
        if their_head == head and head not in LANGUAGE_MODELS:
            kind = "" if problem == SINGLE_LABEL else f" ({problem})"
            said = f"the head of {origin.name} is for the labels {', '.join(labels[:8])}{kind}"
        if said and jax.process_index() == 0:
            print(f"{said}: a new one begins at random", flush=True)
        layout = jax.tree.map(lambda leaf: leaf.sharding, abstract["head"])
        return params | {"head": jax.jit(lambda key: init(key)["head"], out_shardings=layout)(jax.random.key(seed))}

    return load
