"""A step equals brute force; micro-batches and meshes change nothing."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from toy import quick_compilation  # noqa: F401

from espalier.training.config import OptimizerConfig
from espalier.training.evaluation import make_evaluate
from espalier.training.optimizer import build_optimizer, schedule
from espalier.training.state import new_state, shard_state
from espalier.training.step import Objective, make_eval_step, make_train_step
from sharding.mesh import MeshConfig, build_mesh, place_batch


def stepped(mesh_config=None, accumulation=1, objective=None, name: Literal["adamw", "muon"] = "adamw"):
    """State after two steps, and the metrics of both; without a mesh everything is on one device."""
    # A small eps would let Adam blow rounding up where a gradient is nearly zero.
    config = OptimizerConfig(name=name, learning_rate=0.01, warmup=0, schedule="constant", eps=1e-3)
    shapes = jax.eval_shape(toy.init_params, jax.random.key(0))
    optimizer = build_optimizer(config, shapes, toy.matrix_axes(shapes))
    mesh = build_mesh(mesh_config or MeshConfig(1, 1, 1))

    def init():
        return new_state(toy.init_params(jax.random.key(1)), optimizer.init, config, jax.random.key(2))

    with jax.set_mesh(mesh):
        layout = jax.tree.map(lambda leaf: leaf.sharding, shard_state(jax.eval_shape(init), mesh))
        state = jax.jit(init, out_shardings=layout)()
        step = jax.jit(
            make_train_step(objective or toy.objective(), optimizer, schedule(config, 10), accumulation),
            donate_argnums=0,
            out_shardings=(layout, None),
        )
        state, first = step(state, place_batch(toy.batch(0), mesh))
        state, second = step(state, place_batch(toy.batch(1), mesh))
    return jax.device_get((state, first, second))


@pytest.fixture(scope="module")
def reference():
    return stepped()


def assert_same(got, expected, atol=2e-6):
    (state, *metrics), (expected_state, *expected_metrics) = got, expected
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), state.params, expected_state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), metrics, expected_metrics)


def test_loss_equals_brute_force(reference):
    """The first step's loss, from the definition and one token at a time in float64."""
    _, metrics, _ = reference
    key = jax.random.split(jax.random.fold_in(jax.random.key(2), 0))[0]
    batch = toy.batch(0)
    chosen = np.asarray(jax.random.bernoulli(key, 0.5, batch["labels"].shape) * batch["loss_weights"])
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), jax.jit(toy.init_params)(jax.random.key(1)))
    mlp = params["layers"]["period"]["0"]["mlp"]
    total = 0.0
    for row, column in zip(*np.nonzero(chosen), strict=True):
        x = params["embeddings"]["token"]["embedding"][batch["input_ids"][row, column]]
        for layer in range(2):
            up = x @ mlp["up"]["kernel"][layer] + mlp["up"]["bias"][layer]
            x = x + np.maximum(up, 0) @ mlp["down"]["kernel"][layer]
        logits = params["head"]["causal_lm"]["kernel"] @ x
        total -= logits[batch["labels"][row, column]] - np.log(np.exp(logits).sum())
    assert metrics["loss"] == pytest.approx(total / chosen.sum(), rel=1e-5)
    assert metrics["learning_rate"] == pytest.approx(0.01)


def test_eight_micro_batches_with_uneven_weights_equal_the_whole(reference):
    weights = toy.batch(0)["loss_weights"]
    assert len({weights[i::8].sum() for i in range(8)}) > 4
    assert_same(stepped(accumulation=8), reference)


@pytest.mark.parametrize(
    ("mesh", "accumulation"),
    [(MeshConfig(2, 2, 2), 1), (MeshConfig(1, 8, 1), 2), (MeshConfig(2, 2, 2), 4)],
)
def test_meshes_change_nothing(reference, mesh, accumulation):
    assert_same(stepped(mesh, accumulation), reference)


def test_muon_on_a_mesh_equals_one_device():
    assert_same(stepped(MeshConfig(1, 4, 2), name="muon"), stepped(name="muon"), atol=2e-5)


