"""Sparse autoencoders: BatchTopK against brute force, gradients against PyTorch, metrics against NumPy."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import BERT, GPT, as_jax, batch_of, close, random_params, same
from tiny_runs import write_run
from toy import quick_compilation  # noqa: F401

from espalier import assembly
from espalier.commands.look.features import FeaturesConfig
from espalier.commands.look.features import main as show
from espalier.errors import UserError
from espalier.features import autoencoder as sparse
from espalier.features.config import AutoencoderConfig, decoder, encoder
from espalier.features.objective import NAME, autoencoder_objective, concluded, nats, stream
from espalier.features.saved import parameters, read_autoencoder
from espalier.features.use import features_of
from espalier.loading import load
from espalier.models.config import Execution
from espalier.models.taps import Taps
from espalier.models.transformer import apply, stack
from espalier.pretraining.objective import Setup
from espalier.training.config import OptimizerConfig
from espalier.training.optimizer import build_optimizer, schedule
from espalier.training.state import new_state, shard_state
from espalier.training.step import make_eval_step, make_train_step
from mlm.record import MASKED_LM
from sharding.mesh import MeshConfig, build_mesh, place_batch

EXECUTION = Execution(dtype="float32")
D, F = 32, 64


def own(seed=0, threshold=0.3):
    """An autoencoder none of whose numbers is that of a fresh one."""
    rng = np.random.default_rng(seed)
    params = sparse.init_autoencoder(jax.random.key(seed), D, F)
    params["encoder"]["bias"] = jnp.asarray(rng.normal(size=F), jnp.float32) * 0.1
    params["decoder"]["bias"] = jnp.asarray(rng.normal(size=D), jnp.float32) * 0.1
    mean = jnp.asarray(rng.normal(size=D), jnp.float32) * 0.1
    params["statistics"] |= {"scale": jnp.float32(1.7), "threshold": jnp.float32(threshold), "mean": mean}
    return params


def test_batch_top_k_is_that_of_sorting():
    rng = np.random.default_rng(0)
    for count in (1, 7, 40, 300):
        z = np.maximum(rng.normal(size=(2, 5, 24)), 0).astype(np.float32)
        z[0, 0, :3] = z[0, 0, 0] = 1.25  # equals
        kept, smallest = sparse.batch_top_k(jnp.asarray(z), jnp.float32(count))
        ordered = np.sort(z.ravel())[::-1]
        limit = ordered[count - 1] if count <= z.size else 0.0
        assert smallest == limit
        np.testing.assert_array_equal(kept, np.where(z >= limit, z, 0))


def in_torch(autoencoder, x_BTD, part_BT, settings):
    """The loss, by topk over the flattened batch."""
    weights = {
        "/".join(k.key for k in path): torch.tensor(np.asarray(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(autoencoder)
    }
    for name in ("encoder/kernel", "encoder/bias", "decoder/kernel", "decoder/bias"):
        weights[name].requires_grad_()
    x = torch.tensor(np.asarray(x_BTD))[torch.tensor(np.asarray(part_BT))] / weights["statistics/scale"]
    rows = weights["decoder/kernel"] / weights["decoder/kernel"].norm(dim=1, keepdim=True)
    z = torch.relu((x - weights["decoder/bias"]) @ weights["encoder/kernel"] + weights["encoder/bias"])

    def top(z, count):
        flat = z.flatten()
        best = torch.topk(flat, min(count, flat.numel()))
        return torch.zeros_like(flat).scatter(0, best.indices, best.values).reshape(z.shape)

    error = x - top(z, settings.k * len(x)) @ rows - weights["decoder/bias"]
    dead = weights["statistics/idle"] >= settings.dead_after
    wanted = error.detach()
    missing = wanted - top(torch.where(dead, z, 0.0), (settings.aux_k or D // 2) * len(x)) @ rows
    aux = (missing**2).sum() / (wanted**2).sum() if dead.any() else 0
    loss = (error**2).sum() / D / len(x) + settings.aux_coefficient * aux
    loss.backward()
    return loss.item(), {name: np.asarray(one.grad) for name, one in weights.items() if one.requires_grad}


@pytest.mark.parametrize("dead", [0, 20])
def test_loss_and_gradients_are_those_of_pytorch(dead):
    settings = AutoencoderConfig(k=4, aux_k=3, dead_after=10)
    params = own()
    params["statistics"]["idle"] = jnp.where(jnp.arange(F) < dead, 10.0, 3.0)
    rng = np.random.default_rng(1)
    x_BTD = jnp.asarray(rng.normal(size=(3, 9, D)), jnp.float32)
    part_BT = jnp.asarray(rng.random((3, 9)) > 0.3)

    def loss(params):
        said = sparse.learnt(params, x_BTD, part_BT, settings)
        return said.loss / part_BT.sum() + settings.aux_coefficient * said.aux

    value, gradient = jax.value_and_grad(loss)(params)
    expected, theirs = in_torch(params, x_BTD, part_BT, settings)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for name, want in theirs.items():
        group, leaf = name.split("/")
        close(gradient[group][leaf], want, 1e-5)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient["statistics"]))


def setup_of(model):
    settings = AutoencoderConfig(layer=1, features=F, k=4, dead_after=60)
    make = decoder if model.causal else encoder
    config = dataclasses.replace(make(), autoencoder=settings, execution=EXECUTION)
    return Setup(config, model, None)


def objective_of(setup, layer=1):
    if setup.model.causal:
        return autoencoder_objective(setup, lambda batch, key, step, train: (batch, 1.0), layer)
    return autoencoder_objective(setup, MASKED_LM.build(setup).prepare, layer)


def text(model, rows=8):
    batch = batch_of(model, [[7, 5], [12], [3, 9], [15], [4], [10, -2], [6, 6], [2, 11]][:rows], 16)
    batch["input_ids"] = np.maximum(batch["input_ids"], 6)
    weights = (batch["segment_ids"] > 0) & (np.roll(batch["segment_ids"], -1, 1) == batch["segment_ids"])
    labels = np.roll(batch["input_ids"], -1, 1)
    if model.causal:
        batch |= {"labels": labels, "loss_weights": weights.astype(np.float32)}
    return batch


def params_of(model, setup):
    head = "causal_lm" if model.causal else "masked_lm"
    return as_jax(random_params(model, (head,))), own()


def trained(model, mesh_config, steps=3, batch=None):
    """State after some steps with the metrics of each."""
    setup = setup_of(model)
    frozen, ours = params_of(model, setup)
    objective = objective_of(setup)
    config = OptimizerConfig(learning_rate=0.01, warmup=0, schedule="constant", weight_decay=0.1, eps=1e-3)
    mesh = build_mesh(mesh_config)
    with jax.set_mesh(mesh):
        optimizer = build_optimizer(config, {NAME: ours}, None, frozen)
        state = new_state({NAME: ours}, optimizer.init, config, jax.random.key(2), frozen)
        layout = jax.tree.map(lambda leaf: leaf.sharding, shard_state(state, mesh))
        state = jax.device_put(state, layout)
        step = jax.jit(make_train_step(objective, optimizer, schedule(config, 10)), out_shardings=(layout, None))
        found = []
        for _ in range(steps):
            state, metrics = step(state, place_batch(text(model) if batch is None else batch, mesh))
            found.append(jax.device_get(metrics))
        return jax.device_get(state.params), found


@pytest.mark.parametrize("model", [BERT, GPT], ids=["bert", "gpt"])
def test_sharded_is_unsharded_and_padding_takes_no_part(model):
    """k features a token over the batch of all devices; directions stay of length 1, statistics of the data alone."""
    params, metrics = trained(model, MeshConfig(1, 1, 1))
    sharded, theirs = trained(model, MeshConfig(2, 2, 2))
    close(sharded, params, 1e-5)
    for one, other in zip(theirs, metrics, strict=True):
        # 1 − a ratio: it is the ratio that is computed.
        close([1 - one.pop("variance_explained"), one], [1 - other.pop("variance_explained"), other], 1e-5)
    statistics = params[NAME]["statistics"]
    np.testing.assert_allclose(np.linalg.norm(params[NAME]["decoder"]["kernel"], axis=1), 1, atol=1e-6)
    assert statistics["scale"] == np.float32(1.7)  # decayed by no optimizer
    tokens = float(((text(model)["segment_ids"] > 0) & (text(model)["positions"] > 0)).sum())
    assert set(np.unique(statistics["idle"])) <= {0, 60, *(tokens * n for n in range(4))}
    assert metrics[-1]["loss"] < metrics[0]["loss"] and np.isfinite(metrics[-1]["aux"])

    noisy = text(model)
    padding = noisy["segment_ids"] == 0
    noisy["input_ids"] = np.where(padding, 150, noisy["input_ids"])
    again, _ = trained(model, MeshConfig(1, 1, 1), batch=noisy)
    same(again, params)


def by_hand(setup, params, batch, layer):
    """Metrics in NumPy float64, the passes with something in the stream's place by `stack` from there on."""
    model = setup.model
    x_BTD, end_BTD = stream(setup, params, batch, layer)
    part = (np.asarray(batch["segment_ids"]) > 0) & (np.asarray(batch["positions"]) > 0)
    saved = {
        path[-2].key + "/" + path[-1].key: np.asarray(leaf, np.float64)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params[NAME])
    }
    scale = saved["statistics/scale"]
    x = np.asarray(x_BTD, np.float64)[part]
    z = (x / scale - saved["decoder/bias"]) @ saved["encoder/kernel"] + saved["encoder/bias"]
    f = z * (z > saved["statistics/threshold"])
    rebuilt = scale * (f @ saved["decoder/kernel"] + saved["decoder/bias"])
    found = {
        "l0": (f > 0).sum() / len(x),
        "variance_explained": 1 - ((x - rebuilt) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(),
        "dead": np.mean(~(f > 0).any(0)),
    }
    whole = np.asarray(x_BTD).copy()

    def with_instead(new):
        changed = whole.copy()
        changed[part] = new
        taps = Taps(change={"stream": lambda x, given: given}, given={"stream": jnp.asarray(changed)[None]})
        one = dataclasses.replace(model, num_hidden_layers=1)
        top = jax.tree.map(lambda leaf: leaf[layer:], params["layers"])
        out, _ = stack(
            one,
            params | {"layers": top},
            jnp.asarray(changed),
            batch["segment_ids"],
            batch["positions"],
            execution=EXECUTION,
            taps=taps,
        )
        total, words = nats(setup, params, batch, out)
        return float(total / words)

    clean = with_instead(whole[part])
    np.testing.assert_allclose(clean, float(np.divide(*nats(setup, params, batch, end_BTD))), rtol=1e-5)
    for name, new in (("", saved["statistics/mean"]), ("_zero", 0)):
        without = with_instead(new)
        found[f"cross_entropy_recovered{name}"] = (without - with_instead(rebuilt)) / (without - clean)
    return found


@pytest.mark.parametrize("model", [BERT, GPT], ids=["bert", "gpt"])
def test_metrics_are_those_by_hand(model):
    setup = setup_of(model)
    frozen, ours = params_of(model, setup)
    params, objective = frozen | {NAME: ours}, objective_of(setup)
    batch, key = as_jax(text(model)), jax.random.key(3)
    sums = jax.jit(make_eval_step(objective))(params, batch, key)
    metrics = concluded(
        {
            name: np.asarray(total, np.float64) if weight is None else float(total / weight)
            for name, (total, weight) in sums.items()
        }
    )
    prepared, _ = objective.prepare(batch, key, jnp.int32(0), False)
    expected = by_hand(setup, params, prepared, 1)
    assert 1 < expected["l0"] < F / 2
    for name, want in expected.items():
        np.testing.assert_allclose(metrics[name], want, rtol=2e-4, err_msg=name)


TEXT = (
    "the quick brown fox jumps over the lazy dog while 敏捷的狐狸跳过了懒狗 the cat sleeps in the sun 猫在阳光下睡觉 "
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models and text, a part of it Chinese."""
    folder = tmp_path_factory.mktemp("features")
    words = (TEXT * 3).split()
    rng = np.random.default_rng(0)
    (folder / "text.txt").write_text("\n\n".join(" ".join(rng.permutation(words)) for _ in range(60)), encoding="utf-8")
    for name, model in (("bert", BERT), ("gpt", GPT)):
        write_run(folder / name, model, [TEXT * 20])
    return folder


def small(folder, name, run, steps=4, **changes: Any):
    config = (decoder if name == "gpt" else encoder)()
    settings = dataclasses.replace(AutoencoderConfig(features=F, k=4, dead_after=500), **changes.pop("autoencoder", {}))
    data = dataclasses.replace(
        config.data,
        files=(str(folder / "text.txt"),),
        validation_fraction=0.3,
        cache=str(folder / "cache"),
        sequence_length=32,
    )
    return dataclasses.replace(
        config,
        **{
            "init_from": str(folder / name),
            "run_dir": str(folder / run),
            "steps": steps,
            "batch_size": 8,
            "eval_rows": 16,
            "eval_every": 100,
            "log_every": 1,
            "data": data,
            "autoencoder": settings,
            "execution": EXECUTION,
            "mesh": MeshConfig(1, 1, 1),
        }
        | changes,
    )


@pytest.fixture(scope="module")
def runs(folder):
    """Summaries of an encoder's autoencoder, of a decoder's, and of random weights."""
    return {
        "bert": assembly.train(small(folder, "bert", "of-bert", mesh=MeshConfig(2, 2, 2))),
        "gpt": assembly.train(small(folder, "gpt", "of-gpt")),
    }


def test_a_run_that_was_interrupted_is_one_that_was_not(folder, runs):
    path = folder / "of-gpt-again"
    assembly.train(small(folder, "gpt", "of-gpt-again", stop_at=2))
    again = assembly.train(small(folder, "gpt", "of-gpt-again"))
    assert again["eval"] == runs["gpt"]["eval"]
    same(load(path).params[NAME], load(folder / "of-gpt").params[NAME])
    config = json.loads((path / "config.json").read_text())
    assert (config["task"], config["autoencoder"]["layer"]) == ("causal_lm_autoencoder", 1)


@pytest.mark.parametrize("name", ["bert", "gpt"])
def test_saved_is_what_was_measured(folder, runs, name):
    """The file, read by PyTorch after the formula of SAELens, gives what the run's own parameters give; it begins where
    the stream is."""
    run = folder / f"of-{name}"
    model = load(run)
    known = model.params[NAME]["statistics"]
    batch = {"input_ids": jnp.arange(24).reshape(2, 12) + 7}
    _, seen = apply(model.config, model.params, batch, execution=EXECUTION, taps=Taps(read=("stream",)))
    x = np.asarray(seen["stream"][1])
    f = sparse.features(model.params[NAME], jnp.asarray(x))
    ours = sparse.reconstructed(model.params[NAME], f)
    cfg = json.loads((run / "autoencoder/cfg.json").read_text())
    assert (cfg["architecture"], cfg["d_in"], cfg["d_sae"], cfg["normalize_activations"]) == ("jumprelu", D, F, "none")
    assert cfg["metadata"]["hook_name"] == "blocks.1.hook_resid_pre"
    saved = load_file(run / "autoencoder/sae_weights.safetensors")
    z = (torch.tensor(x) - saved["b_dec"]) @ saved["W_enc"] + saved["b_enc"]
    theirs = torch.relu(z) * (z > saved["threshold"])
    close(theirs, known["scale"] * f, 1e-5)
    close(theirs @ saved["W_dec"] + saved["b_dec"], ours, 1e-5)
    read = as_jax(parameters(read_autoencoder(run / "autoencoder")))
    close(sparse.reconstructed(read, sparse.features(read, jnp.asarray(x))), ours, 1e-5)
    assert 0.5 < known["scale"] / np.sqrt((x**2).mean()) < 2  # mean square norm D
    assert known["threshold"] > 0


def test_what_fires_a_feature_is_on_the_page(folder, runs):
    rows = [json.loads(line) for line in (folder / "of-bert/features.jsonl").read_text().splitlines()]
    assert len(rows) == F
    fired = [row for row in rows if row["texts"]]
    assert fired and all(row["density"] > 0 for row in fired)
    for row in fired:
        strongest = [text["values"][text["at"]] for text in row["texts"]]
        assert strongest == sorted(strongest, reverse=True) and strongest[0] > 0
        assert all(text["values"][text["at"]] == max(text["values"]) for text in row["texts"][:1])
    assert any("狐" in "".join(text["tokens"]) for row in fired for text in row["texts"])
    page = (folder / "of-bert/report.html").read_text()
    assert "Features and what fires them" in page and "variance explained" in page
    for name, summary in runs.items():
        assert summary["eval"]["l0"] > 0 and 0 <= summary["eval"]["dead"] <= 1, name


def test_random_weights_are_another_model_of_the_same_architecture(folder, runs):
    summary = assembly.train(small(folder, "bert", "random", steps=1, autoencoder={"random": True}))
    assert summary["eval"]["cross_entropy"] != pytest.approx(runs["bert"]["eval"]["cross_entropy"], abs=1e-4)
    ours, theirs = load(folder / "random").params, load(folder / "bert").params
    assert jax.tree.map(jnp.shape, ours["layers"]) == jax.tree.map(jnp.shape, theirs["layers"])
    q = ours["layers"]["period"]["0"]["attention"]["q"]["kernel"]
    assert not np.allclose(q, theirs["layers"]["period"]["0"]["attention"]["q"]["kernel"])
    assert "of random weights" in (folder / "random/report.html").read_text()


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"init_from": None}, "no --init-from"),
        ({"autoencoder": {"layer": 2}}, "layers 0 to 1"),
        ({"init_from": "gpt"}, "a decoder"),
        ({"export": "x"}, "leave out --export"),
        ({"accumulation": 2}, "cannot be cut"),
    ],
)
def test_what_will_not_do_is_refused(folder, changes: dict[str, Any], said):
    if changes.get("init_from"):
        changes = {"init_from": str(folder / changes["init_from"])}
    with pytest.raises(UserError, match=said):
        assembly.train(small(folder, "bert", "refused", **changes))
    assert not (folder / "refused").exists()


def test_settings_that_cannot_be():
    given: list[tuple[dict[str, Any], str]] = [
        ({"k": 0}, "at least 1"),
        ({"features": 3}, "more than the 3"),
        ({"layer": -1}, "from 0"),
    ]
    for settings, said in given:
        with pytest.raises(UserError, match=said):
            AutoencoderConfig(**settings)


def test_a_page_of_features(folder, runs, tmp_path):
    """Those that are asked for, by number or by what fires in a text, with the control's figures beside."""
    output = str(tmp_path / "page.html")
    found = show(FeaturesConfig(str(folder / "of-bert"), count=5, beside=str(folder / "of-gpt"), output=output))
    page = (tmp_path / "page.html").read_text()
    assert len(found["features"]) == 5 and all(f"id=feature-{number}>" in page for number in found["features"])
    assert "of-gpt</th>" in page and "<script" not in page and "http" not in page.replace("http-equiv", "")
    text = "the lazy dog sleeps 猫在阳光下"
    found = show(FeaturesConfig(str(folder / "of-bert"), text=text, output=output))
    tokens, f_TF = features_of(str(folder / "of-bert"), text)
    assert "".join(tokens).replace(" ", "") == "[CLS]thelazydogsleeps猫在阳光下[SEP]" and not f_TF[0].any()
    assert set(found["features"]) == set(np.flatnonzero(f_TF.any(0)))
    refused = [
        (dict(run=str(folder / "bert")), "has no features.jsonl"),
        (dict(run=str(folder / "of-bert"), numbers=(F,)), f"0 to {F - 1}"),
        (dict(run=str(folder / "of-bert"), text="dog " * 100), "tokens; accepted are 2 to 64"),
    ]
    for settings, said in refused:
        with pytest.raises(UserError, match=said):
            show(FeaturesConfig(**settings, output=output))
