"""`finetune concepts`: the objective against PyTorch, the bottleneck, and a run that learns concepts and uses them."""

import csv
import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from labelled_words import config_for, lines_of, make_runs
from tiny_models import BERT, as_jax, close, random_params, strict_and_quick  # noqa: F401

import espalier
from espalier import saved_config
from espalier.errors import UserError
from espalier.models.config import Execution
from espalier.models.heads import sequence_logits
from espalier.models.transformer import apply
from espalier.predict.use import use_of
from finetune.tasks.concepts.record import ConceptConfig, ConceptData, ConceptSettings, concepts
from finetune.tasks.concepts.task import concept_objective, init_bottleneck
from finetune.train import main
from sharding.mesh import MeshConfig, build_mesh, place_batch
from sharding.rules import shard_params

EXECUTION = Execution(dtype="float32")
KEY = jax.random.key(0)
NAMES = ("warm", "loud", "long")


def made(settings: ConceptSettings):
    config = dataclasses.replace(BERT, labels=NAMES, problem_type="regression")
    params = as_jax(random_params(config, ("sequence_classification",)))
    random = np.random.default_rng(0)
    layer = init_bottleneck(3, 2)
    params["head"]["concept_classes"] = jax.tree.map(
        lambda x: jnp.asarray(random.standard_normal(x.shape), x.dtype), layer
    )
    batch = {
        "input_ids": random.integers(5, 150, (8, 12)).astype(np.int32),
        "segment_ids": np.ones((8, 12), np.int32),
        "positions": np.broadcast_to(np.arange(12, dtype=np.int32), (8, 12)).copy(),
        "token_type_ids": np.zeros((8, 12), np.int32),
        "labels": random.integers(0, 2, 8).astype(np.int32),
        "concepts": random.standard_normal((8, 3)).astype(np.float32),
        "example_weights": np.array([1, 1, 1, 1, 1, 1, 1, 0], np.float32),
    }
    return config, params, batch, concept_objective(config, 2, settings, execution=EXECUTION)


