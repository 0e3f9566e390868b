"""The stack: embeddings, prefix layers, a period of layers repeated R times, suffix layers, final norm.

The repeated layers' parameters are stacked `[R, …]`; the tree is the same whether they run by `lax.scan` or unrolled.
`init_params`, `apply` and `stack` are all that the rest of the project sees of a model; all are pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from espalier.errors import UserError
from espalier.models.attention import XLA, choose_backend
from espalier.models.attention_backend import Use
from espalier.models.attention_spec import Places
from espalier.models.block import Block, Context, Memory, dropouts
from espalier.models.config import Execution, ModelConfig
from espalier.models.heads import init_heads
from espalier.models.inputs import completed
from espalier.models.layers import Embeddings, compute_dtype, make_norm, named_key, product_dtype
from espalier.models.relative import init_relative, relative_bias
from espalier.models.rotary import rotary_by_kind
from espalier.models.taps import EMBEDDINGS, Tap, Taps, in_order, of_section, tapped
from sharding.mesh import constrain, mesh_platform

DEFAULT_EXECUTION = Execution()
UNROLLED_LAYERS = 24
"""Above so many layers, `scan_layers=None` scans: compile time then outweighs the faster step. On TPUs it always scans:
a loop costs nothing there, and compiles several times faster."""


def init_params(config: ModelConfig, key: jax.Array, heads: tuple[str, ...] | None = None) -> dict:
    """Fresh float32 parameters as a nested dict.

    heads: names in models.heads.HEADS; default: the language-model head of the config. Each part draws from its own
    key, so that the trunk is the same whatever the heads.
    """
    ids_BT = jnp.zeros((1, 1), jnp.int32)
    embeddings = Embeddings(config, jnp.float32)
    params = {"embeddings": embeddings.init(named_key(key, "embeddings"), ids_BT, ids_BT)["params"]}
    params |= _init_stack(config, key)
    if config.num_decoder_layers:
        params["decoder"] = _init_stack(config.decoder, named_key(key, "decoder"))
    if heads is None:
        heads = ("seq2seq_lm",) if config.num_decoder_layers else ("causal_lm",) if config.causal else ("masked_lm",)
    head = init_heads(config, named_key(key, "head"), heads)
    if head:
        params["head"] = head
    return params


def _init_stack(config: ModelConfig, key: jax.Array) -> dict:
    """Fresh parameters of what `stack` runs."""
    ids_BT = jnp.zeros((1, 1), jnp.int32)
    x_BTD = jnp.zeros((1, 1, config.hidden_size), jnp.float32)
    memory = Memory(x_BTD, ids_BT) if config.cross_attention else None
    context = _context(config, ids_BT, ids_BT, None, memory)

    layers = {}
    for section, kinds in _sections(config):
        layers[section] = {}
        for j, kind in enumerate(kinds):
            block = Block(config, kind, section == "prefix" and j == 0, jnp.dtype(jnp.float32), XLA)
            layer_key = named_key(key, f"layers/{section}/{j}")
            if section == "period":
                keys = jax.random.split(layer_key, config.repeats)
                init = jax.vmap(block.init, in_axes=(0, None, None))
                layers[section][str(j)] = init(keys, x_BTD, context)["params"]
            else:
                layers[section][str(j)] = block.init(layer_key, x_BTD, context)["params"]

    params: dict = {"layers": layers}
    if config.final_norm:
        params["final_norm"] = make_norm(config, jnp.float32).init(key, x_BTD)["params"]
    if config.position_embedding == "relative":
        params["relative"] = init_relative(config, named_key(key, "relative"))
    return params


def apply(
    config: ModelConfig,
    params: dict,
    batch: dict[str, jax.Array],
    *,
    execution: Execution = DEFAULT_EXECUTION,
    key: jax.Array | None = None,
    cache: dict | None = None,
    memory: Memory | None = None,
    taps: Taps | None = None,
) -> Any:
    """Final hidden states x_BTD of a batch.

    batch: `input_ids`; `segment_ids` and `positions`, or `attention_mask`, or neither (`models.inputs.completed` fills
    in); optional `token_type_ids`; `row_lengths` promises that every row is one document, from the first place on;
    `bidirectional` [B], bool, the rows of a causal model that see both sides. The rest as in `stack`. UserError for a
    model of two stacks (models.encoder_decoder).
    """
    config.check_one_stack("what was asked works on")
    packed = "row_lengths" not in batch
    batch = completed(batch, cached=cache is not None)
    embedding_key = None if key is None else _dropout_keys(config, key)[0]
    embeddings: Any = Embeddings(config, compute_dtype(execution))
    inputs = (batch["input_ids"], batch["positions"], batch.get("token_type_ids"), embedding_key)
    x_BTD = embeddings.apply({"params": params["embeddings"]}, *inputs)
    places = (batch["segment_ids"], batch["positions"])
    how: Any = dict(execution=execution, key=key, cache=cache, memory=memory, taps=taps, packed=packed)
    how["bidirectional_B"] = batch.get("bidirectional")
    return stack(config, params, x_BTD, *places, **how)


def stack(
    config: ModelConfig,
    params: dict,
    x_BTD: jax.Array,
    segment_ids_BT: jax.Array,
    positions_BT: jax.Array,
    *,
    execution: Execution = DEFAULT_EXECUTION,
    key: jax.Array | None = None,
    cache: dict | None = None,
    memory: Memory | None = None,
    taps: Taps | None = None,
    packed: bool = True,
    bidirectional_B: jax.Array | None = None,
) -> Any:
    """The layers and the final norm over any vectors x_BTD, as `apply` runs them over the embeddings.

    segment_ids_BT: 0 = padding; a document never attends to another. positions_BT: for rotary positions; they restart
    in each document. key: turns dropout on. cache: from `init_cache`; then the vectors continue what the cache holds,
    and (x_BTD, cache) is returned. Past the end of the cache a vector takes the place of the oldest; several at once
    must fit before it. memory: what the layers read where config.cross_attention is set; with a cache it is given once,
    and the cache keeps of it what they need.
    taps: places inside that are read or changed (models.taps); then (x_BTD, {place: array [L, …]}) is returned.
    packed: whether a row may hold several documents. bidirectional_B: rows of a causal model that see both sides; for
    layers without windows.
    """
    assert taps is None or cache is None, "taps are for whole rows"
    if memory is None and cache is not None and "memory_segment_ids" in cache:
        memory = Memory(None, cache["memory_segment_ids"])
    assert (memory is not None) == config.cross_attention, "a memory belongs to config.cross_attention, and only to it"
    mixed = bidirectional_B is not None
    assert not mixed or (config.causal and "local" not in config.layers and cache is None), "rows of both kinds"
    dtype, factors = compute_dtype(execution), product_dtype(execution)
    dropping = key is not None and config.attention_dropout > 0
    length = x_BTD.shape[1]
    keys = "memory" if memory is not None else "row" if cache is None else "cache"
    use = Use.of(config, length, dtype=dtype.name, dropping=dropping, keys=keys, packed=packed, mixed=mixed)
    backend, _ = choose_backend(execution.attention, use)
    scan = scans(config, execution)
    context = _context(config, segment_ids_BT, positions_BT, cache, memory, bidirectional_B)
    if config.position_embedding == "relative":
        if mixed:  # Row indices, by which distances are told, mean something else then.
            raise UserError(
                "model.position_embedding=relative does not go with rows that see one side and rows that see both; "
                "try --model.position-embedding rotary"
            )
        context = context._replace(bias_BNTS=relative_bias(config, params["relative"], context.places))
    layer_keys = {} if key is None else _dropout_keys(config, key)[1]
    x_BTD = constrain(x_BTD.astype(dtype), "batch", "tokens", None)
    before = Tap(taps, taps.given) if taps else None
    x_BTD = tapped(before, EMBEDDINGS, x_BTD)

    new_layers, seen = {}, {}
    for section, kinds in _sections(config):
        blocks = {
            str(j): Block(config, kind, section == "prefix" and j == 0, dtype, backend, factors)
            for j, kind in enumerate(kinds)
        }
        looped = scan and section == "period"
        layers = {j: rematerialised(_pure(block, taps), execution.remat, looped) for j, block in blocks.items()}

        def step(x_BTD, inputs, layers=layers):
            params, cache, keys, given = inputs
            new_cache, seen = {}, {}
            for j, run in layers.items():
                x_BTD, new_cache[j], seen[j] = run(params[j], x_BTD, context, cache.get(j), keys.get(j), given.get(j))
            return x_BTD, (new_cache, seen)

        section_cache = {} if cache is None else cache["layers"][section]
        given = of_section(config, taps.given, section) if taps else {}
        inputs = (params["layers"][section], section_cache, layer_keys.get(section, {}), given)
        if section != "period":
            x_BTD, (new_layers[section], seen[section]) = step(x_BTD, inputs)
        elif looped:
            x_BTD, (new_layers[section], seen[section]) = jax.lax.scan(step, x_BTD, inputs)
        else:
            x_BTD, (new_layers[section], seen[section]) = _unrolled(step, x_BTD, inputs, config.repeats)

    x_BTD = constrain(normed(config, params, x_BTD), "batch", "sequence", None)
    if before is not None:
        return x_BTD, before.seen | in_order(seen)
    if cache is None:
        return x_BTD
    new = {"layers": new_layers, "segment_ids": context.places.k_segments_BS, "end": cache["end"] + length}
    return x_BTD, new if memory is None else new | {"memory_segment_ids": memory.segment_ids_BS}


def normed(config: ModelConfig, params: dict, x_BTD: jax.Array) -> jax.Array:
    """What leaves the layers as the heads take it: through the final norm, where the model has one."""
    if not config.final_norm:
        return x_BTD
    norm: Any = make_norm(config, x_BTD.dtype)
    return norm.apply({"params": params["final_norm"]}, x_BTD)


def scans(config: ModelConfig, execution: Execution, platform: str | None = None) -> bool:
    """Whether the repeated layers run by lax.scan. platform: default: that of the mesh in use."""
    if execution.scan_layers is not None:
        return execution.scan_layers
    return config.num_hidden_layers > UNROLLED_LAYERS or (platform or mesh_platform()) == "tpu"


def init_cache(
    config: ModelConfig, batch_size: int, length: int, dtype=jnp.float32, memory_length: int | None = None
) -> dict:
    """An empty cache for `length` tokens a row: keys and values of every layer, segment ids, and the end so far.

    The cache is a ring: entry n stands at n mod length, until the one that follows it by `length` takes its place.
    Prompts of different lengths are padded on the left, in segment 0, so that every row ends at the same place.
    memory_length: tokens of the memory that cross-attention reads.
    """
    assert (memory_length is not None) == config.cross_attention, "a memory belongs to config.cross_attention"
    lengths = {"k": length, "v": length}
    if memory_length is not None:
        lengths |= {"memory_k": memory_length, "memory_v": memory_length}
    shapes = {name: (batch_size, entries, config.kv_heads, config.head_size) for name, entries in lengths.items()}
    layers = {}
    for section, kinds in _sections(config):
        leading = (config.repeats,) if section == "period" else ()
        layers[section] = {
            str(j): {name: jnp.zeros(leading + shape, dtype) for name, shape in shapes.items()}
            for j in range(len(kinds))
        }
    cache = {
        "layers": layers,
        "segment_ids": jnp.zeros((batch_size, length), jnp.int32),
        "end": jnp.zeros((), jnp.int32),
    }
    if memory_length is not None:
        cache["memory_segment_ids"] = jnp.zeros((batch_size, memory_length), jnp.int32)
    return cache


def matrix_axes(params: dict) -> dict:
    """For every parameter (reduction axes, output axes) if it is a matrix of a layer, else None: what Muon needs.

    Axes in neither count matrices: keys and values, gate and up, and the repeats of a period are each their own. Those
    of an adapter (training/adapters.py) are matrices too, with the rank for outputs or inputs.
    """

    def axes(path, leaf):
        names = [entry.key for entry in path]
        if names[0] == "decoder":
            names = names[1:]
        if names[0] != "layers" or names[-1] not in ("kernel", "lora_a", "lora_b"):
            return None
        stack = 1 if names[1] == "period" else 0
        inputs, outputs = _MATRIX_AXES[names[-2]]
        count = stack + inputs[0]
        if names[-1] == "lora_a":
            return tuple(range(count + 1, leaf.ndim)), (count,)
        if names[-1] == "lora_b":
            return (leaf.ndim - 1,), tuple(range(count, leaf.ndim - 1))
        return tuple(tuple(axis + stack for axis in group) for group in (inputs, outputs))

    return jax.tree_util.tree_map_with_path(axes, params)


_MATRIX_AXES = {
    "q": ((0,), (1, 2)),
    "kv": ((1,), (2, 3)),
    "out": ((0, 1), (2,)),
    "up": ((0,), (1,)),
    "gate_up": ((1,), (2,)),
    "down": ((0,), (1,)),
}


def layer_depths(config: ModelConfig, params: dict) -> dict:
    """For every parameter the layers between it and the head: 0 the head and the norm before it, 1 the last layer, one
    more than there are layers the embeddings. In a stack an array [R, 1, …], by which its leaf is multiplied; where the
    first layers of the stack are left out, that of the others."""
    prefix, size, total = len(config.prefix_layers), len(config.layer_period), config.num_hidden_layers
    if config.num_decoder_layers:
        # The encoder lies below the whole decoder, which reads its end alone.
        above, own = config.num_decoder_layers, {name: part for name, part in params.items() if name != "decoder"}
        below = jax.tree_util.tree_map_with_path(
            lambda path, depth: depth if path[0].key == "head" else depth + above, layer_depths(config.encoder, own)
        )
        return below | {"decoder": layer_depths(config.decoder, params["decoder"])}

    def depth(path, leaf):
        names = [entry.key for entry in path]
        if names[0] == "embeddings":
            return total + 1
        if names[0] != "layers":
            return 0
        first = int(names[2]) + {"prefix": 0, "period": prefix, "suffix": prefix + size * config.repeats}[names[1]]
        if names[1] != "period":
            return total - first
        above_R = total - first - size * np.arange(config.repeats - leaf.shape[0], config.repeats)
        return above_R.reshape(-1, *(1,) * (leaf.ndim - 1))

    return jax.tree_util.tree_map_with_path(depth, params)


def _sections(config: ModelConfig):
    """(section, kinds of its layers) of the stack, the empty ones left out."""
    period = config.layer_period if config.repeats else ()
    sections = (("prefix", config.prefix_layers), ("period", period), ("suffix", config.suffix_layers))
    return [(section, kinds) for section, kinds in sections if kinds]


def _context(
    config: ModelConfig,
    segments_BT: jax.Array,
    positions_BT: jax.Array,
    cache: dict | None,
    memory: Memory | None,
    bidirectional_B: jax.Array | None = None,
) -> Context:
    rotary = rotary_by_kind(config, positions_BT)
    places = Places.of_rows(segments_BT, bidirectional_B)
    if cache is None:
        return Context(places, rotary, None, memory)
    end = cache["end"]
    capacity = cache["segment_ids"].shape[1]
    assert segments_BT.shape[1] <= capacity, f"{segments_BT.shape[1]} tokens do not fit a cache of {capacity}"
    place = end % capacity
    segments_BS = jax.lax.dynamic_update_slice(cache["segment_ids"], segments_BT, (0, place))
    # The newest entry at each place; below 0 where there was none yet, which is of segment 0.
    newest = end + segments_BT.shape[1] - 1
    index_1S = newest - (newest - jnp.arange(capacity, dtype=jnp.int32)[None, :]) % capacity
    return Context(Places(segments_BT, segments_BS, places.q_index_BT + end, index_1S), rotary, place, memory)


def _dropout_keys(config: ModelConfig, key: jax.Array):
    """(key of the embeddings, keys of the layers laid out like their parameters), all from a single split."""
    count = dropouts(config)
    keys = jax.random.split(key, (config.num_hidden_layers + 1, count))
    layers, start = {}, 1
    for section, kinds in _sections(config):
        stack = (config.repeats,) if section == "period" else ()
        end = start + math.prod(stack) * len(kinds)
        section_keys = keys[start:end].reshape(*stack, len(kinds), count)
        layers[section] = {str(j): section_keys[..., j, :] for j in range(len(kinds))}
        start = end
    return keys[0, 0], layers


def _pure(block: Block, taps: Taps | None) -> Callable[..., Any]:
    """(params, x_BTD, context, cache, keys, what taps are given) → (x_BTD, cache, what taps read)."""

    def run(params, x_BTD, context, cache, keys, given):
        tap = Tap(taps, given or {}) if taps else None
        x_BTD, cache = block.apply({"params": params}, x_BTD, context._replace(tap=tap), cache, keys)  # type: ignore[misc]
        return x_BTD, cache, tap.seen if tap else {}

    return run


def rematerialised(run, name: str, looped: bool):
    if name == "none":
        return run
    policies = jax.checkpoint_policies
    policy = {"dots": policies.dots_with_no_batch_dims_saveable, "full": policies.nothing_saveable}[name]
    # Inside a loop nothing can be merged across iterations, so the barriers against it would only cost.
    return jax.checkpoint(run, policy=policy, prevent_cse=not looped)


def _unrolled(step, x_BTD, inputs, repeats: int):
    """What `lax.scan(step, x_BTD, inputs)` computes, without a loop."""
    leaves, structure = jax.tree.flatten(inputs)
    slices = [[part.reshape(leaf.shape[1:]) for part in _split(leaf, repeats)] for leaf in leaves]
    outputs = []
    for layer in zip(*slices, strict=True):
        x_BTD, output = step(x_BTD, jax.tree.unflatten(structure, layer))
        outputs.append(output)
    return x_BTD, jax.tree.map(lambda *parts: jnp.stack(parts), *outputs)


def _split(leaf: jax.Array, count: int) -> list[jax.Array]:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return [leaf[i] for i in range(count)]
    # One lax.split, whose gradient is a single concatenate; slices would each be padded to full size and added.
    return list(jax.lax.split(leaf, (1,) * count, axis=0))
