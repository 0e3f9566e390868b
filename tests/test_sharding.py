"""The table of rules covers every parameter exactly once, meshes are built from flags, optimizer state follows."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import clm.presets
import mlm.presets
from espalier.errors import UserError
from espalier.features.autoencoder import init_autoencoder
from espalier.models.transformer import init_params
from espalier.training.state import combined
from finetune.config import LoraConfig
from finetune.lora import init_adapters, places_of, tree_at
from sharding import rules
from sharding.mesh import MeshConfig, build_mesh, check_batch, off_torus, place_batch, torus_sides

HEADS = {mlm.presets: "masked_lm", clm.presets: "causal_lm"}
PRESETS = [(entry, name) for entry in HEADS for name in entry.PRESETS]


def shapes(entry, name, **changes):
    model = dataclasses.replace(entry.PRESETS[name]().model, labels=("no", "yes"), **changes)
    return jax.eval_shape(
        lambda key: init_params(model, key, heads=(HEADS[entry], "sequence_classification")),
        jax.random.key(0),
    )


@pytest.mark.parametrize(("entry", "name"), PRESETS, ids=[f"{d.__name__[:3]}-{n}" for d, n in PRESETS])
def test_every_parameter_of_every_preset_matches_one_rule_and_splits(entry, name):
    mesh = build_mesh(MeshConfig(data=1, fsdp=8))
    tree = shapes(entry, name)
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = rules.path_of(key_path)
        matching = [pattern for pattern, _ in rules.RULES if re.search(f"(^|/){pattern}$", path)]
        assert len(matching) == 1, (path, matching)
        assert len(rules.param_spec(path, leaf.ndim)) == leaf.ndim
    rules.shard_params(tree, mesh)


def test_every_rule_is_used():
    used = set()
    trees = [shapes(entry, name) for entry, name in PRESETS]
    # No preset has both biases and gates, or narrow embeddings.
    trees.append(shapes(mlm.presets, "debug", gated_mlp=True, mlp_bias=True, embedding_size=32))
    trees += [adapters(tree) for tree in trees]
    trees.append({"autoencoder": jax.eval_shape(lambda key: init_autoencoder(key, 32, 64), jax.random.key(0))})
    for tree in trees:
        for key_path, _ in jax.tree_util.tree_leaves_with_path(tree):
            path = rules.path_of(key_path)
            used |= {p for p, _ in rules.RULES if re.search(f"(^|/){p}$", path)}
    # A user's own; what tasks of finetune add to their heads.
    elsewhere = {r"adapters/[^/]+/(kernel|bias|scale)", r"head/price/multiplier"}
    elsewhere |= {r"head/concept_classes/kernel", r"head/concept_classes/bias"}
    assert {pattern for pattern, _ in rules.RULES} - used == elsewhere


def adapters(tree):
    lora = LoraConfig(rank=2)
    places = places_of(tree, lora.targets)
    scales = tree_at({place.path: {"lora_scale": jax.ShapeDtypeStruct(place.repeats, jnp.float32)} for place in places})
    return combined(jax.eval_shape(lambda key: init_adapters(places, lora, key), jax.random.key(0)), scales)


def test_adapters_are_split_as_their_matrix_is():
    tree = shapes(mlm.presets, "debug", gated_mlp=True)
    for place in places_of(tree, "^layers/"):
        path, count, inputs = "/".join(place.path), len(place.count), len(place.inputs)
        kernel, a, b = (
            tuple(rules.param_spec(f"{path}/{name}", count + axes))
            for name, axes in (
                ("kernel", inputs + len(place.outputs)),
                ("lora_a", 1 + inputs),
                ("lora_b", len(place.outputs) + 1),
            )
        )
        assert a == (*kernel[:count], None, *kernel[count : count + inputs])
        assert b == (*kernel[:count], *kernel[count + inputs :], None)


def test_unknown_and_ambiguous_parameters_are_named(monkeypatch):
    with pytest.raises(ValueError, match="no rule.*'layers/period/0/mystery'"):
        rules.param_spec("layers/period/0/mystery", 1)
    monkeypatch.setattr(rules, "RULES", rules.RULES + ((r"up/kernel", (None, None)),))
    with pytest.raises(ValueError, match="2 rules.*'mlp/up/kernel'"):
        rules.param_spec("mlp/up/kernel", 2)


def test_optimizer_moments_follow_their_parameter():
    mesh = build_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    params = {"layers": {"period": {"0": {"mlp": {"up": {"kernel": jax.ShapeDtypeStruct((3, 16, 8), jnp.float32)}}}}}}
    state = jax.eval_shape(optax.adam(1e-3).init, params)
    shardings = rules.shard_like_params(state, params, mesh)
    kernel = shardings[0].mu["layers"]["period"]["0"]["mlp"]["up"]["kernel"]
    assert kernel.spec == P(None, "fsdp", "tensor")
    assert shardings[0].count.spec == P()


def test_an_axis_that_does_not_divide_is_refused_by_name():
    tree = {
        "layers": {"suffix": {"0": {"attention": {"q": {"kernel": jax.ShapeDtypeStruct((16, 3, 8), jnp.float32)}}}}}
    }
    with pytest.raises(UserError, match=r"tensor=2 does not divide the 3 of layers/suffix/0/attention/q/kernel.*try"):
        rules.shard_params(tree, build_mesh(MeshConfig(data=1, fsdp=4, tensor=2)))


def test_open_axes_leave_the_whole_of_a_3d_torus():
    left, whole = MeshConfig(fsdp=-1), (4, 4, 4)
    assert off_torus(left, whole).on(64) == MeshConfig(data=2, fsdp=32)
    for mesh, sides in ((left, (16, 16)), (left, (2, 2, 4)), (left, ()), (MeshConfig(data=1, fsdp=-1), whole)):
        assert off_torus(mesh, sides) is mesh
    assert left.on(1) == MeshConfig(data=1, fsdp=1)
    # As JAX describes the chips of a slice; devices of a CPU form none.
    places = [(x, y, z) for x in range(4) for y in range(4) for z in range(4)]
    chips = [SimpleNamespace(platform="tpu", coords=place, slice_index=0) for place in places]
    assert torus_sides(chips) == whole and torus_sides(chips[:-1]) == () and torus_sides(jax.devices()) == ()


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), (1, 8, 1, 1, 1)),
        (MeshConfig(2, -1, 2), (1, 2, 2, 1, 2)),
        (MeshConfig(fsdp=-1, tensor=2), (1, 1, 4, 1, 2)),
        (MeshConfig(replica=2, sequence=2), (2, 2, 1, 2, 1)),
        (MeshConfig(1, 1, 1), (1, 1, 1, 1, 1)),
    ],
)
def test_mesh_sizes(config, sizes):
    assert config.sizes(8) == sizes
    assert tuple(build_mesh(config).shape.values()) == sizes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(16, 1, 1), "needs 16 devices and there are 8"),
        (MeshConfig(-1, 3, 1), "3 does not divide the 8 devices"),
        (MeshConfig(1, -1, -1), "one of them may be -1"),
        (MeshConfig(0, 1, 1), "at least 1"),
    ],
)
def test_impossible_meshes_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        config.sizes(8)


def test_batch_that_does_not_split_is_refused():
    with pytest.raises(
        UserError, match="batch_size=10 is not divisible by data×fsdp×accumulation=4×2×1=8; try 8 or 16"
    ):
        check_batch(MeshConfig(4, 2, 1), 8, 10)
    check_batch(MeshConfig(4, 2, 1), 8, 16, accumulation=2)
    with pytest.raises(UserError, match="replica×data×fsdp×accumulation=2×4×1×1=8; try 8 or 16"):
        check_batch(MeshConfig(4, replica=2), 8, 12)
    with pytest.raises(UserError, match="sequence_length=102 is not divisible by mesh axis sequence=4; try 100 or 104"):
        check_batch(MeshConfig(2, sequence=4), 8, 16, sequence_length=102)


def test_batch_rows_lie_on_data_and_fsdp():
    mesh = build_mesh(MeshConfig(2, 2, 2))
    rows = np.arange(8, dtype=np.int32).reshape(8, 1)
    placed = place_batch({"input_ids": rows}, mesh)["input_ids"]
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 1)}
    np.testing.assert_array_equal(np.asarray(placed), rows)


def test_tokens_lie_on_sequence_where_it_divides_them():
    """Other dimensions stay whole (here 4 classes, which `sequence` divides); also where batches nest."""
    mesh = build_mesh(MeshConfig(2, sequence=4))
    batch = {"input_ids": np.arange(48).reshape(6, 8), "labels": np.arange(6), "masked": np.arange(42).reshape(6, 7)}
    batch |= {"classes": np.arange(24).reshape(6, 4)}
    nested = {"query": batch, "candidates": {"input_ids": np.arange(6 * 8 * 4).reshape(6, 8, 4)}}
    flat, nested = place_batch(batch, mesh), place_batch(nested, mesh)
    assert {shard.data.shape for shard in nested["candidates"]["input_ids"].addressable_shards} == {(3, 8, 1)}
    assert jax.tree.map(lambda x: x.sharding, nested["query"]) == jax.tree.map(lambda x: x.sharding, flat)
    placed = flat
    assert {shard.data.shape for shard in placed["classes"].addressable_shards} == {(3, 4)}
    assert {shard.data.shape for shard in placed["input_ids"].addressable_shards} == {(3, 2)}
    assert {shard.data.shape for shard in placed["labels"].addressable_shards} == {(3,)}
    assert {shard.data.shape for shard in placed["masked"].addressable_shards} == {(3, 7)}
    for name, array in batch.items():
        np.testing.assert_array_equal(np.asarray(placed[name]), array)
