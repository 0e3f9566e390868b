"""The language in which a family maps the tensors of a file to parameters, read in both directions.

    "encoder.layer.{}.attention.self.key.weight": "attention/kv/kernel[0]: (K H) D -> D K H"
    "h.{}.attn.c_attn.weight": "attention/q/kernel attention/kv/kernel[0] attention/kv/kernel[1]: D (3 N H) -> 3 D N H"
    "qkv.{}.weight": "attention/q/kernel: (N H) D -> D N H + attention/kv/kernel[0]: (K H) D -> D K H"

Left the tensor's name, `{}` the layer. Right the parameter, with its place on a leading axis; then the tensor's axes
and how they are split and turned (letters: DESIGN, "Letters"; E embedding, P positions, Y token types, C classes, U
buckets of distances, O a second D). With several parameters the first axis after the arrow goes over them. Pieces with
a plus between them follow one another on the tensor's first axis. All of it are views: nothing is copied before a slice
of a parameter is read.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from espalier.errors import UserError
from espalier.models.config import ModelConfig
from espalier.models.families import Family, Weights
from espalier.models.placement import Part
from espalier.models.transformer import init_params

ParamPath = tuple[str, ...]


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file and the parameters it holds."""

    name: str
    """In the file, with prefix."""
    also: tuple[str, ...]
    """Other names that it has in some files."""
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    """What follows one another on its first axis; most tensors are a single one."""
    copies: tuple[str, ...] = ()
    """Further names under which it is written, and read where its own is missing."""

    @property
    def targets(self) -> tuple[tuple[ParamPath, tuple[int, ...]], ...]:
        """ParamPath of the parameter and index on its leading axes, piece by piece."""
        return tuple(target for piece in self.pieces for target in piece.targets)

    def parts(self, tensor: Any) -> list[Any]:
        """Views of the tensor, one for each target."""
        found, start = [], 0
        for piece in self.pieces:
            rows = piece.shape[0]
            whole = rows == self.shape[0]
            found += piece.parts(tensor if whole else tensor[start : start + rows])
            start += rows
        return found

    def join(self, parts: list[np.ndarray]) -> np.ndarray:
        """The tensor that has these `parts`, without the rows that pad a vocabulary."""
        joined, start = [], 0
        for piece in self.pieces:
            joined.append(piece.join(parts[start : start + len(piece.targets)]))
            start += len(piece.targets)
        return joined[0] if len(joined) == 1 else np.concatenate(joined)


@dataclass(frozen=True)
class Piece:
    """A run of a tensor's first axis, split and turned in one way."""

    shape: tuple[int, ...]
    split: tuple[int, ...]
    """The shape with groups of axes taken apart."""
    order: tuple[int, ...]
    """Axes of `split` in the parameters' order."""
    targets: tuple[tuple[ParamPath, tuple[int, ...]], ...]
    """As Tensor.targets."""

    def parts(self, tensor: Any) -> list[Any]:
        view = tensor.reshape(self.split).transpose(self.order)
        return list(view) if len(self.targets) > 1 else [view]

    def join(self, parts: list[np.ndarray]) -> np.ndarray:
        view = np.stack(parts) if len(parts) > 1 else parts[0]
        view = view[tuple(slice(self.split[axis]) for axis in self.order)]
        return np.ascontiguousarray(view.transpose(np.argsort(self.order)).reshape(self.shape))


def param_shapes(config: ModelConfig, head: str) -> dict:
    """ShapeDtypeStructs of the parameters of a model with this head, in a tree that the caller may change."""
    return jax.tree.map(lambda shape: shape, _param_shapes(config, head))


@functools.lru_cache(maxsize=64)
def _param_shapes(config: ModelConfig, head: str) -> dict:
    # Tracing every layer takes longer than reading a small file, and one file asks for its shapes several times.
    return jax.eval_shape(lambda key: init_params(config, key, heads=(head,)), jax.random.key(0))


def tensors_of(family: Family, config: ModelConfig, head: str, shapes: dict) -> list[Tensor]:
    """Every tensor of a file that holds a model with this head, in the order of the family's map.

    shapes: the parameter tree. UserError if one of its parameters has no place in such a file.
    """
    leaves = dict(leaves_of(shapes))
    aliases = family.aliases if config.tie_word_embeddings else {}
    untied = {} if config.tie_word_embeddings else family.untied
    prefix = "" if head == "embedding" else family.prefixes.get(head, family.prefix)
    sizes = _sizes(config)
    tensors = []
    maps: list[tuple[str, ParamPath, Weights, ModelConfig]] = [(prefix, (), family.trunk, config)]
    if config.num_decoder_layers:
        maps.append((prefix, ("decoder",), family.decoder, config.decoder))
    maps.append(("", ("head", "pooler" if head == "embedding" else head), family.heads.get(head, {}), config))
    for before, root, weights, stack in maps:
        for name, where in weights.items():
            for layer in range(stack.num_hidden_layers) if "{}" in name else (None,):
                place, index = ((), ()) if layer is None else _place(stack, layer)
                pieces = tuple(_piece(root + place, index, piece, sizes) for piece in where.split(" + "))
                rows = sum(piece.shape[0] for piece in pieces)
                shape = (rows, *pieces[0].shape[1:])
                tensor = Tensor(before + name.format(layer), aliases.get(name, ()), shape, pieces)
                if not any(path in leaves for path, _ in tensor.targets):
                    continue  # A bias or a norm that this model goes without.
                assert all(path in leaves for path, _ in tensor.targets), f"{name}: only some of {where} are there"
                if name in untied:
                    tensor = replace(tensor, name=untied[name], copies=(tensor.name,))
                tensors.append(tensor)
    _check_whole(tensors, leaves, config, head)
    return tensors


