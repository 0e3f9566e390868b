"""What objectives may ask of the step, each with a model of a few numbers.

Frozen parameters, losses that cannot be divided, values collected before the step, nested batches, several models in
one tree, metrics that are no means.
"""

import hashlib
import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from sklearn.metrics import f1_score
from toy import quick_compilation  # noqa: F401

import sharding.rules
from espalier.errors import UserError
from espalier.training.config import CheckpointConfig, OptimizerConfig
from espalier.training.evaluation import make_evaluate
from espalier.training.frozen import Frozen
from espalier.training.optimizer import build_optimizer, schedule
from espalier.training.restore import read_data
from espalier.training.run import RunDirectory
from espalier.training.start import find_origin
from espalier.training.state import combined, new_state, shard_state
from espalier.training.step import Objective, jit_train_step, make_train_step, micro_batches
from sharding.mesh import MeshConfig, build_mesh, place_batch

ONE, EIGHT = MeshConfig(1, 1, 1), MeshConfig(2, 2, 2)


def after(
    objective, params, batch, mesh_config=ONE, accumulation=1, frozen=None, axes=None, name: Any = "adamw", steps=2
):
    """(parameters after some steps on the same batch, metrics of the last)."""
    config = OptimizerConfig(name=name, learning_rate=0.01, warmup=0, schedule="constant", eps=1e-3)
    mesh = build_mesh(mesh_config)
    optimizer = build_optimizer(config, params, axes, frozen)
    with jax.set_mesh(mesh):
        # The step takes the memory of what it is given.
        state = new_state(jax.tree.map(jnp.copy, params), optimizer.init, config, jax.random.key(2), frozen)
        state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, shard_state(state, mesh)))
        step = jit_train_step(objective, optimizer, schedule(config, 10), accumulation, state)
        metrics = {}
        for _ in range(steps):
            state, metrics = step(state, place_batch(batch, mesh))
        return jax.device_get((state.params, metrics))


def assert_same(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-5), got, expected)


# Adapters over a frozen base


def adapters(key):
    """Low-rank additions to one kernel of each layer; their paths lie inside the tree of the toy."""
    draw = jnp.sin(jnp.arange(2 * toy.WIDTH * 2) * 7.1 + jax.random.key_data(key)[1] % 100).reshape(2, toy.WIDTH, 2)
    up = {"lora": {"a": {"kernel": draw}, "b": {"kernel": jnp.zeros((2, 2, 32))}}}
    return {"layers": {"period": {"0": {"mlp": {"up": up}}}}}


def adapted() -> Objective:
    plain = toy.objective()

    def loss(params, batch, *rest):
        up = params["layers"]["period"]["0"]["mlp"]["up"]
        added = up["lora"]["a"]["kernel"] @ up["lora"]["b"]["kernel"]
        mlp = params["layers"]["period"]["0"]["mlp"] | {"up": {"kernel": up["kernel"] + added, "bias": up["bias"]}}
        return plain.loss(params | {"layers": {"period": {"0": {"mlp": mlp}}}}, batch, *rest)

    return Objective(plain.prepare, loss)


@pytest.fixture(autouse=True)
def rules(monkeypatch):
    """Where the parameters of these toys lie on a mesh."""
    more = ((r"lora/[ab]/kernel", ("fsdp", None)), (r"small", ()))
    monkeypatch.setattr("sharding.rules.RULES", (*more, *sharding.rules.RULES))


BASE = Frozen(toy.init_params, origin="hf:base at 0123abc")


def lora_run(config, **changes):
    return toy.run(
        config,
        **dict(init_params=adapters, matrix_axes=no_matrices, objective=adapted(), frozen=BASE) | changes,
    )


def no_matrices(shapes):
    return jax.tree.map(lambda _: None, shapes)


def test_trees_are_combined_deeply_and_may_not_overlap():
    base, tree = {"a": {"x": 1, "y": 2}, "b": 3}, {"a": {"z": 4}}
    assert combined(tree, base) == {"a": {"x": 1, "y": 2, "z": 4}, "b": 3}
    assert combined(tree, {}) is tree
    with pytest.raises(AssertionError, match="/a/x is both"):
        combined({"a": {"x": 5}}, base)


