"""A fine-tuning with low-rank adapters: the pretrained parameters are frozen, adapters and the task's head are trained.

Where the adapters stand and how they are applied: espalier/training/adapters.py, espalier/models/layers.py (Einsum).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from espalier.errors import UserError
from espalier.models.heads import LANGUAGE_MODELS
from espalier.models.layers import named_key
from espalier.models.transformer import matrix_axes
from espalier.progress import amount
from espalier.training.adapters import KERNEL, LORA_A, LORA_B, LORA_SCALE
from espalier.training.frozen import Frozen
from espalier.training.state import combined
from finetune.freezing import Partly, whole_model
from sharding.rules import path_of

if TYPE_CHECKING:
    from espalier.task import Start
    from finetune.config import FinetuneConfig, LoraConfig
    from finetune.task import Labelled


class Place(NamedTuple):
    """One kernel [count…, in…, out…] that has an adapter."""

    path: tuple[str, ...]
    """Of its node."""
    count: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    repeats: tuple[int, ...]
    """(R,) in a stack of layers, else ()."""


def adapt(config: FinetuneConfig, data: Labelled, head: str, start: Start) -> Partly:
    """The adapters that config.lora asks for. UserError where there are none, or nothing to adapt."""
    if data.frozen is not None:
        raise UserError("lora.rank: this task has frozen parameters of its own; leave out --lora.rank")
    lora, origin = config.lora, start.origin
    shapes = jax.eval_shape(data.init_params, jax.random.key(0))
    places = places_of(shapes, lora.targets)
    # The head of a language model is a part of what was pretrained.
    trains = () if head in LANGUAGE_MODELS else ("head",)

    def init_params(key: jax.Array) -> dict:
        fresh = data.init_params(key)
        return combined(init_adapters(places, lora, key), {name: fresh[name] for name in trains if name in fresh})

    def base(tree: Mapping) -> dict:
        return {name: part for name, part in tree.items() if name not in trains}

    def scales() -> dict:
        return tree_at({place.path: {LORA_SCALE: jnp.full(place.repeats, lora.scale)} for place in places})

    weights = whole_model(config, data, head, start)

    def load_base(abstract: dict) -> dict:
        layout = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        where = _within(layout, jax.eval_shape(scales))
        return combined(base(weights()), jax.jit(scales, out_shardings=where)())

    def load_trained(abstract: dict) -> dict:
        own = {name: part for name, part in abstract.items() if name not in trains}
        layout = jax.tree.map(lambda leaf: leaf.sharding, own)
        fresh = jax.jit(lambda key: init_adapters(places, lora, key), out_shardings=layout)(jax.random.key(config.seed))
        whole = weights()
        return fresh | {name: whole[name] for name in trains if name in abstract}

    frozen = Frozen(
        lambda key: combined(base(data.init_params(key)), scales()),
        None if origin is None or origin.resumed else load_base,
        origin.revision if origin else "fresh",
    )
    trained = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(jax.eval_shape(init_params, jax.random.key(0))))
    return Partly(
        init_params, frozen, load_trained, {"adapters": _words(places, lora, shapes, trained, bool(trains))}, trained
    )


def places_of(shapes: Any, targets: str) -> list[Place]:
    """The kernels of layers whose path matches. UserError for what is no regular expression, or matches none."""
    try:
        pattern = re.compile(targets)
    except re.error as error:
        raise UserError(f"lora.targets: {targets!r} is no regular expression ({error})") from None
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    axes = jax.tree.structure(shapes).flatten_up_to(matrix_axes(shapes))
    found, there = [], []
    for (key_path, leaf), matrix in zip(leaves, axes, strict=True):
        path = path_of(key_path)
        if matrix is None or not path.endswith(f"/{KERNEL}"):
            continue
        there.append(path)
        if pattern.search(path):
            inputs, outputs = (tuple(leaf.shape[axis] for axis in group) for group in matrix)
            count, names = leaf.shape[: matrix[0][0]], tuple(path.split("/")[:-1])
            found.append(Place(names, count, inputs, outputs, count[:1] if names[1] == "period" else ()))
    if not found:
        raise UserError(f"lora.targets: {targets!r} matches no matrix of a layer; there are {', '.join(there[:8])}")
    return found


def init_adapters(places: list[Place], lora: LoraConfig, key: jax.Array) -> dict:
    """A uniform within ± 1/√inputs, as in PEFT; B zero, so that nothing changes at first."""
    rank = lora.rank
    assert rank is not None
    nodes = {}
    for place in places:
        bound = math.prod(place.inputs) ** -0.5
        shape = (*place.count, rank, *place.inputs)
        a = jax.random.uniform(named_key(key, "/".join((*place.path, LORA_A))), shape, jnp.float32, -bound, bound)
        nodes[place.path] = {LORA_A: a, LORA_B: jnp.zeros((*place.count, *place.outputs, rank), jnp.float32)}
    return tree_at(nodes)


def tree_at(nodes: Mapping[tuple[str, ...], dict]) -> dict:
    tree: dict = {}
    for path, leaves in nodes.items():
        node = tree
        for name in path:
            node = node.setdefault(name, {})
        node.update(leaves)
    return tree


def _within(tree: Mapping, part: Mapping) -> dict:
    """The leaves of `tree` that `part` has too."""
    return {
        name: _within(tree[name], value) if isinstance(value, Mapping) else tree[name] for name, value in part.items()
    }


def _words(places: list[Place], lora: LoraConfig, shapes: Any, trained: int, head: bool) -> str:
    kinds: dict[str, None] = dict.fromkeys("/".join(place.path[3:]) for place in places)
    matrices = sum(math.prod(place.count) for place in places)
    whole = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    return (
        f"rank {lora.rank}, scale {lora.scale:g}, on {matrices} matrices ({', '.join(kinds)}); "
        f"{amount(trained)} of {amount(whole)} parameters are trained ({trained / whole:.2%}{', with the head' * head})"
    ).replace("%", " %")
