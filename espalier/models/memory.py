"""The memory of a device that a training step needs, without compiling it: for `--mesh.auto` and `./launch.sh plan`.

Parameters and optimizer state follow exactly from the table of rules. What layers keep for the backward pass is read
off the program: the residuals of one layer's vector-Jacobian product, at the size that a device holds; what attention
keeps is said by its backend. The rest (the
backward pass of one layer, a chunk of scores) is a multiple of these, as compiled programs have it
(tests/test_plan_compiled.py compares).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from espalier.models.attention import BACKENDS
from espalier.models.attention_backend import Backend, Use
from espalier.models.attention_spec import Places
from espalier.models.block import Block, Context, dropouts
from espalier.models.config import ModelConfig
from espalier.models.heads import LANGUAGE_MODELS
from espalier.models.rotary import rotary_by_kind
from espalier.models.transformer import init_params, matrix_axes, rematerialised
from sharding.rules import param_spec, path_of

CHUNK_BYTES = 2**26
"""Scores over the vocabulary at a time (models.vocabulary)."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one device."""

    parameters: float
    optimizer: float
    gradients: float
    """Float32, and once more where micro-batches are added up."""
    weights: float
    """Parameters in the compute type, and gathered where they are split: of one layer if the layers are a loop."""
    kept: float
    """What the layers keep for the backward pass."""
    working: float
    """The backward pass of one layer, and a chunk of scores."""

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


def together(models: Sequence[Memory]) -> Memory:
    """Of several models in one step, one after the other."""
    sums = {field.name: sum(getattr(one, field.name) for one in models) for field in dataclasses.fields(Memory)}
    return Memory(**sums | {"working": max(one.working for one in models)})


def step_memory(
    config: ModelConfig,
    head: str,
    mesh: Mapping[str, int],
    *,
    rows: int,
    length: int,
    accumulation: int = 1,
    remat: str = "none",
    attention: str = "xla",
    dtype: str = "bfloat16",
    moments: tuple[int, int] = (2, 2),
    scan: bool = True,
) -> Memory:
    """Memory of a step with `rows` in the whole batch on a mesh of these axis sizes (axes not named are 1).

    attention: the backend's name in models.attention.BACKENDS. moments: float32 values that the optimizer keeps of a
    parameter, and of one in a layer's matrices.
    """
    config.check_one_stack("the memory of a training step is counted for")
    size = {axis: mesh.get(axis, 1) for axis in ("replica", "data", "fsdp", "sequence", "tensor")}
    itemsize = jnp.dtype(dtype).itemsize
    held = gathered = looped = kept_by_optimizer = 0.0
    for path, elements, spec, matrix in _parameters(config, head):
        whole = elements / math.prod(size[axis] for axis in spec if axis == "tensor")
        part = 4 * whole / math.prod(size[axis] for axis in spec if axis == "fsdp")
        held += part
        kept_by_optimizer += part * moments[matrix]
        if "period" in path:
            looped += whole
        else:
            gathered += whole
    layers = max(1, config.repeats) if scan else 1
    split = size["fsdp"] > 1
    # One layer is used while the next arrives; what is not split is cast once for all layers.
    weights = itemsize * (gathered + looped * (min(1.0, 2 / layers) if split else 1.0))
    in_layer = 4 * looped / layers if split else 0.0

    local_rows = max(1, rows // (accumulation * size["replica"] * size["data"] * size["fsdp"]))
    kept = working = 0.0
    for kind, count in {kind: config.layers.count(kind) for kind in config.layers}.items():
        layer = functools.partial(_row_bytes, config, kind, length, size["sequence"], size["tensor"], attention, dtype)
        kept += count * local_rows * layer(remat)
        working = max(working, local_rows * layer("none") + in_layer)
    tokens = local_rows * length / size["sequence"]
    scores = min(CHUNK_BYTES, 4 * tokens * config.padded_vocab_size / size["tensor"])
    ends = 4 * tokens * config.hidden_size * itemsize
    return Memory(
        parameters=held,
        optimizer=kept_by_optimizer,
        gradients=held * (2 if accumulation > 1 else 1),
        weights=weights,
        kept=kept,
        working=working + 3 * scores + ends,
    )


@functools.lru_cache(maxsize=16)
def _parameters(config: ModelConfig, head: str) -> list[tuple[str, int, tuple, bool]]:
    """(path, elements, how the rules split it, whether it is a layer's matrix) of every parameter."""
    heads = (head,) if head in LANGUAGE_MODELS else ()
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0), heads))
    matrices = jax.tree.structure(shapes).flatten_up_to(matrix_axes(shapes))
    paths = [(path_of(key_path), leaf) for key_path, leaf in jax.tree_util.tree_leaves_with_path(shapes)]
    return [
        (path, math.prod(leaf.shape), tuple(param_spec(path, leaf.ndim)), axes is not None)
        for (path, leaf), axes in zip(paths, matrices, strict=True)
    ]