@pytest.mark.parametrize("joint", [False, True])
def test_loss_and_gradients_are_those_of_pytorch(joint):
    settings = ConceptSettings(weight=0.7, joint=joint, sparsity=0.05)
    config, params, batch, objective = made(settings)

    def loss(params, batch):
        ready, norms = objective.prepare(batch, KEY, jnp.int32(0), False)
        return objective.loss(params, ready, KEY, norms, False)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, found), gradient = step(params, batch)
    scores = np.array(sequence_logits(config, params, apply(config, params, batch, execution=EXECUTION),
                                      batch["segment_ids"]))  # fmt: skip
    s = torch.tensor(scores).requires_grad_()
    kernel, bias = (
        torch.tensor(np.array(params["head"]["concept_classes"][n])).requires_grad_() for n in ("kernel", "bias")
    )
    logits = (s if joint else s.detach()) @ kernel + bias
    weights = torch.tensor(batch["example_weights"])
    nats = torch.nn.functional.cross_entropy(logits, torch.tensor(batch["labels"]).long(), reduction="none")
    error = ((s - torch.tensor(batch["concepts"])) ** 2).mean(-1)
    total = (weights * (nats + 0.7 * error)).sum() / 7 + 0.05 * kernel.abs().sum()
    total.backward()
    assert float(value) == pytest.approx(total.item(), rel=1e-5)
    layer = gradient["head"]["concept_classes"]
    np.testing.assert_allclose(layer["kernel"], kernel.grad, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(layer["bias"], bias.grad, rtol=1e-4, atol=1e-6)
    # What reaches the scores: the bias of the layer that makes them gets the sum over the texts.
    out = gradient["head"]["sequence_classification"]["out"]["bias"]
    np.testing.assert_allclose(out, s.grad.sum(0), rtol=1e-4, atol=1e-6)
    assert float(found["concept_error"][0]) == pytest.approx((weights * error).sum().item(), rel=1e-5)

    halves = [
        objective.loss(params, {name: part[at::2] for name, part in batch.items()}, KEY, jnp.float32(7), False)[0]
        for at in (0, 1)
    ]
    assert float(sum(halves)) == pytest.approx(float(value), rel=1e-5)
    mesh = build_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh):
        again = step(jax.device_put(params, shard_params(params, mesh)), place_batch(batch, mesh))
    close(again, ((value, found), gradient), 2e-5)


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """The tests' sentences with a column for each of their kinds: whether they have one of its words."""
    root = tmp_path_factory.mktemp("concepts")
    found = make_runs(root)
    for name in ("train", "validation"):
        rows = lines_of(root / f"{name}.jsonl")
        kinds = sorted({row["label"] for row in rows})
        with open(root / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label", *(f"says {kind}" for kind in kinds)])
            writer.writerows(
                [row["sentence"], row["label"], *(int(row["label"] == kind) for kind in kinds)] for row in rows
            )
        setattr(found, f"{name}_csv", str(root / f"{name}.csv"))
    found.kinds = kinds
    return found


def concept_config(there, run_dir, **changes) -> ConceptConfig:
    plain = config_for(there, run_dir, mesh=MeshConfig(1, 1, 1), steps=120, eval_every=120)
    shared: Any = {
        field.name: getattr(plain, field.name) for field in dataclasses.fields(plain) if field.name != "attention"
    }
    columns = tuple(f"says {kind}" for kind in there.kinds)
    data = ConceptData(train=there.train_csv, validation=there.validation_csv, concepts=columns)
    optimizer = dataclasses.replace(concepts().optimizer, learning_rate=5e-3)
    return ConceptConfig(**shared | {"data": data, "optimizer": optimizer} | changes)


def test_a_run_says_what_it_answers_by(there, tmp_path):
    config = concept_config(there, tmp_path / "run")
    metrics = main(config)["metrics"]
    assert metrics["accuracy"] > 0.9 and metrics["concept_correlation"] > 0.8, metrics
    assert metrics["accuracy_given"] == 1
    model = espalier.load(tmp_path / "run")
    assert use_of(model).name == "concepts" and list(model.config.labels) == list(config.data.concepts)
    rows = lines_of(tmp_path / "run/predictions.jsonl")
    (answer,) = model.concepts(rows[0]["text"])
    assert answer["label"] == rows[0]["prediction"]
    assert {one["concept"]: one["score"] for one in answer["concepts"]} == pytest.approx(rows[0]["concepts"], abs=1e-4)
    # What carried the answer is the concept of its kind; the class follows the concepts, and from them alone.
    first = answer["concepts"][0]
    assert first["concept"] == f"says {answer['label']}" and first["part"] > 0
    layer = json.loads((tmp_path / "run/concepts.json").read_text("utf-8"))
    scores = np.array([next(one["score"] for one in answer["concepts"] if one["concept"] == name)
                       for name in layer["concepts"]])  # fmt: skip
    bias = np.asarray(model.params["head"]["concept_classes"]["bias"])
    logits = scores @ np.array(layer["weights"]) + bias
    chances = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    np.testing.assert_allclose([answer["probabilities"][name] for name in layer["classes"]], chances, rtol=1e-3)
    (other,) = model.concepts(rows[0]["text"], without=list(config.data.concepts))
    even = np.exp(bias) / np.exp(bias).sum()
    np.testing.assert_allclose([other["probabilities"][name] for name in layer["classes"]], even, rtol=1e-3)
    with pytest.raises(UserError, match="without='warm' is no concept of this model; it has says"):
        model.concepts("a", without=["warm"])
    page = (tmp_path / "run/report.html").read_text("utf-8")
    assert "Concepts and classes" in page and "squared error" not in page
    assert f"Classifier with {len(there.kinds)} labels by {len(config.data.concepts)} concepts" in page
    # What the run records beside its settings takes the place of none.
    assert saved_config.read(str(tmp_path / "run"), (ConceptConfig,), "finetune").config.concepts == config.concepts

    from finetune.tasks.concepts.task import measure

    again = measure(model, config.data).metrics
    assert {name: again[name] for name in ("accuracy", "concept_correlation", "accuracy_given")} == pytest.approx(
        {name: metrics[name] for name in ("accuracy", "concept_correlation", "accuracy_given")}, abs=1e-6
    )


def test_a_run_that_pauses_ends_as_one_that_does_not_and_words_are_scored_by_a_model(there, tmp_path):
    (tmp_path / "concepts.txt").write_text("a cat\n\nthe sun 太阳\na cat\n", "utf-8")
    data = ConceptData(
        train=there.train_csv, validation=there.validation_csv, concept_file=str(tmp_path / "concepts.txt")
    )
    shared: Any = {"data": data, "concepts": ConceptSettings(scorer=str(there.encoder)), "steps": 6, "eval_every": 6}
    main(concept_config(there, tmp_path / "whole", **shared))
    main(concept_config(there, tmp_path / "broken", **shared, stop_at=3))
    main(concept_config(there, tmp_path / "broken", **shared))
    whole, broken = (espalier.load(tmp_path / name) for name in ("whole", "broken"))
    jax.tree.map(np.testing.assert_array_equal, whole.params, broken.params)
    assert whole.config.labels == ("a cat", "the sun 太阳")
    # What the scorer says: cosines, with mean 0 and variance 1 over the training file.
    scorer = espalier.load(there.encoder)
    with open(there.train_csv, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    texts, said = (scorer.embed(some) for some in ([row["text"] for row in rows], ["a cat", "the sun 太阳"]))
    cosines = texts @ said.T / np.linalg.norm(texts, axis=1)[:, None] / np.linalg.norm(said, axis=1)[None]
    np.testing.assert_allclose(whole.saved["concept_mean"], cosines.mean(0), rtol=1e-4)
    np.testing.assert_allclose(whole.saved["concept_spread"], cosines.std(0), rtol=1e-3)


def test_what_will_not_do_is_refused(there, tmp_path):
    columns = tuple(f"says {kind}" for kind in there.kinds)
    for changes, said in (
        ({"concepts": (*columns, "plot")}, "has no column 'plot'"),
        ({"concepts": (columns[0], "text")}, "under 'text' is no number"),
        ({"concepts": columns[:1]}, "1 concept; give 2 at least"),
        ({"concepts": ()}, "no concepts given"),
    ):
        config = concept_config(there, tmp_path / "run")
        with pytest.raises(UserError, match=said):
            main(dataclasses.replace(config, data=dataclasses.replace(config.data, **changes)))
    for settings, said in (
        ({"data": ConceptData(concept_file="a.txt")}, "give both --data.concept-file"),
        ({"data": ConceptData(examples_per_row=4)}, "does not have it"),
        ({"data": ConceptData(class_weights="balanced")}, "does not have it"),
    ):
        with pytest.raises(UserError, match=said):
            ConceptConfig(**settings)
    with pytest.raises(UserError, match="give one of them"):
        ConceptData(concepts=("a", "b"), concept_file="c")
