"""Every layout computes what one device computes: loss, the gradient of every tensor, parameters after three steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clm.presets
import mlm.presets
from clm.loss import causal_lm_objective
from espalier.models.config import Execution
from espalier.models.transformer import init_params, matrix_axes
from espalier.training.config import OptimizerConfig
from espalier.training.optimizer import build_optimizer, schedule
from espalier.training.state import new_state, shard_state
from espalier.training.step import make_train_step
from mlm.config import MaskingConfig
from mlm.loss import masked_lm_objective
from mlm.masking import Vocabulary
from sharding.mesh import MeshConfig, build_mesh, place_batch

V, T, B = 250, 64, 16
# Windows and whole rows, grouped heads, tied embeddings; heads that four devices can share.
SIZES = dict(
    vocab_size=V,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=8,
    intermediate_size=64,
    max_position_embeddings=T,
    sliding_window=16,
    hidden_dropout=0.0,
    attention_dropout=0.0,
)
ENCODER = dataclasses.replace(mlm.presets.modern_base().model, **SIZES)
DECODER = dataclasses.replace(
    clm.presets.llama_1b().model, **SIZES, layer_period=("local", "global"), rope_scaling_factor=None
)
LAYOUTS = [
    MeshConfig(data=8),
    MeshConfig(fsdp=-1),
    MeshConfig(data=2, fsdp=4),
    MeshConfig(fsdp=2, tensor=4, data=1),
    MeshConfig(data=2, fsdp=2, tensor=2),
    MeshConfig(data=1, sequence=8),
    MeshConfig(data=1, sequence=2, tensor=4),
    MeshConfig(data=1, fsdp=2, sequence=2, tensor=2),
    MeshConfig(replica=2, data=1, fsdp=2, sequence=2),
    MeshConfig(replica=2, data=2, tensor=2),
    MeshConfig(replica=4, data=1, fsdp=2),
]
ONE = MeshConfig(1, 1, 1)


def objective_of(model):
    execution = Execution(dtype="float32", scan_layers=True)
    if model.causal:
        return causal_lm_objective(model, execution=execution)
    vocabulary = Vocabulary(4, np.arange(V) >= 5, np.zeros(V, np.uint8))
    return masked_lm_objective(
        model, MaskingConfig(rate=0.25), vocabulary, rate=lambda step, train: jnp.float32(0.25), execution=execution
    )


def batch(seed: int) -> dict:
    """Packed rows: three documents whose borders differ from row to row, and padding."""
    random = np.random.default_rng(seed)
    ids = random.integers(5, V, (B, T)).astype(np.int32)
    segments, positions = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    for row in range(B):
        borders = [0, *sorted(random.choice(np.arange(4, T - 4), 2, replace=False)), T - row % 5]
        for number, (start, end) in enumerate(zip(borders[:-1], borders[1:], strict=True), 1):
            segments[row, start:end], positions[row, start:end] = number, np.arange(end - start)
    weights = np.zeros((B, T), np.float32)
    weights[:, :-1] = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    return {
        "input_ids": ids,
        "segment_ids": segments,
        "positions": positions,
        "labels": np.where(weights > 0, np.roll(ids, -1, axis=1), 0).astype(np.int32),
        "loss_weights": weights,
        "label_bytes": np.full((B, T), 3, np.int32),
    }


CONFIG = OptimizerConfig(learning_rate=1e-3, warmup=0, clip_norm=0.0, b1=0.5)
"""Without clipping the first moments after one step are the gradients times 1-b1."""


@functools.cache
def first_state(model, layout: MeshConfig):
    """(the optimizer, a state that was made where this layout has it)."""
    mesh = build_mesh(layout)

    def init(key):
        return init_params(model, key)

    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(init, jax.random.key(0))
        optimizer = build_optimizer(CONFIG, shapes, matrix_axes(shapes))

        def fresh():
            return new_state(init(jax.random.key(1)), optimizer.init, CONFIG, jax.random.key(2))

        return optimizer, jax.jit(fresh, out_shardings=shardings_of(jax.eval_shape(fresh), mesh))()


def shardings_of(state, mesh):
    return jax.tree.map(lambda leaf: leaf.sharding, shard_state(state, mesh))


@functools.cache
def three_steps(model, layout: MeshConfig, accumulation: int = 1):
    """(loss of the first step, its gradients, parameters after three steps), from the state of one device."""
    mesh = build_mesh(layout)
    optimizer, state = first_state(model, ONE)
    with jax.set_mesh(mesh):
        shardings = shardings_of(jax.eval_shape(lambda: state), mesh)
        state = jax.device_put(state, shardings)
        step = make_train_step(objective_of(model), optimizer, schedule(CONFIG, 10), accumulation)
        step = jax.jit(step, out_shardings=(shardings, None))
        state, metrics = step(state, place_batch(batch(0), mesh))
        loss, gradients = jax.device_get((metrics["loss"], state.opt_state.mu))
        for number in (1, 2):
            state, _ = step(state, place_batch(batch(number), mesh))
        return float(loss), jax.tree.map(lambda m: m / 0.5, gradients), jax.device_get(state.params)


def distances(actual, expected):
    """(path, ‖Δ‖, ‖expected‖, elements) of every tensor, in float64."""
    there = jax.tree.leaves(actual)
    for (path, want), got in zip(jax.tree_util.tree_leaves_with_path(expected), there, strict=True):
        want, got = np.asarray(want, np.float64), np.asarray(got, np.float64)
        yield jax.tree_util.keystr(path), np.linalg.norm(got - want), np.linalg.norm(want), want.size


@pytest.mark.parametrize("model", [ENCODER, DECODER], ids=["encoder", "decoder"])
def test_a_state_begins_alike_on_every_axis(model):
    _, one = first_state(model, ONE)
    _, state = first_state(model, MeshConfig(data=1, fsdp=2, sequence=2, tensor=2))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), jax.device_get(one.params))


@pytest.mark.parametrize("model", [ENCODER, DECODER], ids=["encoder", "decoder"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layout_equals_one_device(layout, model):
    loss, gradients, params = three_steps(model, layout)
    assert_equal(loss, gradients, params, model)


@pytest.mark.parametrize("model", [ENCODER, DECODER], ids=["encoder", "decoder"])
def test_accumulated_on_every_axis_equals_one_device(model):
    assert_equal(*three_steps(model, MeshConfig(data=1, fsdp=2, sequence=2, tensor=2), accumulation=4), model)


def assert_equal(loss, gradients, params, model):
    one_loss, one_gradients, one_params = three_steps(model, ONE)
    assert loss == pytest.approx(one_loss, rel=1e-6)
    whole = np.sqrt(sum(norm**2 for _, _, norm, _ in distances(one_gradients, one_gradients)))
    for path, gap, norm, _ in distances(gradients, one_gradients):
        assert gap <= 1e-5 * norm + 1e-7 * whole, f"gradient of {path}: |Δ| {gap:.2e}, norm {norm:.2e} of {whole:.2e}"
    for path, gap, norm, size in distances(params, one_params):
        assert gap <= 1e-5 * norm + 1e-6 * size**0.5, f"{path} after three steps: |Δ| {gap:.2e}, norm {norm:.2e}"