@functools.lru_cache(maxsize=256)
def _row_bytes(
    config: ModelConfig,
    kind: str,
    length: int,
    sequence: int,
    tensor: int,
    attention: str,
    dtype: str,
    remat: str,
) -> float:
    """Bytes that a layer of this kind keeps of a row on one device between its forward and its backward pass."""
    assert not config.cross_attention, "the length of a memory is not known here"
    local = dataclasses.replace(
        config,
        num_attention_heads=max(1, config.num_attention_heads // tensor),
        num_key_value_heads=max(1, config.kv_heads // tensor),
        head_dim=config.head_size,
        intermediate_size=max(1, config.intermediate_size // tensor),
    )
    block = Block(local, kind, False, jnp.dtype(dtype), _KEEPS_NOTHING)  # pyright: ignore[reportArgumentType]
    tokens = length // sequence
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

    def residuals(ids_BT, key):
        rotary = rotary_by_kind(local, ids_BT)
        context = Context(Places(ids_BT, ids_BT, ids_BT, ids_BT), rotary, None)
        x_BTD = jnp.zeros((1, tokens, local.hidden_size), dtype)
        params = block.init(jax.random.key(0), x_BTD, context)["params"]
        keys = jax.random.split(key, dropouts(local)) if local.hidden_dropout or local.attention_dropout else None

        def run(params, x_BTD):
            return block.apply({"params": params}, x_BTD, context, None, keys)[0]

        kept = jax.vjp(rematerialised(run, remat, True), params, x_BTD)[1]
        # Weights and tables are there anyway.
        shared = [leaf.shape for leaf in jax.tree.leaves((params, rotary, ids_BT))]
        return [leaf for leaf in jax.tree.leaves(kept) if leaf.shape not in shared and tokens in leaf.shape]

    leaves = jax.eval_shape(residuals, ids, jax.eval_shape(lambda: jax.random.key(0)))
    total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    if tokens % tensor == 0:
        # The layer's own input lies split (models.block); more may, and is counted whole.
        total -= (1 - 1 / tensor) * tokens * local.hidden_size * jnp.dtype(dtype).itemsize
    if remat != "none":
        return total
    use = Use.of(local, length, dtype=dtype, dropping=True, parts=sequence)
    # Gathered keys and values, before the backend lays them out as it likes.
    gathered = 2 * (length - tokens) * local.kv_heads * local.head_size * use.itemsize
    return total + BACKENDS[attention].keeps(use) + gathered


def _add(q_BTNH, k_BSKH, v_BSKH, spec, places, dropout_rate, dropout_key):
    groups = q_BTNH.shape[2] // k_BSKH.shape[2]
    return q_BTNH + jnp.repeat(k_BSKH + v_BSKH, groups, axis=2)


_KEEPS_NOTHING = Backend(
    name="none",
    platforms=(),
    reason="",
    fused=True,
    run=_add,
    refuses=lambda use: None,
    keeps=lambda use: 0,
)
"""In the place of attention: a sum, which the backward pass needs nothing for."""
