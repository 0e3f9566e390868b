"""Weights of which the largest stay: exactly as many as asked after each step, on every mesh, whatever the run did."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from tiny_models import BERT, EVERYTHING, random_params
from toy import quick_compilation  # noqa: F401

from espalier.errors import UserError
from espalier.models.transformer import matrix_axes
from espalier.training.config import CheckpointConfig, OptimizerConfig, SparsityConfig
from espalier.training.sparsity import density_at, kept_of, projection
from finetune.config import FinetuneConfig, FinetuneOptimizer, LoraConfig
from sharding.mesh import MeshConfig, build_mesh
from sharding.rules import path_of, shard_params


def largest(matrix: np.ndarray, count: int) -> np.ndarray:
    """The matrix with its largest weights alone; of equal ones the first, by a stable sort."""
    flat = matrix.reshape(-1).copy()
    flat[np.argsort(-np.abs(flat), kind="stable")[count:]] = 0
    return flat.reshape(matrix.shape)


def expected(params, density: float):
    """By NumPy, matrix by matrix."""

    def one(path, leaf):
        axes = matrices
        for entry in path:
            axes = axes[entry.key]
        if axes is None:
            return leaf
        order = tuple(axis for group in axes for axis in group)
        others = tuple(axis for axis in range(leaf.ndim) if axis not in order)
        moved = np.transpose(leaf, (*others, *sorted(order)))
        stacked = moved.reshape(-1, *[leaf.shape[axis] for axis in sorted(order)])
        size = stacked[0].size
        kept = np.stack([largest(matrix, round(size * density)) for matrix in stacked]).reshape(moved.shape)
        return np.transpose(kept, np.argsort((*others, *sorted(order))))

    matrices = matrix_axes(params)
    return jax.tree_util.tree_map_with_path(one, params)


@pytest.mark.parametrize("config", [BERT, EVERYTHING], ids=["bert", "everything"])
def test_the_largest_of_every_matrix_stay(config):
    """Keys and values, gates, heads of a layer and layers of a stack are matrices of their own; ties, too."""
    params = random_params(config)
    rounded = jax.tree.map(lambda leaf: np.round(leaf, 2).astype(np.float32), params)
    sparsity = SparsityConfig(density=0.3, anneal=0.0)
    for given in (params, rounded):
        keep = projection(sparsity, given, matrix_axes(given), 10)
        assert keep is not None
        kept, measured = jax.jit(keep)(given, jnp.int32(1))
        jax.tree.map(np.testing.assert_array_equal, kept, expected(given, 0.3))
        np.testing.assert_allclose(measured["nonzero"], 0.3, atol=0.01)
    mesh = build_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh):
        laid = jax.device_put(rounded, shard_params(rounded, mesh))
        jax.tree.map(np.testing.assert_array_equal, jax.jit(keep)(laid, jnp.int32(1))[0], kept)


def test_the_density_falls_to_what_was_asked_and_stays():
    sparsity = SparsityConfig(density=0.2, anneal=0.5)
    found = np.asarray(density_at(sparsity, 100, np.arange(101)))
    np.testing.assert_allclose(found[[0, 25, 50, 100]], [1.0, 0.6, 0.2, 0.2], atol=1e-6)
    assert (np.diff(found) <= 0).all()
    assert kept_of(sparsity, 1000) == 200 and kept_of(SparsityConfig(density=1e-6), 10) == 1


def sparse(tmp_path, name, **changes):
    optimizer = OptimizerConfig(learning_rate=0.01, sparsity=SparsityConfig(density=0.1, anneal=0.5))
    return toy.config(tmp_path / name, **{"steps": 8, "optimizer": optimizer, **changes})


def nonzeros(params) -> list[int]:
    """Of each of the matrices."""
    mlp = params["layers"]["period"]["0"]["mlp"]
    return [int((mlp[name]["kernel"][layer] != 0).sum()) for name in ("up", "down") for layer in range(2)]


def test_exactly_so_many_stay_after_each_step_and_after_a_break_on_another_mesh(tmp_path):
    whole = toy.run(sparse(tmp_path, "whole"))
    assert nonzeros(whole.state.params) == [51] * 4  # 0.1 of 16 × 32
    logged = [line["nonzero"] for line in toy.metrics_of(tmp_path / "whole") if "nonzero" in line]
    counts = [round(512 * (1 - 0.9 * min(step / 4, 1.0))) for step in range(1, 9)]
    np.testing.assert_allclose(logged, np.array(counts) / 512, atol=1e-6)
    every = CheckpointConfig(every=100)
    assert not toy.run(sparse(tmp_path, "parts", stop_at=3, checkpoint=every)).finished
    parts = toy.run(sparse(tmp_path, "parts", checkpoint=every))
    jax.tree.map(np.testing.assert_array_equal, parts.state.params, whole.state.params)
    sharded = toy.run(sparse(tmp_path, "sharded", mesh=MeshConfig(2, 2, 2), accumulation=2))
    assert nonzeros(sharded.state.params) == [51] * 4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), sharded.state.params, whole.state.params)
    # What is not a matrix is left alone.
    embedding = whole.state.params["embeddings"]["token"]["embedding"]
    assert (np.asarray(embedding) != 0).mean() > 0.95
    with pytest.raises(UserError, match="sparsity.density was 0.1, now 0.2"):
        other = dataclasses.replace(sparse(tmp_path, "parts").optimizer, sparsity=SparsityConfig(density=0.2))
        toy.run(sparse(tmp_path, "parts", optimizer=other))
    with pytest.raises(UserError, match="the schedule of the 8 steps"):
        toy.run(sparse(tmp_path, "whole", steps=16, optimizer=dataclasses.replace(sparse(tmp_path, "").optimizer)))


def test_without_it_there_is_nothing_to_do_and_what_cannot_be_is_refused():
    params = jax.eval_shape(toy.init_params, jax.random.key(0))
    assert projection(SparsityConfig(), params, toy.matrix_axes(params), 10) is None
    assert OptimizerConfig().sparsity == SparsityConfig(density=1.0)
    paths = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert "layers/period/0/mlp/up/kernel" in paths
    with pytest.raises(UserError, match="trains no matrices of layers"):
        projection(SparsityConfig(density=0.5), params, jax.tree.map(lambda _: None, params), 10)
    for wrong in (0.0, 1.5):
        with pytest.raises(UserError, match="must be above 0 and at most 1; try 0.1"):
            SparsityConfig(density=wrong)
    with pytest.raises(UserError, match="leave out one of both"):
        FinetuneConfig(lora=LoraConfig(rank=2), optimizer=FinetuneOptimizer(sparsity=SparsityConfig(density=0.1)))
