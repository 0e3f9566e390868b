"""Updates against optax and NumPy, schedules against their closed form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from toy import quick_compilation  # noqa: F401

import clm.presets
from espalier.commands.plan.time.amounts import Job
from espalier.commands.plan.time.roofline import step_time
from espalier.errors import UserError
from espalier.models.memory import step_memory
from espalier.training.config import OptimizerConfig
from espalier.training.optimizer import build_optimizer, schedule
from espalier.training.optimizers import OPTIMIZERS, OptimizerKind
from sharding.topology import chip_named, peak_flops

RATES = {"learning_rate": 0.01, "muon_learning_rate": 0.02, "weight_decay": 0.1}


def params_and_gradients(steps):
    shapes, random = jax.eval_shape(toy.init_params, jax.random.key(0)), np.random.default_rng(0)
    draw = lambda s: random.normal(size=s.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, shapes), [jax.tree.map(draw, shapes) for _ in range(steps)]


def updated(config, params, gradients, factor=1.0):
    optimizer = build_optimizer(config, params, toy.matrix_axes(params))
    state = jax.jit(optimizer.init)(params)
    step = jax.jit(optimizer.update)
    for g in gradients:
        params, state, measured = step(g, state, params, RATES, factor)
    return params, measured


def assert_trees_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize("clip", [0.0, 1.0, 1e6])
def test_adamw_equals_optax(clip):
    params, gradients = params_and_gradients(4)
    config = OptimizerConfig(clip_norm=clip, no_decay="bias|embedding")
    decayed = jax.tree_util.tree_map_with_path(
        lambda path, _: "bias" not in str(path) and "embed" not in str(path), params
    )
    theirs = optax.adamw(0.01 * 0.5, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=0.1, mask=decayed)
    if clip:
        theirs = optax.chain(optax.clip_by_global_norm(clip), theirs)

    @jax.jit
    def expect(params, gradients):
        state = theirs.init(params)
        for g in gradients:
            updates, state = theirs.update(g, state, params)
            params = optax.apply_updates(params, updates)
        return params

    expected = expect(params, gradients)
    got, measured = updated(config, params, gradients, factor=0.5)
    assert_trees_close(got, expected, rtol=1e-5, atol=1e-7)
    flat = np.concatenate([np.ravel(g) for g in jax.tree.leaves(gradients[-1])])
    np.testing.assert_allclose(measured["gradient_norm"], np.linalg.norm(flat), rtol=1e-5)


def newton_schulz(m):
    """Jordan et al. 2024: five steps of the quintic 3.4445 x - 4.7750 x³ + 2.0315 x⁵ on the singular values."""
    u, s, vt = np.linalg.svd(m, full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ vt


def test_muon_equals_numpy_on_each_stacked_matrix():
    params, gradients = params_and_gradients(3)
    got, _ = updated(OptimizerConfig(name="muon", clip_norm=0.0, no_decay="bias|embedding"), params, gradients)
    for name in ("up", "down"):
        weights = np.asarray(params["layers"]["period"]["0"]["mlp"][name]["kernel"], np.float64)
        for layer in range(2):
            w, momentum = weights[layer], 0.0
            for t, g in enumerate(gradients, 1):
                g = np.asarray(g["layers"]["period"]["0"]["mlp"][name]["kernel"][layer], np.float64)
                momentum = 0.95 * momentum + 0.05 * g
                # Nesterov's look ahead with both parts free of their bias (Dozat 2016).
                ahead = 0.95 * momentum / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t)
                stretch = max(1.0, w.shape[1] / w.shape[0]) ** 0.5
                w = w - 0.02 * (stretch * newton_schulz(ahead) + 0.1 * w)
            np.testing.assert_allclose(got["layers"]["period"]["0"]["mlp"][name]["kernel"][layer], w, atol=2e-5)


def test_muon_leaves_the_rest_to_adamw():
    params, gradients = params_and_gradients(3)
    config = OptimizerConfig(clip_norm=0.0, no_decay="bias|embedding")
    adamw, _ = updated(config, params, gradients)
    muon, _ = updated(dataclasses.replace(config, name="muon"), params, gradients)
    for part in ("embeddings", "head"):
        assert_trees_close(muon[part], adamw[part], rtol=1e-6)
    assert not np.allclose(*(t["layers"]["period"]["0"]["mlp"]["up"]["kernel"] for t in (muon, adamw)))


def test_muon_reads_several_axes_as_one_matrix():
    """A [D, N, H] kernel with ((0,), (1, 2)) moves like the [D, N·H] matrix."""
    config = OptimizerConfig(name="muon", clip_norm=0.0, no_decay="")
    wide = jax.random.normal(jax.random.key(1), (8, 3, 4))
    results = []
    for shape, axes in (((8, 3, 4), ((0,), (1, 2))), ((8, 12), ((0,), (1,)))):
        params = {"q": wide.reshape(shape)}
        optimizer = build_optimizer(config, params, {"q": axes})
        step = jax.jit(lambda p, o=optimizer: o.update({"q": jnp.cos(p["q"] * 9)}, o.init(p), p, RATES, 1.0))
        params, _, _ = step(params)
        results.append(np.ravel(params["q"]))
    np.testing.assert_allclose(*results, atol=1e-6)


def test_rates_scale_by_the_first_matching_pattern():
    params, gradients = params_and_gradients(1)
    plain, _ = updated(OptimizerConfig(), params, gradients)
    scaled, _ = updated(OptimizerConfig(rate_scales=(("up/kernel", 0.5), ("mlp|head", 0.0))), params, gradients)
    moved = jax.tree.map(lambda a, b, p: np.mean((np.asarray(b) - p) / (np.asarray(a) - p)), plain, scaled, params)
    assert moved["layers"]["period"]["0"]["mlp"]["up"]["kernel"] == pytest.approx(0.5, rel=1e-2)
    assert moved["layers"]["period"]["0"]["mlp"]["up"]["bias"] == 0 == moved["head"]["causal_lm"]["kernel"]
    assert moved["embeddings"]["token"]["embedding"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"no_decay": "(bias"}, "no_decay.*no regular expression"),
        ({"no_decay": "gamma"}, "no_decay: 'gamma' matches no parameter; paths look like embeddings/token/embedding"),
        ({"rate_scales": (("layer_9", 0.1),)}, "rate_scales: 'layer_9' matches no parameter"),
    ],
)
def test_patterns_are_checked(changes, words):
    params = jax.eval_shape(toy.init_params, jax.random.key(0))
    with pytest.raises(UserError, match=words):
        build_optimizer(OptimizerConfig(**changes), params, toy.matrix_axes(params))


def test_an_optimizer_that_is_new_is_one_entry(monkeypatch):
    """Lion (Chen et al. 2023) of optax, from the flag's choices to the estimates of memory and time."""
    lion = OptimizerKind(lambda config: optax.scale_by_lion(b1=config.b1, b2=config.b2), moments=1, matrix_moments=1)
    with pytest.raises(UserError, match="optimizer.name=lion is none of adamw, muon"):
        OptimizerConfig(name="lion")
    monkeypatch.setitem(OPTIMIZERS, "lion", lion)
    config = OptimizerConfig(name="lion", clip_norm=0.0, no_decay="bias|embedding")
    params, gradients = params_and_gradients(1)
    got, _ = updated(config, params, gradients)
    down = lambda tree: tree["layers"]["period"]["0"]["mlp"]["down"]["kernel"]  # noqa: E731
    expected = down(params) - 0.01 * (np.sign(down(gradients[0])) + 0.1 * down(params))
    np.testing.assert_allclose(down(got), expected, rtol=1e-6, atol=1e-7)

    model = clm.presets.demo().model
    memory = {
        name: step_memory(model, "causal_lm", {}, rows=1, length=8, moments=(kind.moments, kind.matrix_moments))
        for name, kind in OPTIMIZERS.items()
    }
    assert memory["lion"].optimizer == memory["adamw"].optimizer / 2 < memory["muon"].optimizer
    job = Job(model, chip_named("h100"), 1024, 16, {})
    times = {name: step_time(dataclasses.replace(job, optimizer=name)).step for name in OPTIMIZERS}
    assert times["lion"] < times["adamw"] and times["lion"] < times["muon"]