def test_adapters_alone_learn_and_the_default_pattern_may_match_none_of_them():
    params, base = adapters(jax.random.key(0)), jax.jit(toy.init_params)(jax.random.key(1))
    one = after(adapted(), params, toy.batch(0), frozen=base)
    assert_same(after(adapted(), params, toy.batch(0), EIGHT, 2, frozen=base), one)
    b = one[0]["layers"]["period"]["0"]["mlp"]["up"]["lora"]["b"]["kernel"]
    assert np.abs(b).max() > 0
    with pytest.raises(UserError, match="no_decay: 'nowhere' matches no parameter"):
        build_optimizer(OptimizerConfig(no_decay="nowhere"), params, None, base)
    build_optimizer(OptimizerConfig(no_decay="embedding"), params, None, base)


def test_a_run_over_a_frozen_base_resumes_bitwise_and_saves_it_once(tmp_path):
    config = dict(steps=4, checkpoint=CheckpointConfig(every=2, keep=9))
    whole = lora_run(toy.config(tmp_path / "whole", **config))
    lora_run(toy.config(tmp_path / "run", stop_at=2, **config))
    assert (tmp_path / "run" / "frozen" / "0" / "params").is_dir()
    paths = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run" / "checkpoints").rglob("*")}
    assert not any("embedding" in path for path in paths)

    # Whatever the origin would give today: the run goes on over its own.
    other = Frozen(toy.init_params, load=lambda abstract: pytest.fail("it has its own"), origin=BASE.origin)
    done = lora_run(toy.config(tmp_path / "run", **config), frozen=other)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(done.state.params), jax.device_get(whole.state.params))
    assert done.eval == whole.eval

    with pytest.raises(UserError, match="has frozen parameters .from hf:base at 0123abc. and these settings have none"):
        lora_run(toy.config(tmp_path / "run", **config), frozen=None)
    kept = tmp_path / "run" / "frozen"
    manifest = kept / "0" / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text + " ")
    with pytest.raises(UserError, match="does not hold the frozen parameters .* copy the folder back") as error:
        lora_run(toy.config(tmp_path / "run", **config))
    assert "\n" not in str(error.value)
    manifest.write_text(text)
    array = max((path for path in kept.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    array.write_bytes(array.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="damaged"):
        lora_run(toy.config(tmp_path / "run", **config))
    shutil.rmtree(kept)
    with pytest.raises(UserError, match="found nothing"):
        lora_run(toy.config(tmp_path / "run", **config))


def test_a_run_may_start_from_any_part_of_one_with_a_frozen_base(tmp_path):
    """The whole, the adapters alone, the base alone: as its state has them."""
    state = lora_run(toy.config(tmp_path / "run", steps=1)).state
    origin = find_origin(
        toy.config(tmp_path / "next", init_from=str(tmp_path / "run")), RunDirectory(tmp_path / "next")
    )
    assert origin is not None
    for tree in (state.complete, state.params, state.frozen):
        got = origin.restore_params(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree))
        jax.tree.map(np.testing.assert_array_equal, got, jax.device_get(tree))
    frozen = Frozen.of(origin, toy.init_params)
    forked = lora_run(toy.config(tmp_path / "forked", steps=1), frozen=frozen, origin=None)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(forked.state.frozen), jax.device_get(state.frozen))
    manifest = tmp_path / "run" / "checkpoints" / "1" / "manifest.json"
    said = f"{tmp_path / 'run'} at step 1, SHA-256 {hashlib.sha256(manifest.read_bytes()).hexdigest()}"
    assert read_data(tmp_path / "forked", 1)["frozen"]["origin"] == said
    unlike = state.complete | {"head": {"other": jax.ShapeDtypeStruct((2,), jnp.float32)}}
    with pytest.raises(UserError, match="head/other is missing"):
        origin.restore_params(unlike)


def test_frozen_parameters_are_not_donated():
    base = jax.jit(toy.init_params)(jax.random.key(1))
    after(adapted(), adapters(jax.random.key(0)), toy.batch(0), frozen=base)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(base))


# Losses in which rows meet


def contrastive(cached: bool) -> Objective:
    """Each query finds its document among those of the batch (InfoNCE); nested batch, tokens of two lengths."""

    def embed(params, side):
        return jnp.tanh(params["small"][side["input_ids"]].mean(1))

    def score(query, document):
        return -jnp.sum(jnp.diag(jax.nn.log_softmax(query @ document.T * 4)))

    def loss(params, batch, key, norms, train):
        total = score(embed(params, batch["query"]), embed(params, batch["document"]))
        return total / norms, {"loss": (total, norms)}

    def gradient(complete, params, batch, key, norms, accumulation):
        parts = micro_batches(batch, accumulation)

        def embedded(params, part):
            return {side: embed(complete(params), part[side]) for side in part}

        cache = jax.lax.map(lambda part: embedded(params, part), parts)

        def whole(cache):
            return score(*(cache[side].reshape(-1, cache[side].shape[-1]) for side in ("query", "document"))) / norms

        loss, pulled = jax.value_and_grad(whole)(cache)

        def add(total, numbered):
            part, pull = numbered
            return jax.tree.map(jnp.add, total, jax.vjp(lambda p: embedded(p, part), params)[1](pull)[0]), None

        grads = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), (parts, pulled))[0]
        return (loss, {"loss": (loss * norms, norms)}), grads

    rows = jnp.float32(toy.ROWS)
    return Objective(lambda batch, *_: (batch, rows), loss, divisible=False, gradient=gradient if cached else None)


