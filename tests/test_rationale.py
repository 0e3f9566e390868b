"""Classes by few words: gates against SciPy and brute force, words of texts, a run that finds the words that tell."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from labelled_words import WORDS, config_for, lines_of, make_runs
from scipy.integrate import quad
from tiny_models import BERT, as_jax, batch_of, close, random_params, strict_and_quick  # noqa: F401

import espalier
from espalier.data.examples import encode_pairs
from espalier.data.train_tokenizer import train_tokenizer
from espalier.errors import UserError
from espalier.models import gates
from espalier.models.config import Execution
from espalier.models.rationale import seen_through, spread, words_of
from espalier.predict.rationale import token_kinds
from espalier.predict.use import use_of
from finetune.tasks.classify.record import ClassifyData
from finetune.tasks.rationale.record import RationaleConfig, SelectionConfig
from finetune.tasks.rationale.task import rationale_objective
from finetune.train import main
from sharding.mesh import MeshConfig, build_mesh, place_batch
from sharding.rules import shard_params

KEY = jax.random.key(0)
EXECUTION = Execution(dtype="float32")


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (2.0, 0.7), (0.8, 3.0)])
def test_probabilities_are_those_of_the_density_and_of_samples(a, b):
    """The density of Kumaraswamy a·b·k^(a-1)·(1-k^a)^(b-1), integrated by SciPy over what is cut to 0 and 1."""

    def density(k):
        return a * b * k ** (a - 1) * (1 - k**a) ** (b - 1)

    shut, wide, half = 0.1 / 1.2, 1.1 / 1.2, 0.6 / 1.2
    shapes = jnp.float32(a), jnp.float32(b)
    parts = {gates.closed: (0, shut), gates.wide_open: (wide, 1), gates.likely_open: (half, 1)}
    for got, (low, high) in ((part(*shapes), limits) for part, limits in parts.items()):
        np.testing.assert_allclose(got, quad(density, low, high)[0], rtol=1e-4)
    uniform = (np.arange(200_000, dtype=np.float32) + 0.5) / 200_000
    z = np.asarray(gates.sample(*shapes, jnp.asarray(uniform)))
    assert z.min() >= 0 and z.max() <= 1
    np.testing.assert_allclose((z == 0).mean(), gates.closed(*shapes), atol=2e-3)
    np.testing.assert_allclose((z == 1).mean(), gates.wide_open(*shapes), atol=2e-3)
    np.testing.assert_allclose((z > 0.5).mean(), gates.likely_open(*shapes), atol=2e-3)
    # The expected number of open gates has the slope of brute force in a.
    step = 1e-2
    slope = jax.grad(lambda a: 1.0 - gates.closed(a, shapes[1]))(shapes[0])
    by_hand = (gates.closed(shapes[0] - step, shapes[1]) - gates.closed(shapes[0] + step, shapes[1])) / (2 * step)
    np.testing.assert_allclose(slope, by_hand, rtol=2e-2)


def test_a_word_has_one_gate_and_special_tokens_none():
    """Chinese characters are words of their own; pieces of an English word follow the first."""
    tokenizer = train_tokenizer(["很好看 abcd", "a b c d 很 好 看"] * 9, "wordpiece", 300, for_masked_lm=True)
    (example,) = encode_pairs(tokenizer, ["很好 dcbd"], None, 16, False, offsets=True)
    tokens = tokenizer.convert_ids_to_tokens([int(index) for index in example.ids])
    ids = np.zeros((1, 12), np.int32)
    ids[0, : len(tokens)] = example.ids
    batch = {
        "input_ids": jnp.asarray(ids),
        "segment_ids": jnp.asarray((np.arange(12) < len(tokens))[None].astype(np.int32)),
    }
    words = words_of(token_kinds(tokenizer, 300), batch)
    pieces = len(tokens) - 4  # [CLS] 很 好 … [SEP]
    assert tokens[1:3] == ["很", "好"] and pieces > 1
    starts = [0, 1, 1, 1, *[0] * (pieces - 1), 0, *[0] * (12 - len(tokens))]
    assert np.asarray(words.starts_BT)[0].tolist() == starts
    z_BT = jnp.arange(12, dtype=jnp.float32)[None] / 100
    gated = np.asarray(spread(words, z_BT))[0, : len(tokens)]
    np.testing.assert_allclose(gated, [1, 0.01, 0.02, *[0.03] * pieces, 1], atol=1e-6)


CONFIG = dataclasses.replace(BERT, labels=("a", "b"), problem_type=None)


def test_what_is_behind_closed_gates_says_nothing_and_the_objective_adds_up_on_a_mesh():
    params = as_jax(random_params(CONFIG, ("sequence_classification", "rationale")))
    params["head"]["price"] = {"multiplier": jnp.float32(0.002)}
    batch = as_jax(batch_of(CONFIG, [[9], [12], [5], [7]] * 2, 12))
    z_BT = jnp.asarray(np.random.default_rng(0).integers(0, 2, (8, 12)), jnp.float32).at[:, 0].set(1)
    other = batch | {"input_ids": jnp.where(z_BT > 0, batch["input_ids"], (batch["input_ids"] + 7) % 200)}
    through = jax.jit(lambda batch: seen_through(CONFIG, params, batch, z_BT, EXECUTION))
    close(through(other), through(batch), 1e-6)

    batch |= {"labels": jnp.arange(8, dtype=jnp.int32) % 2, "example_weights": jnp.ones(8)}
    selection = SelectionConfig(rate=0.3, price=0.5, speed=100.0)
    made = rationale_objective(CONFIG, selection, np.zeros(CONFIG.padded_vocab_size, np.uint8), execution=EXECUTION)

    def loss(params, batch):
        ready, norms = made.prepare(batch, KEY, jnp.int32(0), True)
        return made.loss(params, ready, KEY, norms, True)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, found), gradient = step(params, batch)
    rate, price = found["selected"][0] / found["selected"][1], found["price"][0] / 8
    np.testing.assert_allclose(price, 0.5 * np.exp(0.2), rtol=1e-5)
    np.testing.assert_allclose(value, found["loss"][0] / 8 + price * (rate - 0.3), rtol=1e-5)
    # The multiplier climbs: its gradient, which is descended, is minus what is open above the rate.
    np.testing.assert_allclose(gradient["head"]["price"]["multiplier"], -(rate - 0.3), rtol=1e-4)
    mesh = build_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh):
        again = step(jax.device_put(params, shard_params(params, mesh)), place_batch(jax.device_get(batch), mesh))
    close(again, ((value, found), gradient), 2e-5)


def test_a_run_finds_the_words_that_tell(tmp_path):
    there = make_runs(tmp_path)
    plain = config_for(there, tmp_path / "run", mesh=MeshConfig(1, 1, 1), steps=150, eval_every=150)
    shared: Any = {
        field.name: getattr(plain, field.name) for field in dataclasses.fields(plain) if field.name != "attention"
    }
    data = ClassifyData(train=there.train, validation=there.validation)
    config = RationaleConfig(**shared | {"data": data, "selection": SelectionConfig(rate=0.2, price=0.05, speed=10.0)})
    summary = main(config)
    metrics = summary["metrics"]
    rows = lines_of(tmp_path / "run/predictions.jsonl")
    telling = {word for words in WORDS.values() for word in words}
    found = [{word["text"] for word in row["words"]} for row in rows]
    assert metrics["accuracy"] > 0.9 and 0.05 < metrics["selected"] < 0.5, metrics
    # Of three kinds, one may be told by there being no word of another.
    assert set().union(*found) <= telling and np.mean([bool(words) for words in found]) > 0.6
    assert metrics["accuracy_rest"] < 0.7, metrics
    assert all(row["text"][word["begin"] : word["end"]] == word["text"] for row in rows for word in row["words"])
    page = (tmp_path / "run/report.html").read_text()
    assert "Selected words" in page and "<mark>" in page

    model = espalier.load(tmp_path / "run")
    assert use_of(model).name == "rationale"
    (answer,) = model.rationale([rows[0]["text"]])
    assert (answer["label"], answer["words"]) == (rows[0]["prediction"], rows[0]["words"])
    assert model.classify(rows[0]["text"])[0].keys() == {"label", "probability", "probabilities"}


def test_what_it_does_not_have_is_refused():
    settings: Any
    for settings in ({"examples_per_row": 4}, {"rationale": "why"}, {"class_weights": "balanced"}):
        with pytest.raises(UserError, match="this task selects words by itself"):
            RationaleConfig(data=ClassifyData(**settings))
    with pytest.raises(UserError, match="selection.rate=1.5 must lie between 0 and 1"):
        SelectionConfig(rate=1.5)