def test_muon_without_matrices_is_refused():
    params = {"bias": jnp.zeros(3)}
    with pytest.raises(UserError, match="has none; try --optimizer.name adamw"):
        build_optimizer(OptimizerConfig(name="muon"), params, {"bias": None})


def expected_factor(kind, s, steps, warmup, decay, final):
    if s < warmup and (kind != "wsd" or (s + 1) / warmup <= 1):
        return (s + 1) / warmup
    if kind == "constant":
        return 1.0
    begin = steps * (1 - decay) if kind == "wsd" else warmup
    x = max(0.0, (s - begin) / (steps - begin))
    return final + (1 - final) * ((1 + np.cos(np.pi * x)) / 2 if kind == "cosine" else 1 - x)


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd", "constant"])
@pytest.mark.parametrize(("warmup", "final"), [(0.1, 0.0), (7, 0.1), (0, 0.0)])
def test_schedules_follow_their_closed_form(kind, warmup, final):
    steps = 50
    config = OptimizerConfig(schedule=kind, warmup=warmup, final_fraction=final, decay_fraction=0.2)
    got = jax.vmap(schedule(config, steps))(jnp.arange(steps))
    first = warmup * steps if warmup < 1 else warmup
    expected = [expected_factor(kind, s, steps, first, 0.2, final) for s in range(steps)]
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert got[0] > 0 and got[-1] > 0, "no step may be wasted on a rate of zero"
    assert got.max() == pytest.approx(1.0)


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match="warmup=100 steps is longer than the run of 50"):
        schedule(OptimizerConfig(warmup=100), 50)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("Tesla T4", 65e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA T400", None),
        ("cpu", None),
    ],
)
def test_peaks_of_chips(kind, peak):
    assert peak_flops(type("Device", (), {"device_kind": kind})) == peak
