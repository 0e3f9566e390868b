"""Fine-tuning: what is taken from the checkpoint, what is learnt, what is measured and written, what is refused."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from labelled_words import DECODER, ENCODER, TEXTS, WORDS, config_for, lines_of, make_runs, sentences, write_jsonl
from tiny_runs import write_run

from espalier.data.examples import Example, LabelledBatches
from espalier.data.tokenizer import save_tokenizer
from espalier.data.train_tokenizer import train_tokenizer
from espalier.errors import UserError
from espalier.models.config import Execution, ModelConfig
from espalier.models.pretrained import load_weights
from espalier.models.transformer import init_params
from espalier.training.restore import read_config, restore_params
from espalier.training.run import RunDirectory
from espalier.training.start import find_origin
from finetune.config import FinetuneOptimizer
from finetune.presets import PRESETS
from finetune.task import resolved
from finetune.tasks.classify import metrics as classify_metrics
from finetune.tasks.classify.record import ClassifyConfig, ClassifyData
from finetune.tasks.classify.task import classification_objective
from finetune.train import main
from sharding.mesh import MeshConfig, build_mesh
from sharding.rules import shard_params


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    return make_runs(tmp_path_factory.mktemp("finetune"))


def test_an_encoder_learns_and_a_resumed_run_ends_alike(there, tmp_path, capsys):
    summary = main(config_for(there, tmp_path / "whole"))
    # 7 of the 20 are birds, the first of the labels that the training file has equally often.
    perfect = dict.fromkeys(("accuracy", "f1", "macro_f1", "matthews"), 1.0)
    metrics = summary["metrics"]
    assert {name: metrics[name] for name in (*perfect, "majority")} == perfect | {"majority": 7 / 20}
    assert all(metrics[f"{name}_interval"] == [1.0, 1.0] for name in perfect) and 0 < metrics["calibration_error"] < 1
    out = " ".join(capsys.readouterr().out.split())
    for words in (
        f"training {there.train}: 48 examples, column 'sentence' validation {there.validation}: 20 examples",
        "labels 3 classes in 'label': bird 16 (33.3 %), fruit 16 (33.3 %), tool 16 (33.3 %)",
        "batch 16 rows of up to 16 tokens",
        "steps 30 = 3.36 k tokens, 10 epochs",
        "result accuracy 100.0 % (majority class 35.0 %), F1 100.0 %",
        f"report {tmp_path}/whole/report.html",
    ):
        assert words in out, words
    assert "next" not in out and "warning" not in out
    whole = tmp_path / "whole"
    for name in (
        "config.json",
        "tokenizer/tokenizer.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints/30",
        "report.html",
    ):
        assert (whole / name).exists(), name
    config = json.loads((whole / "config.json").read_text())
    assert config["labels"] == ["bird", "fruit", "tool"] and config["task"] == "sequence_classification"
    assert config["model"]["hidden_dropout"] == config["model"]["attention_dropout"] == 0.1
    assert json.loads((whole / "summary.json").read_text()).items() >= summary.items()

    rows, given = lines_of(whole / "predictions.jsonl"), lines_of(there.root / "validation.jsonl")
    assert [(row["text"], row["label"]) for row in rows] == [(row["sentence"], row["label"]) for row in given]
    assert all(row["prediction"] == row["label"] and 1 / 3 < row["probability"] <= 1 for row in rows)
    confusion = json.loads((whole / "confusion.json").read_text())
    assert confusion == {"labels": ["bird", "fruit", "tool"], "matrix": [[7, 0, 0], [0, 7, 0], [0, 0, 6]]}

    # The pretraining run may be gone once the fine-tuning has a checkpoint of its own.
    parts = tmp_path / "parts"
    moved = shutil.copytree(there.encoder, tmp_path / "encoder")
    assert not main(config_for(there, parts, moved, stop_at=15))["finished"]
    shutil.rmtree(moved)
    assert main(config_for(there, parts, moved))["finished"]
    assert (parts / "predictions.jsonl").read_bytes() == (whole / "predictions.jsonl").read_bytes()


def test_a_decoder_reads_both_texts_of_a_pair(there, tmp_path, capsys):
    """The label hangs on the second text alone, and stands in a column of another name."""
    random = np.random.default_rng(0)
    for name, count in (("train", 96), ("validation", 40)):
        kinds = random.choice(["fruit", "bird"], count)
        rows = [f"{random.choice(WORDS['tool'])}\t{random.choice(WORDS[kind])}\t{kind}\n" for kind in kinds]
        (tmp_path / f"{name}.tsv").write_text("one\ttwo\tkind\n" + "".join(rows))
    files = {name: str(tmp_path / f"{name}.tsv") for name in ("train", "validation")}
    data = ClassifyData(**files, text=("one", "two"), label="kind")
    changes = dict(data=data, dropout=0.0, mesh=MeshConfig(1, 1, 1))
    summary = main(config_for(there, tmp_path / "run", there.decoder, **changes))
    assert summary["metrics"]["accuracy"] == 1.0
    out = capsys.readouterr().out
    assert "columns 'one' and 'two'" in out and "2 classes in 'kind': " in out
    row = lines_of(tmp_path / "run" / "predictions.jsonl")[0]
    assert row.keys() == {"text", "text_b", "label", "prediction", "probability"}


def test_scratch_takes_architecture_and_tokenizer_but_no_weights(there, tmp_path):
    still = FinetuneOptimizer(learning_rate=0.0)
    main(config_for(there, tmp_path / "run", scratch=True, steps=1, optimizer=still, mesh=MeshConfig(1, 1, 1)))
    pretrained, scratch = restore_params(there.encoder), restore_params(tmp_path / "run")
    assert read_config(tmp_path / "run")["model"]["hidden_size"] == ENCODER.hidden_size
    ours, theirs = (params["embeddings"]["token"]["embedding"] for params in (scratch, pretrained))
    assert ours.shape == theirs.shape and abs(np.corrcoef(ours.ravel(), theirs.ravel())[0, 1]) < 0.1


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_the_trunk_is_that_of_the_checkpoint_and_the_head_is_new(there, kind):
    folder = getattr(there, kind)
    abstract, load = loader(folder, there.root / "none")
    params, saved = load(abstract), restore_params(folder)
    head = params.pop("head")
    saved.pop("head", None)
    assert head.keys() == {"sequence_classification"}
    same = jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), b), params, saved)
    assert all(jax.tree.leaves(same)) and jax.tree.leaves(same)
    for leaf, wanted in zip(jax.tree.leaves(params | {"head": head}), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


def test_parameters_that_do_not_fit_are_listed(there, tmp_path):
    folder = write_run(tmp_path / "odd", ENCODER, TEXTS, extra={"final_norm": {"scale": jnp.ones(32)}})
    abstract, load = loader(folder, tmp_path / "none")
    with pytest.raises(UserError, match="final_norm/scale is not expected"):
        load(abstract)


def loader(folder, run_dir):
    """(abstract parameters with a head of three classes, the function that loads them)."""
    origin = find_origin(ClassifyConfig(init_from=str(folder)), RunDirectory(run_dir))
    model = dataclasses.replace(ModelConfig.from_dict(origin.config["model"]), labels=("a", "b", "c"))
    mesh = build_mesh(MeshConfig(2, 2, 2))

    def init(key):
        return init_params(model, key, heads=("sequence_classification",))

    shapes = jax.eval_shape(init, jax.random.key(0))
    abstract = jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shard_params(shapes, mesh)
    )
    return abstract, load_weights(origin, model, "sequence_classification", init, 0)


@pytest.mark.parametrize("kind", ["cls", "mean", "late", "decoder"])
def test_rows_of_several_examples_give_the_loss_of_rows_of_one(kind):
    """And its gradient; micro-batches of such rows add up."""
    model = dataclasses.replace(DECODER if kind == "decoder" else ENCODER, labels=("a", "b", "c"))
    if kind != "decoder":
        model = dataclasses.replace(model, classifier_pooling=kind)
    params = init_params(model, jax.random.key(0), heads=("sequence_classification",))
    params = jax.tree.map(lambda x: x + 0.05 * np.sin(np.arange(x.size, dtype=np.float32).reshape(x.shape)), params)
    random = np.random.default_rng(0)
    lengths = random.integers(2, 16, 22)
    drawn = [
        Example(random.integers(0, 300, size).tolist(), [0] * size, of_row={"labels": number % 3})
        for number, size in enumerate(lengths)
    ]
    objective = classification_objective(model, execution=Execution())

    @jax.jit
    def run(batch):
        batch, norms = objective.prepare(batch, jax.random.key(0), 0, False)
        differentiated = jax.value_and_grad(
            lambda p: objective.loss(p, batch, jax.random.key(0), norms, False), has_aux=True
        )
        (loss, sums), grads = differentiated(params)
        return loss, sums, grads

    alone, packed = (
        LabelledBatches(drawn, 16, 3, pad_id=0, max_length=16, examples_per_row=per_row).fixed()[1]
        for per_row in (1, 4)
    )
    assert alone["example_weights"].sum() == packed["example_weights"].sum() == 6
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), run(packed), run(alone))


def test_the_loss_is_the_weighted_mean_and_micro_batches_add_up():
    model = dataclasses.replace(ENCODER, labels=("a", "b", "c"))
    params = init_params(model, jax.random.key(0), heads=("sequence_classification",))
    # Away from zero, so that the examples' losses differ.
    params = jax.tree.map(lambda x: x + 0.05 * np.sin(np.arange(x.size, dtype=np.float32).reshape(x.shape)), params)
    random = np.random.default_rng(0)
    lengths = np.array([3, 8, 5, 3, 8, 4])
    segments = (np.arange(8) < lengths[:, None]).astype(np.int32)
    batch = {
        "input_ids": random.integers(0, 300, (6, 8)).astype(np.int32),
        "segment_ids": segments,
        "positions": np.arange(8, dtype=np.int32) * segments,
        "labels": np.array([0, 2, 1, 1, 0, 2], np.int32),
        "example_weights": np.array([1, 1, 0, 1, 1, 0], np.float32),
    }
    objective = classification_objective(model, execution=Execution())
    prepared, norms = objective.prepare(batch, jax.random.key(0), 0, False)

    @jax.jit
    def run(part):
        differentiated = jax.value_and_grad(
            lambda p: objective.loss(p, part, jax.random.key(0), norms, False), has_aux=True
        )
        (loss, sums), grads = differentiated(params)
        return loss, sums, grads

    alone = jax.jit(lambda one: objective.loss(params, one, jax.random.key(0), 1.0, False)[0])

    def of_row(row):
        """Probabilities by themselves: one row, no padding."""
        one = {name: value[row : row + 1] for name, value in batch.items()}
        for name in ("input_ids", "segment_ids", "positions"):
            one[name] = one[name][:, : lengths[row]]
        one["example_weights"] = np.ones(1, np.float32)
        return float(alone(one))

    expected = np.mean([of_row(row) for row in (0, 1, 3, 4)])
    loss, sums, grads = run(prepared)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert sums["loss"][1] == sums["accuracy"][1] == 4

    halves = [run({name: value[start::2] for name, value in prepared.items()}) for start in (0, 1)]
    together = jax.tree.map(jnp.add, *halves)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), together, (loss, sums, grads))


def test_metrics_are_those_of_the_textbooks():
    # 50 true positives, 10 false positives, 5 false negatives, 35 true negatives
    labels = np.repeat([1, 0, 1, 0], [50, 10, 5, 35])
    predictions = np.repeat([1, 1, 0, 0], [50, 10, 5, 35])
    f1, other = 100 / 115, 70 / 85
    matthews = (50 * 35 - 10 * 5) / math.sqrt(60 * 55 * 45 * 40)
    found = classify_metrics.metrics(labels, predictions, 2)
    assert found == pytest.approx({"accuracy": 0.85, "f1": f1, "macro_f1": (f1 + other) / 2, "matthews": matthews})

    # Three classes, the last never predicted and the second never right: F1 is 2/4, 0, 0.
    found = classify_metrics.metrics(np.array([0, 1, 2]), np.array([0, 0, 1]), 3)
    assert found["f1"] == found["macro_f1"] == pytest.approx((2 / 3) / 3)
    confusion = classify_metrics.confusion(np.array([0, 1, 2]), np.array([0, 0, 1]), ["a", "b", "c"])
    assert confusion["matrix"] == [[1, 0, 0], [1, 0, 0], [0, 1, 0]]
    assert classify_metrics.metrics(np.array([1, 1]), np.array([1, 1]), 3)["matthews"] == 0.0


def test_the_majority_is_that_of_the_training_labels():
    """Label 2 is the most frequent where it is learnt from, and 1 of 5 where it is measured."""
    assert classify_metrics.majority_accuracy([2, 0, 2, 1], np.array([0, 1, 2, 0, 0])) == 0.2
    # Of equals the first.
    assert classify_metrics.majority_accuracy([1, 0, 1, 0], np.array([0, 1, 1, 1])) == 0.25


def test_one_class_for_all_is_warned_of():
    warning = classify_metrics.one_class(np.array([0, 1, 1]), np.array([1, 1, 1]), ["negativ", "好评"])
    assert (
        warning and warning.startswith("warning: every validation example is taken for '好评'") and "\n" not in warning
    )
    assert classify_metrics.one_class(np.array([0, 1]), np.array([1, 0]), ["a", "b"]) is None
    # Where all are of one class, to say so of all is right.
    assert classify_metrics.one_class(np.array([1, 1]), np.array([1, 1]), ["a", "b"]) is None


def test_defaults_follow_data_and_model():
    config = PRESETS["classify"]()
    small, large = resolved(config, 4000, 192), resolved(config, 4000, 1024)
    assert small.steps == 3 * 125 and small.eval_every == 125
    assert [resolved(config, examples, 192).steps for examples in (2, 96, 1001)] == [200] * 3
    asked = dataclasses.replace(PRESETS["classify-debug"](), epochs=0.5)
    assert resolved(asked, 320, 192).steps == 20 and resolved(resolved(asked, 320, 192), 320, 192).steps == 20
    assert small.optimizer.learning_rate == pytest.approx(2e-4) and large.optimizer.learning_rate < 5e-5
    assert resolved(config, 4000, 64).optimizer.learning_rate == 3e-4
    asked = dataclasses.replace(config, steps=7, eval_every=3, optimizer=FinetuneOptimizer(learning_rate=1e-3))
    assert resolved(asked, 1000, 192) == asked


BAD = {
    "no init_from": (dict(init_from=None), "no --init-from given"),
    "no checkpoint": (dict(init_from="nowhere"), "no checkpoint in .*nowhere"),
    "no training file": (dict(data=dict(train=None)), "no --data.train FILE given"),
    "missing file": (dict(data=dict(validation="gone.tsv")), "no file gone.tsv"),
    "unseen label": (dict(validation=[{"sentence": "a", "label": "mineral"}]), "no example of: 'mineral'; known are"),
    "one label": (dict(train=[{"sentence": "a", "label": "bird"}]), "every example has the label 'bird'"),
    "no labels": (dict(train=[{"sentence": "a"}]), "no column of labels .*there are 'sentence'"),
    "empty label": (dict(train=[{"sentence": "a", "label": ""}]), "an empty label, the first is example 1"),
    "pairs and singles": (
        dict(validation=[{"sentence1": "a", "sentence2": "b", "label": "bird"}]), "has pairs of texts and the other"
    ),
    "wrong column": (dict(data=dict(text=("review",))), "no column 'review'.*'sentence'"),
    "infinite rate": (dict(optimizer=FinetuneOptimizer(warmup=99)), "longer than the run"),
    "too long": (dict(data=dict(max_length=99)), "exceeds the model's 16 learned positions"),
    "batch": (dict(batch_size=6), "not divisible"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused_leaves_nothing_behind(there, tmp_path, case):
    changes, words = BAD[case]
    changes = dict(changes)
    files = {
        name: write_jsonl(tmp_path / f"{name}.jsonl", changes.pop(name))
        for name in ("train", "validation")
        if name in changes
    }
    settings = {"train": there.train, "validation": there.validation} | files | changes.pop("data", {})
    config = dataclasses.replace(config_for(there, tmp_path / "run"), data=ClassifyData(**settings), **changes)
    with pytest.raises(UserError, match=words) as error:
        main(config)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_run_starts_from_a_classifier_with_other_labels(there, tmp_path, capsys):
    """As RTE from MNLI: the stack is that of the other task and the head is new; equal labels keep the head."""
    alone = dict(mesh=MeshConfig(1, 1, 1))
    model = dataclasses.replace(ENCODER, classifier_pooling="cls")  # which transformers has
    encoder = write_run(tmp_path / "encoder", model, [row["sentence"] for row in sentences(60)])
    main(config_for(there, tmp_path / "three", encoder, steps=2, export=str(tmp_path / "exported"), **alone))
    rows = [row | {"label": "是" if row["label"] == "bird" else "不是"} for row in sentences(24)]
    path = write_jsonl(tmp_path / "two.jsonl", rows)
    data = ClassifyData(train=path, validation=path)
    still = dict(steps=1, optimizer=FinetuneOptimizer(learning_rate=0.0), **alone)
    before = restore_params(tmp_path / "three")
    for name, origin in (("run", tmp_path / "three"), ("hub", f"hf:{tmp_path / 'exported'}")):
        capsys.readouterr()
        main(config_for(there, tmp_path / name, origin, data=data, **still))
        said = " ".join(capsys.readouterr().out.split())
        assert "is for the labels bird, fruit, tool: a new one begins at random" in said
        after = restore_params(tmp_path / name)
        assert after["head"]["sequence_classification"]["out"]["kernel"].shape == (32, 2)
        jax.tree.map(np.testing.assert_array_equal, after["layers"], before["layers"])
        size = read_config(tmp_path / name)["model"]["vocab_size"]
        ours, theirs = (params["embeddings"]["token"]["embedding"][:size] for params in (after, before))
        np.testing.assert_array_equal(ours, theirs)
        assert read_config(tmp_path / name)["labels"] == ["不是", "是"]
    main(config_for(there, tmp_path / "again", tmp_path / "three", **still))
    assert "begins at random" not in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, restore_params(tmp_path / "again"), before)


def test_another_tokenizer_beside_the_checkpoint_is_refused(there, tmp_path):
    folder = shutil.copytree(there.encoder, tmp_path / "encoder")
    size = read_config(folder)["model"]["vocab_size"]
    save_tokenizer(train_tokenizer(["something else entirely"] * 9, "wordpiece", 300), folder / "tokenizer")
    with pytest.raises(UserError, match=rf"tokenizer has \d+ tokens, not the {size}"):
        main(config_for(there, tmp_path / "run", folder))
    # As many tokens, but others.
    path = there.encoder / "tokenizer" / "tokenizer.json"
    (folder / "tokenizer" / "tokenizer.json").write_text(path.read_text().replace('"heron"', '"stork"'))
    with pytest.raises(UserError, match="other tokens"):
        main(config_for(there, tmp_path / "run", folder))
    assert not (tmp_path / "run").exists()


def test_settings_that_cannot_be_meant():
    for changes, words in (
        (dict(epochs=0), "epochs=0"),
        (dict(dropout=1.0), "dropout=1.0"),
        (dict(init_from="x", init_optimizer=True), "init_optimizer"),
        (dict(steps=0), "steps=0"),
    ):
        with pytest.raises(UserError, match=words):
            ClassifyConfig(**changes)


def test_the_command_line_says_it_in_one_line(run_cli, tmp_path):
    arguments = ("classify", "--init-from", "nowhere", "--data.train", "F", "--data.validation", "F")
    done = run_cli("finetune.train", *arguments, code=2)
    assert done.stderr.startswith("error: no checkpoint in ") and done.stderr.count("\n") == 1
    assert done.stdout == "finetune classify: loading JAX …\n" and list(tmp_path.iterdir()) == []