def pairs():
    rng = np.random.default_rng(3)
    sides = {"query": 4, "document": 8}
    return {side: {"input_ids": rng.integers(0, 20, (toy.ROWS, T)).astype(np.int32)} for side, T in sides.items()}


def test_a_loss_that_cannot_be_cut_refuses_micro_batches_or_brings_its_gradient():
    params = {"small": jnp.sin(jnp.arange(160.0) * 3.7).reshape(20, 8)}
    with pytest.raises(UserError, match="accumulation=4: .* try --accumulation 1") as error:
        make_train_step(contrastive(cached=False), build_optimizer(OptimizerConfig(), params, None), jnp.float32, 4)
    assert "\n" not in str(error.value)
    one = after(contrastive(cached=False), params, pairs())
    assert_same(after(contrastive(cached=True), params, pairs(), EIGHT, accumulation=4), one)
    assert_same(after(contrastive(cached=False), params, pairs(), MeshConfig(2, sequence=4)), one)


# What is collected before the step


def preferring(collect) -> Objective:
    """Direct preference optimisation (Rafailov et al. 2023) over sequences scored by a table."""

    def loss(params, batch, key, norms, train):
        own = {side: logprob(params["small"], batch[side]) for side in ("chosen", "rejected")}
        margin = own["chosen"] - own["rejected"] - batch["chosen"]["reference"] + batch["rejected"]["reference"]
        total = -jnp.sum(jax.nn.log_sigmoid(0.5 * margin))
        return total / norms, {"loss": (total, norms), "margin": (jnp.sum(margin), norms)}

    return Objective(lambda batch, *_: (batch, jnp.float32(toy.ROWS)), loss, collect=collect)


def logprob(table, side):
    return jnp.take_along_axis(jax.nn.log_softmax(table), side["input_ids"], axis=0).sum(1)


def references(state, batch, key):
    """The frozen table's log-probabilities, and noise so that calls can be told apart."""
    reference = state.frozen["reference"]["small"]
    noise = {side: jax.random.uniform(jax.random.fold_in(key, i), (toy.ROWS,)) for i, side in enumerate(batch)}
    return {
        side: batch[side] | {"reference": (logprob(reference, batch[side]) + noise[side]).astype(jnp.bfloat16)}
        for side in batch
    }


def preferences(step):
    while True:
        rng = np.random.default_rng([1, step])
        T = toy.LENGTH
        sides = ("chosen", "rejected")
        yield {side: {"input_ids": rng.integers(0, 20, (toy.ROWS, T)).astype(np.int32)} for side in sides}
        step += 1


def table(key):
    return {"small": jnp.sin(jnp.arange(160.0) * 3.7 + jax.random.key_data(key)[1] % 7).reshape(20, 8)}


def preference_run(config, collect=references, **changes):
    return toy.run(
        config,
        init_params=table,
        matrix_axes=no_matrices,
        objective=preferring(collect),
        batches_from=preferences,
        eval_batches=[next(preferences(1000))],
        frozen=Frozen(lambda key: {"reference": table(key)}),
        **changes,
    )