def plain_name(family: Family, name: str) -> str:
    """A tensor's name without what differs between files: the stack's prefix, and TensorFlow's words for norms."""
    for prefix in {family.prefix, *family.prefixes.values()}:
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            break
    return re.sub(r"\bbeta$", "bias", re.sub(r"\bgamma$", "weight", name))


def known_names(family: Family, config: ModelConfig) -> set[str]:
    """All plain names that a file of this family may hold, whatever its heads."""
    names = set(family.trunk) | set(family.decoder) | {name for head in family.heads.values() for name in head}
    layers = max(config.num_hidden_layers, config.num_decoder_layers)
    names |= {alias for aliases in family.aliases.values() for alias in aliases} | set(family.untied.values())
    return {
        plain_name(family, name.format(layer)) for name in names for layer in (range(layers) if "{}" in name else (0,))
    }


def parts_by_path(tensors: list[Tensor], views: Mapping[str, Any]) -> dict[ParamPath, list[Part]]:
    """For every parameter the parts it is made of: (index on its leading axes, view). views: by Tensor.name."""
    found: dict[ParamPath, list[Part]] = {}
    for tensor in tensors:
        for (path, index), part in zip(tensor.targets, tensor.parts(views[tensor.name]), strict=True):
            found.setdefault(path, []).append((index, part))
    return found


def export(tensors: list[Tensor], params: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) for a file, one at a time, from a parameter tree of NumPy or JAX arrays."""
    leaves = dict(leaves_of(params))
    for tensor in tensors:
        parts = [np.asarray(leaves[path][index] if index else leaves[path]) for path, index in tensor.targets]
        joined = tensor.join(parts)
        for name in (tensor.name, *tensor.copies):
            yield name, joined


def leaves_of(tree: Any) -> Iterator[tuple[ParamPath, Any]]:
    """(path, leaf) of a nested dict."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield tuple(entry.key for entry in path), leaf


def tree_of(leaves: Mapping[ParamPath, Any]) -> dict:
    """A nested dict from its leaves by path."""
    tree: dict = {}
    for path, leaf in leaves.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


def _sizes(c: ModelConfig) -> dict[str, int]:
    sizes = {"D": c.hidden_size, "O": c.hidden_size, "E": c.embedding_width, "N": c.num_attention_heads}
    sizes |= {"K": c.kv_heads, "H": c.head_size, "F": c.intermediate_size, "V": c.vocab_size}
    sizes |= {"P": c.max_position_embeddings, "Y": c.type_vocab_size, "C": len(c.labels)}
    return sizes | {"U": c.relative_attention_num_buckets}


def _place(config: ModelConfig, layer: int) -> tuple[ParamPath, tuple[int, ...]]:
    """Where in the tree the parameters of a layer are, and at which index of the repeats."""
    prefix, period = len(config.prefix_layers), len(config.layer_period)
    if layer < prefix:
        return ("layers", "prefix", str(layer)), ()
    repeat, slot = divmod(layer - prefix, period)
    if repeat < config.repeats:
        return ("layers", "period", str(slot)), (repeat,)
    return ("layers", "suffix", str(layer - prefix - config.repeats * period)), ()


def _piece(root: ParamPath, index: tuple[int, ...], where: str, sizes: Mapping[str, int]) -> Piece:
    names, layout = where.split(": ")
    return Piece(*_layout(layout, sizes), tuple(_target(root, index, target) for target in names.split()))


def _target(root: ParamPath, index: tuple[int, ...], target: str) -> tuple[ParamPath, tuple[int, ...]]:
    match = re.fullmatch(r"([\w/]+)(?:\[(\d+)\])?", target)
    assert match, f"{target!r} is not a parameter"
    if match[2]:
        index += (int(match[2]),)
    return root + tuple(match[1].split("/")), index


def _layout(layout: str, sizes: Mapping[str, int]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(shape, split, order) of "(K H) D -> D K H"; without an arrow the axes stay as they are."""
    left, _, right = layout.partition(" -> ")
    groups = [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\S+", left)]
    axes = [axis for group in groups for axis in group]
    size = {axis: int(axis) if axis.isdigit() else sizes[axis] for axis in axes}
    shape = tuple(math.prod(size[axis] for axis in group) for group in groups)
    order = tuple(axes.index(axis) for axis in (right.split() or axes))
    return shape, tuple(size[axis] for axis in axes), order


def _check_whole(tensors: list[Tensor], leaves: dict, config: ModelConfig, head: str) -> None:
    filled: dict[ParamPath, set] = {}
    for tensor in tensors:
        for path, index in tensor.targets:
            filled.setdefault(path, set()).add(index)
    lacking = []
    for path, leaf in leaves.items():
        depth = max(map(len, filled.get(path, {()})))
        if len(filled.get(path, ())) != math.prod(leaf.shape[:depth]):
            lacking.append("/".join(path))
    if lacking:
        raise UserError(
            f"a model of type {config.model_type} with head {head} has no place for {', '.join(lacking[:6])}; "
            "take a --model.model-type whose architecture this is"
        )
