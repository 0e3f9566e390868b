"""A fine-tuning that trains a part of its model: the rest is frozen, without gradient and optimizer state.

Repeated layers are stored as stacks [R, …]. Of these the first may be frozen: the frozen tree then has the first rows
and the trained tree the others, which training.state.combined puts together again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from espalier.errors import UserError
from espalier.models.config import ModelConfig
from espalier.models.pretrained import load_weights
from espalier.progress import amount
from espalier.training.frozen import Frozen
from sharding.rules import path_of, shard_params

if TYPE_CHECKING:
    from espalier.task import Start
    from finetune.config import FinetuneConfig
    from finetune.task import Labelled

LAYERS = re.compile(r"layers\.(\d+)(?:-(\d+))?")


class Partly(NamedTuple):
    """What is trained and what is not, for a Task."""

    init_params: Callable[[jax.Array], dict]
    """key → fresh parameters that are trained."""
    frozen: Frozen
    load_params: Callable[[Any], Any]
    """Shapes of what is trained → what it begins with."""
    words: dict[str, str]
    """A row for the introduction."""
    trained: int
    """Parameters."""


def freeze(config: FinetuneConfig, data: Labelled, head: str, start: Start) -> Partly:
    """What config.freeze names is frozen, the rest trained. UserError where that is nothing, or all there is."""
    if data.frozen is not None:
        raise UserError("freeze: this task has frozen parameters of its own; leave out --freeze")
    shapes = jax.eval_shape(data.init_params, jax.random.key(0))
    rows = frozen_rows(config.freeze, data.model, shapes)
    weights = whole_model(config, data, head, start)

    def part(tree: Any, frozen: bool) -> dict:
        return _part(tree, rows, frozen)

    trained, whole = (_size(tree) for tree in (part(shapes, False), shapes))
    if not trained:
        raise UserError(f"freeze: {' '.join(config.freeze)} leaves nothing to train; leave out a part of it")
    origin = start.origin
    frozen = Frozen(
        lambda key: part(data.init_params(key), True),
        None if origin is None or origin.resumed else lambda abstract: part(weights(), True),
        origin.revision if origin else "fresh",
    )
    words = f"{', '.join(_items(config.freeze))}: {amount(whole - trained)} of {amount(whole)} parameters"
    return Partly(
        lambda key: part(data.init_params(key), False),
        frozen,
        lambda abstract: part(weights(), False),
        {"frozen": words},
        trained,
    )


def whole_model(config: FinetuneConfig, data: Labelled, head: str, start: Start) -> Callable[[], dict]:
    """() → all parameters that the run starts from, on the mesh. They are read by the first call, handed out by the
    second, for the other part, and then let go."""
    read: list[dict] = []

    def weights() -> dict:
        assert start.origin is not None
        if read:
            return read.pop()
        shapes = jax.eval_shape(data.init_params, jax.random.key(0))
        abstract = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            shapes,
            shard_params(shapes, start.mesh),
        )
        read.append(load_weights(start.origin, data.model, head, data.init_params, config.seed)(abstract))
        return read[0]

    return weights


def frozen_rows(given: tuple[str, ...], model: ModelConfig, shapes: Any) -> dict[str, int | None]:
    """Path → how many of the first rows are frozen; None = the whole leaf. UserError for what names no parameter."""
    if not _items(given):
        raise UserError("freeze: names nothing; give embeddings, layers.0-5, or leave it out")
    paths = [path_of(key_path) for key_path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    rows: dict[str, int | None] = {}
    layers: set[int] = set()
    for item in _items(given):
        if match := LAYERS.fullmatch(item):
            first, last = int(match[1]), int(match[2] or match[1])
            if not first <= last < model.num_hidden_layers:
                raise UserError(
                    f"freeze: {item}: the model has the layers 0 to {model.num_hidden_layers - 1}; the first half is "
                    f"layers.0-{max(0, model.num_hidden_layers // 2 - 1)}"
                )
            layers |= set(range(first, last + 1))
            continue
        try:
            pattern = re.compile(r"^embeddings/" if item == "embeddings" else item)
        except re.error as error:
            raise UserError(f"freeze: {item!r} is no regular expression ({error})") from None
        found = [path for path in paths if pattern.search(path)]
        if not found:
            raise UserError(
                f"freeze: {item!r} matches no parameter; give embeddings, layers.0-5 or a regular expression on paths "
                f"like {paths[0]}, {paths[-1]}"
            )
        rows |= dict.fromkeys(found)
    for section, count in _first_layers(layers, model).items():
        inside = [path for path in paths if path.startswith(f"{section}/")]
        rows |= {path: count for path in inside if path not in rows}
    return rows


def _first_layers(layers: set[int], model: ModelConfig) -> dict[str, int | None]:
    """Node of a layer in the tree → how many of its repeats are frozen, None = all. UserError unless the first are."""
    prefix, size = len(model.prefix_layers), len(model.layer_period)
    found: dict[str, int | None] = {}
    for number in layers:
        repeat, slot = divmod(number - prefix, size)
        if number < prefix:
            found[f"layers/prefix/{number}"] = None
        elif repeat >= model.repeats:
            found[f"layers/suffix/{number - prefix - size * model.repeats}"] = None
        else:
            node = f"layers/period/{slot}"
            found[node] = (found.get(node) or 0) + 1
    for node, count in found.items():
        if count is None:
            continue
        numbers = [prefix + int(node.rpartition("/")[2]) + size * repeat for repeat in range(count)]
        if missing := [number for number in numbers if number not in layers]:
            raise UserError(
                f"freeze: layers are frozen from the first on, for alike ones are stored as one stack, and layer "
                f"{missing[0]} is not among them; try layers.0-{max(layers)}"
            )
    return {node: None if count == model.repeats else count for node, count in found.items()}


def _items(given: tuple[str, ...]) -> list[str]:
    return [item.strip() for words in given for item in words.split(",") if item.strip()]


def _part(tree: Any, rows: Mapping[str, int | None], frozen: bool, prefix: str = "") -> dict:
    part: dict = {}
    for name, value in tree.items():
        path = prefix + name
        if isinstance(value, Mapping):
            if inner := _part(value, rows, frozen, f"{path}/"):
                part[name] = inner
        elif (count := rows.get(path)) is not None:
            part[name] = _slice(value, slice(count) if frozen else slice(count, None))
        elif (path in rows) == frozen:
            part[name] = value
    return part


def _slice(leaf: Any, rows: slice) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(range(leaf.shape[0])[rows]), *leaf.shape[1:]), leaf.dtype)
    return leaf[rows]


def _size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
