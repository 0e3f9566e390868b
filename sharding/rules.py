"""The table of sharding rules: how every parameter is split over the mesh.

A rule is a regular expression over the end of the parameter's path and the mesh axes of its last dimensions;
leading dimensions (the stack of repeated layers) stay whole. Exactly one rule must match each parameter, so that a new
parameter cannot be replicated by accident. The layout is Megatron's (Shoeybi et al. 2019) over `tensor`
combined with ZeRO-3 (Rajbhandari et al. 2020) over `fsdp`.
"""

from __future__ import annotations

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from espalier.errors import UserError

RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embeddings/token/embedding", ("tensor", "fsdp")),
    (r"embeddings/(position|token_type)/embedding", (None, "fsdp")),
    (r"embeddings/project/kernel", (None, "fsdp")),
    (r"relative/embedding", (None, "tensor")),
    (r"embeddings/project/bias", (None,)),
    (r"(\w+_)?norm/(scale|bias)", (None,)),
    (r"(cross_)?attention/q/kernel", ("fsdp", "tensor", None)),
    (r"(cross_)?attention/q/bias", ("tensor", None)),
    (r"(cross_)?attention/kv/kernel", (None, "fsdp", "tensor", None)),
    (r"(cross_)?attention/kv/bias", (None, "tensor", None)),
    (r"(cross_)?attention/out/kernel", ("tensor", None, "fsdp")),
    (r"(cross_)?attention/out/bias", (None,)),
    (r"mlp/up/kernel", ("fsdp", "tensor")),
    (r"mlp/up/bias", ("tensor",)),
    (r"mlp/gate_up/kernel", (None, "fsdp", "tensor")),
    (r"mlp/gate_up/bias", (None, "tensor")),
    (r"mlp/down/kernel", ("tensor", "fsdp")),
    (r"mlp/down/bias", (None,)),
    (r"head/masked_lm/transform/kernel", ("fsdp", None)),
    (r"head/masked_lm/transform/bias", (None,)),
    (r"head/(masked_lm|causal_lm|seq2seq_lm)/kernel", ("tensor", "fsdp")),
    (r"head/(masked_lm|causal_lm|seq2seq_lm)/bias", ("tensor",)),
    (
        r"head/(pooler|\w+_classification|question_answering|replaced_token_detection|rationale)/(dense|out)/kernel",
        ("fsdp", None),
    ),
    (
        r"head/(pooler|\w+_classification|question_answering|replaced_token_detection|rationale)/(dense|out)/bias",
        (None,),
    ),
    (r"head/price/multiplier", ()),
    (r"head/concept_classes/kernel", (None, None)),
    (r"head/concept_classes/bias", (None,)),
    # Adapters follow their kernel; the rank stays whole.
    (r"(cross_)?attention/q/lora_a", (None, "fsdp")),
    (r"(cross_)?attention/q/lora_b", ("tensor", None, None)),
    (r"(cross_)?attention/kv/lora_a", (None, None, "fsdp")),
    (r"(cross_)?attention/kv/lora_b", (None, "tensor", None, None)),
    (r"(cross_)?attention/out/lora_a", (None, "tensor", None)),
    (r"(cross_)?attention/out/lora_b", ("fsdp", None)),
    (r"mlp/up/lora_a", (None, "fsdp")),
    (r"mlp/up/lora_b", ("tensor", None)),
    (r"mlp/gate_up/lora_a", (None, None, "fsdp")),
    (r"mlp/gate_up/lora_b", (None, "tensor", None)),
    (r"mlp/down/lora_a", (None, "tensor")),
    (r"mlp/down/lora_b", ("fsdp", None)),
    (r"\w+/lora_scale", ()),
    # Sparse autoencoders: features are split as the width of an MLP.
    (r"autoencoder/encoder/kernel", ("fsdp", "tensor")),
    (r"autoencoder/encoder/bias", ("tensor",)),
    (r"autoencoder/decoder/kernel", ("tensor", "fsdp")),
    (r"autoencoder/decoder/bias", (None,)),
    (r"autoencoder/statistics/idle", ("tensor",)),
    (r"autoencoder/statistics/mean", (None,)),
    (r"autoencoder/statistics/(scale|threshold)", ()),
    # What an objective of a user's own adds to a model and is small.
    (r"adapters/[^/]+/(kernel|bias|scale)", ()),
)


def path_of(key_path: tuple) -> str:
    """A JAX key path as `a/b/c`."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in key_path)


def param_spec(path: str, ndim: int) -> PartitionSpec:
    """The PartitionSpec of one parameter; ValueError unless exactly one rule matches its path."""
    matches = [axes for pattern, axes in RULES if re.search(rf"(^|/){pattern}$", path)]
    if len(matches) != 1:
        count = "no rule" if not matches else f"{len(matches)} rules"
        raise ValueError(f"{count} in sharding/rules.py for parameter {path!r}; exactly one must match")
    (axes,) = matches
    assert len(axes) <= ndim, f"{path}: rule has {len(axes)} axes, parameter {ndim}"
    return PartitionSpec(*(None,) * (ndim - len(axes)), *axes)


def shard_params(shapes: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf of a parameter tree (arrays or ShapeDtypeStructs)."""
    return jax.tree_util.tree_map_with_path(
        lambda key_path, leaf: _checked(path_of(key_path), leaf, param_spec(path_of(key_path), leaf.ndim), mesh), shapes
    )


def shard_like_params(shapes: Any, params: Any, mesh: Mesh) -> Any:
    """Shardings for a tree that holds copies of the parameters (optimizer state): moments follow their parameter.

    A leaf whose path ends in a parameter's path and has its shape is split like it; anything else (counters) is
    replicated.
    """
    known = {
        path_of(key_path): (leaf.shape, param_spec(path_of(key_path), leaf.ndim))
        for key_path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }

    def sharding(key_path, leaf):
        parts = path_of(key_path).split("/")
        for start in range(len(parts)):
            shape, spec = known.get("/".join(parts[start:]), (None, PartitionSpec()))
            if shape == leaf.shape:
                return NamedSharding(mesh, spec)
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, shapes)


def _checked(path: str, leaf: Any, spec: PartitionSpec, mesh: Mesh) -> NamedSharding:
    for size, axis in zip(leaf.shape, spec, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            fits = [n for n in range(1, mesh.shape[axis] + 1) if size % n == 0]
            raise UserError(
                f"mesh axis {axis}={mesh.shape[axis]} does not divide the {size} of {path} {tuple(leaf.shape)}; "
                f"try {axis} = {' or '.join(map(str, fits[-2:]))}"
            )
    return NamedSharding(mesh, spec)