def test_what_was_collected_is_replayed_on_resume(tmp_path):
    """Dead in step 6 with a checkpoint of step 3: step 4 had been written and is not collected again."""
    settings = dict(steps=7, checkpoint=CheckpointConfig(every=3, keep=1))
    whole = preference_run(toy.config(tmp_path / "whole", **settings))
    calls = []

    def dying(state, batch, key):
        calls.append(key)
        if len(calls) == 6:
            raise RuntimeError("power cut")
        return references(state, batch, key)

    with pytest.raises(RuntimeError):
        preference_run(toy.config(tmp_path / "run", **settings), dying)
    folder = tmp_path / "run" / "collected"
    assert {"3"} <= {path.stem for path in folder.glob("*.npz")}
    (folder / "3.npz").rename(tmp_path / "3.npz")
    (folder / "3.npz").write_bytes(b"torn")
    with pytest.raises(UserError, match="3.npz is not as it was written"):
        preference_run(toy.config(tmp_path / "run", **settings))
    (tmp_path / "3.npz").replace(folder / "3.npz")
    with (folder / "log.jsonl").open("a") as log:
        log.write('{"step": 4, "sha2')

    def later(state, batch, key):
        assert state.step > 3
        return references(state, batch, key)

    done = preference_run(toy.config(tmp_path / "run", mesh=MeshConfig(2, 2, 1, 2), **settings), later)
    assert_same(*jax.device_get((done.state.params, whole.state.params)))
    # What no checkpoint can lead to is gone; the sums stay.
    assert {path.stem for path in folder.glob("*.npz")} == {"6"}
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == list(range(7))
    assert log[0]["dtypes"] == {"chosen/reference": "bfloat16", "rejected/reference": "bfloat16"}
    theirs = [json.loads(line) for line in (tmp_path / "whole" / "collected" / "log.jsonl").read_text().splitlines()]
    assert [record["sha256"] for record in log[:4]] == [record["sha256"] for record in theirs[:4]]


# Two models in one tree


def test_two_models_in_one_tree_under_muon():
    """A generator and a discriminator, each a whole toy: matrices are found in each, on a mesh as on one device."""
    plain = toy.objective()

    def loss(params, batch, key, norms, train):
        found = {name: plain.loss(params[name], batch, key, norms, train) for name in params}
        total = found["generator"][0] + 3 * found["discriminator"][0]
        return total, {name: sums["loss"] for name, (_, sums) in found.items()}

    both = Objective(plain.prepare, loss)
    names = ("generator", "discriminator")
    params = {name: jax.jit(toy.init_params)(jax.random.key(i)) for i, name in enumerate(names)}
    axes = {name: toy.matrix_axes(params[name]) for name in names}
    one = after(both, params, toy.batch(0), axes=axes, name="muon", steps=1)
    sharded = after(both, params, toy.batch(0), EIGHT, 2, axes=axes, name="muon", steps=1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5), sharded, one)
    for i, name in enumerate(names):
        alone = after(
            Objective(plain.prepare, lambda p, *rest, scale=1 + 2 * i: (scale * plain.loss(p, *rest)[0], {})),
            params[name],
            toy.batch(0),
            axes=axes[name],
            name="muon",
            steps=1,
        )[0]
        pick = lambda tree: tree["layers"]["period"]["0"]["mlp"]["down"]["kernel"]  # noqa: E731
        # Muon's direction does not depend on the gradient's length, which is clipped over both.
        np.testing.assert_allclose(pick(one[0][name]), pick(alone), atol=2e-5)


# Metrics that are no means


@pytest.mark.parametrize(("mesh", "accumulation"), [(ONE, 1), (EIGHT, 2)], ids=["one", "eight"])
def test_f1_of_a_whole_set_is_that_of_scikit_learn(mesh, accumulation):
    """Counts are added up over micro-batches and batches, and only then made into a metric."""
    rng = np.random.default_rng(0)
    batches = [
        {"truth": rng.choice(3, toy.ROWS, p=p).astype(np.int32), "guess": rng.integers(0, 3, toy.ROWS).astype(np.int32)}
        for p in ([0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.0, 0.1, 0.9])
    ]

    def loss(params, batch, key, norms, train):
        confusion_CC = jnp.zeros((3, 3)).at[batch["truth"], batch["guess"]].add(1.0)
        hits = jnp.sum(batch["truth"] == batch["guess"])
        return jnp.sum(params["small"]), {"accuracy": (hits, batch["truth"].size), "confusion": (confusion_CC, None)}

    def finalize(metrics):
        c = metrics["confusion"]
        return metrics | {"macro_f1": np.mean(2 * np.diag(c) / (c.sum(0) + c.sum(1)))}

    objective = Objective(lambda batch, *_: (batch, 1.0), loss)
    config, mesh = OptimizerConfig(), build_mesh(mesh)
    with jax.set_mesh(mesh):
        state = new_state({"small": jnp.ones(3)}, lambda params: {}, config, jax.random.key(0))
        got = make_evaluate(objective, batches, mesh, finalize, accumulation)(state)
    truth, guess = (np.concatenate([batch[name] for batch in batches]) for name in ("truth", "guess"))
    assert got == pytest.approx(
        {"macro_f1": f1_score(truth, guess, average="macro"), "accuracy": np.mean(truth == guess)}
    )
    _, metrics = after(objective, {"small": jnp.ones(3)}, batches[0], steps=1)
    assert "accuracy" in metrics and "confusion" not in metrics