def test_micro_batches_are_cut_without_communication():
    """Interleaved rows lie on their device already; a cut into consecutive ones would gather the batch."""
    mesh = build_mesh(MeshConfig(8, 1, 1))

    def prepare(batch, key, step, train):
        return batch, 1.0

    def loss(params, batch, key, norms, train):
        return jnp.sum(batch["x"] * params["bias"]), {}

    optimizer = build_optimizer(OptimizerConfig(no_decay=""), {"bias": jnp.zeros(4)}, None)
    with jax.set_mesh(mesh):
        state = new_state({"bias": jnp.zeros(4)}, optimizer.init, OptimizerConfig(), jax.random.key(0))
        batch = place_batch({"x": np.ones((64, 4), np.float32)}, mesh)
        step = make_train_step(Objective(prepare, loss), optimizer, schedule(OptimizerConfig(), 10), accumulation=4)
        text = jax.jit(step).lower(state, batch).compile().as_text() or ""
    assert "all-reduce" in text
    for moving in ("all-gather", "all-to-all", "collective-permute"):
        assert moving not in text


def test_every_step_draws_anew_and_the_key_stays():
    noisy = toy.objective(noise=0.5)
    same = Objective(lambda *_: (toy.batch(0), jnp.float32(1)), noisy.loss)
    state, first, second = stepped(objective=same)
    assert state.step == 2
    np.testing.assert_array_equal(state.key, jax.random.key_data(jax.random.key(2)))
    assert abs(first["loss"] - second["loss"]) > 1


def test_rates_are_values_of_the_state():
    """One compiled step serves two learning rates, also under vmap."""
    config = OptimizerConfig(warmup=0, schedule="constant")
    shapes = jax.eval_shape(toy.init_params, jax.random.key(0))
    optimizer = build_optimizer(config, shapes, None)
    step = make_train_step(toy.objective(), optimizer, schedule(config, 10))

    def final(rate):
        state = new_state(toy.init_params(jax.random.key(1)), optimizer.init, config, jax.random.key(2))
        state.rates["learning_rate"] = rate
        return step(state, toy.batch(0))[1]["learning_rate"], step(state, toy.batch(0))[0].params

    rates, params = jax.jit(jax.vmap(final))(jnp.array([0.01, 0.02]))
    np.testing.assert_allclose(rates, [0.01, 0.02])
    up = params["layers"]["period"]["0"]["mlp"]["up"]["bias"]
    np.testing.assert_allclose(up[1], 2 * up[0], rtol=1e-5)


def test_evaluation_divides_once_after_all_batches():
    """Batches with 1 and with many tokens: the mean over tokens, not the mean of means."""
    params = jax.jit(toy.init_params)(jax.random.key(1))
    batches = [toy.batch(i) for i in range(3)]
    batches[0]["loss_weights"][:] = 0
    batches[0]["loss_weights"][0, 0] = 1
    keep = Objective(lambda batch, *_: (batch, jnp.float32(1)), toy.objective().loss)
    mesh = build_mesh(MeshConfig(4, 2, 1))
    with jax.set_mesh(mesh):
        evaluate = make_evaluate(keep, batches, mesh, lambda m: m | {"perplexity": float(np.exp(m["loss"]))})
        state = new_state(params, lambda params: {}, OptimizerConfig(), jax.random.key(0))
        got, again = evaluate(state), evaluate(state)
    sums = [jax.jit(make_eval_step(keep))(params, batch, jax.random.key(0))["loss"] for batch in batches]
    assert got["loss"] == pytest.approx(float(sum(s for s, _ in sums) / sum(w for _, w in sums)), rel=1e-5)
    assert got["perplexity"] == pytest.approx(np.exp(got["loss"]))
    assert got == again


def test_evaluation_does_not_train_and_draws_anew_for_each_batch_and_micro_batch():
    """A generator samples in evaluation too: the key is there, and is another than that of the masks."""

    def prepare(batch, key, step, train):
        assert not train
        return batch | {"masks": jax.random.uniform(key, (toy.ROWS,))}, 1.0

    def loss(params, batch, key, norms, train):
        assert not train
        rows = batch["masks"].shape
        sums = {"masks": batch["masks"].sum(), "samples": jax.random.uniform(key, rows).sum()}
        return jnp.float32(0), {name: (total, jnp.float32(rows[0])) for name, total in sums.items()}

    mesh = build_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        state = new_state({}, lambda params: {}, OptimizerConfig(), jax.random.key(0))
        seen = [
            make_evaluate(Objective(prepare, loss), [toy.batch(0)] * count, mesh, accumulation=accumulation)(state)
            for count, accumulation in ((1, 1), (2, 1), (1, 2))
        ]
    assert seen[0]["masks"] == pytest.approx(seen[2]["masks"])
    values = [seen[0]["masks"], seen[1]["masks"], *(metrics["samples"] for metrics in seen)]
    assert len({round(value, 4) for value in values}) == len(values)
