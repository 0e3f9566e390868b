"""Losses on where heads look: what SciPy computes from the tapped probabilities, and runs that learn by them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from labelled_words import WORDS, config_for, lines_of, make_runs, sentences, write_jsonl
from scipy.special import rel_entr
from scipy.stats import entropy as scipy_entropy
from tiny_models import BERT, GPT, MODERN, as_jax, batch_of, close, random_params, strict_and_quick  # noqa: F401

from espalier.data.examples import Example, LabelledBatches, encode_pairs
from espalier.data.train_tokenizer import train_tokenizer
from espalier.errors import UserError
from espalier.models.attention_settings import AttentionTerms, SupervisedAttention
from espalier.models.attention_terms import MARKED, entropy
from espalier.models.config import Execution
from espalier.models.taps import Taps
from espalier.models.transformer import apply
from finetune.tasks.classify import task
from finetune.tasks.classify.marks import spans_of, token_weights
from finetune.tasks.classify.record import ClassifyConfig, ClassifyData
from finetune.tasks.classify.task import classification_objective
from finetune.train import main
from mlm.config import MaskingConfig, PretrainConfig
from mlm.loss import masked_lm_objective
from mlm.masking import Vocabulary
from sharding.mesh import MeshConfig, build_mesh, place_batch
from sharding.rules import shard_params

PROBABILITIES = "attention.probabilities"
EXECUTION = Execution(dtype="float32")
KEY = jax.random.key(0)


def looked(config, params, batch) -> np.ndarray:
    """float64 [L, B, N, T, S]"""
    seen = apply(config, params, batch, execution=EXECUTION, taps=Taps((PROBABILITIES,)))[1]
    return np.asarray(seen[PROBABILITIES], np.float64)


def labelled(config, rows, length, examples) -> dict:
    """A batch in whose examples some tokens are marked; nothing in the first."""
    batch = batch_of(config, rows, length)
    random = np.random.default_rng(1)
    marked = (random.random((len(rows), length)) < 0.4) * (batch["segment_ids"] > 0)
    marked[0, : rows[0][0]] = 0
    shape = (len(rows), examples) if examples > 1 else len(rows)
    weights = np.array([[float(at < len(row)) for at in range(examples)] for row in rows], np.float32).reshape(shape)
    return as_jax(batch | {MARKED: marked.astype(np.float32), "labels": np.zeros(shape, np.int32),
                           "example_weights": weights})  # fmt: skip


@pytest.mark.parametrize(
    ("config", "start"),
    [(dataclasses.replace(BERT, classifier_pooling="cls"), "first"), (MODERN, "mean"), (GPT, "last")],
    ids=["first", "mean", "last"],
)
def test_entropy_and_divergence_are_those_of_scipy(config, start):
    config = dataclasses.replace(config, labels=("a", "b"), problem_type=None)
    if start == "mean":
        config = dataclasses.replace(config, classifier_pooling="mean")
    params = as_jax(random_params(config, ("sequence_classification",)))
    rows = [[7, 5], [12]]
    batch = labelled(config, rows, 16, 2)
    terms = SupervisedAttention(entropy=0.3, supervision=0.7, layers=(1,))
    objective = classification_objective(config, execution=EXECUTION, attention=terms)
    batch, norms = objective.prepare(batch, KEY, jnp.int32(0), False)
    loss, metrics = jax.jit(objective.loss, static_argnums=4)(params, batch, KEY, norms, False)

    p_BNTS = looked(config, params, batch)[1]
    real = np.asarray(batch["segment_ids"]) > 0
    nats_BT = scipy_entropy(p_BNTS, axis=-1).mean(1)
    found = {name: np.asarray(total) / np.asarray(weight) for name, (total, weight) in metrics.items()}
    np.testing.assert_allclose(found["attention_entropy"], nats_BT[real].mean(), rtol=1e-5)

    nats, mass = [], []
    for row, begin, end in ((0, 7, 12), (1, 0, 12)):  # In the first example, nothing is marked.
        from_tokens = {"first": [begin], "last": [end - 1], "mean": range(begin, end)}[start]
        look = p_BNTS[row][:, list(from_tokens)].mean((0, 1))
        marked = np.asarray(batch[MARKED])[row] * (np.arange(16) >= begin) * (np.arange(16) < end)
        nats.append(rel_entr(marked / marked.sum(), np.maximum(look, 1e-12)).sum())
        mass.append(look[marked > 0].sum())
    np.testing.assert_allclose(found["rationale_kl"], np.mean(nats), rtol=1e-5)
    np.testing.assert_allclose(found["rationale_mass"], np.mean(mass), rtol=1e-5)
    added = 0.3 * found["attention_entropy"] + 0.7 * found["rationale_kl"]
    np.testing.assert_allclose(loss, found["loss"] + added, rtol=1e-5)


def test_masked_lm_pays_for_the_entropy_and_a_query_that_sees_nothing_passes_no_gradient():
    params = as_jax(random_params(BERT, ("masked_lm",)))
    batch = as_jax(batch_of(BERT, [[7, 5], [9]], 16))

    def mask(batch, key, rate, masking, vocabulary):
        places = jnp.tile(jnp.array([[1, 4]], jnp.int32), (2, 1))
        return batch | {"masked_positions": places, "masked_labels": places, "masked_weights": jnp.ones((2, 2))}

    def value(terms):
        made = masked_lm_objective(
            BERT,
            MaskingConfig(),
            Vocabulary(4, np.ones(200, bool), np.zeros(200, np.uint8)),
            rate=lambda step, train: 0.15,
            execution=EXECUTION,
            mask=mask,
            attention=terms,
        )
        ready, norms = made.prepare(batch, KEY, jnp.int32(0), False)

        def loss(p):
            return made.loss(p, ready, KEY, norms, False)

        return jax.jit(jax.value_and_grad(loss, has_aux=True) if terms else lambda p: (loss(p), None))(params)

    (plain, metrics), _ = value(None)
    assert metrics.keys() == {"loss", "accuracy"}
    (loss, metrics), gradient = value(AttentionTerms(entropy=-0.5))
    nats = scipy_entropy(looked(BERT, params, batch), axis=-1).mean((0, 2))[np.asarray(batch["segment_ids"]) > 0].mean()
    np.testing.assert_allclose(loss, plain - 0.5 * nats, rtol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    # Of a head that looks at one token alone, too.
    alone = jnp.zeros((1, 1, 1, 3, 3)).at[..., 1].set(1)
    slope = jax.grad(lambda p: entropy(p, jnp.ones((1, 3), jnp.int32))[0])(alone)
    assert np.isfinite(slope).all()


def test_it_is_the_same_on_a_mesh_in_a_loop_and_in_rows_of_several_examples():
    config = dataclasses.replace(MODERN, labels=("a", "b"), classifier_pooling="mean", vocab_size=256)
    params = as_jax(random_params(config, ("sequence_classification",)))
    random = np.random.default_rng(0)
    examples = []
    for number in range(8):
        size = int(random.integers(4, 9))
        marked = {MARKED: (random.random(size) < 0.4).astype(np.float32)}
        examples.append(Example(random.integers(5, 200, size), np.zeros(size), None, {"labels": number % 2}, marked))
    terms = SupervisedAttention(entropy=0.3, supervision=0.7, layers=(0, 3))

    def value(per_row, execution=EXECUTION, mesh=None):
        batch = LabelledBatches(examples, 8, pad_id=0, max_length=16, examples_per_row=per_row).batch(0)
        made = classification_objective(config, execution=execution, attention=terms)

        def loss(params, batch):
            ready, norms = made.prepare(batch, KEY, jnp.int32(0), False)
            return made.loss(params, ready, KEY, norms, False)

        step = jax.jit(jax.value_and_grad(loss, has_aux=True))
        if mesh is None:
            (total, metrics), gradient = step(params, as_jax(batch))
        else:
            with jax.set_mesh(mesh):
                laid = jax.device_put(params, shard_params(params, mesh))
                (total, metrics), gradient = step(laid, place_batch(batch, mesh))
        return total, {name: metrics[name] for name in ("attention_entropy", "rationale_kl")}, gradient

    expected = value(1)
    close(value(2), expected)
    close(value(1, Execution(dtype="float32", scan_layers=True)), expected)
    close(value(1, mesh=build_mesh(MeshConfig(2, 2, 2))), expected)


def test_nothing_of_it_is_in_the_program_of_a_run_without(monkeypatch):
    config = dataclasses.replace(MODERN, labels=("a", "b"))
    params, batch = as_jax(random_params(config, ("sequence_classification",))), labelled(config, [[7], [9]], 16, 1)

    def program() -> str:
        made = classification_objective(config, execution=EXECUTION)
        ready, norms = made.prepare(batch, KEY, jnp.int32(0), True)
        return jax.jit(made.loss, static_argnums=4).lower(params, ready, KEY, norms, True).as_text()

    usual = program()
    monkeypatch.setattr(
        task,
        "states",
        lambda terms, model, params, batch, execution, key: (
            apply(model, params, batch, execution=execution, key=key),
            None,
        ),
    )
    assert program() == usual


def test_marked_words_become_weights_of_tokens():
    assert spans_of(["part"], "a part of art, apart", "") == [(2, 6)]
    assert spans_of('["好看", [0, 2]]', "电影很好看，好看", "") == [(3, 5), (6, 8), (0, 2)]
    assert spans_of("", "a", "") == spans_of(None, "a", "") == spans_of([], "a", "") == []
    texts = ["这部电影很好看", "a moving film"]
    tokenizer = train_tokenizer(texts * 20, "wordpiece", 300, for_masked_lm=True)
    chinese, english = encode_pairs(tokenizer, texts, None, 16, False, offsets=True)

    def shown(example, spans):
        tokens = tokenizer.convert_ids_to_tokens([int(token) for token in example.ids])
        return [token for token, weight in zip(tokens, token_weights(example, spans), strict=True) if weight]

    assert "".join(shown(chinese, spans_of(["好看"], texts[0], ""))).replace("##", "") == "好看"
    assert "".join(shown(english, spans_of(["moving"], texts[1], ""))).replace("##", "") == "moving"
    for cell, words in (
        ('{"a": 1}', "row 3: marked words are a JSON array of words"),
        ("[", "row 3: marked words are a JSON array"),
        (["moving", "dull"], "row 3: 'dull' is marked and is not in the text"),
        ([[2, 99]], "row 3: characters 2 to 99 are marked of a text that has 13"),
        ([7], "row 3: 7 marks nothing"),
    ):
        with pytest.raises(UserError) as error:
            spans_of(cell, texts[1], "row 3")
        assert str(error.value).startswith(words)


def marked_rows(count: int) -> list[dict]:
    words = {word for kind in WORDS.values() for word in kind}
    return [row | {"why": [w for w in row["sentence"].split() if w in words]} for row in sentences(count)]


def test_a_run_learns_to_look_at_what_is_marked_and_goes_on_after_a_break(tmp_path):
    there = make_runs(tmp_path)
    files: Any = {name: write_jsonl(tmp_path / f"{name}-marked.jsonl", marked_rows(n)) for name, n in
             (("train", 48), ("validation", 20))}  # fmt: skip
    data = ClassifyData(**files, rationale="why")

    learnt = SupervisedAttention(supervision=2.0)

    def run(name, **changes):
        return main(config_for(there, tmp_path / name, data=data, mesh=MeshConfig(1, 1, 1), **changes))

    run("measured")
    run("learnt", attention=learnt)
    measured, now = (lines_of(tmp_path / name / "metrics.jsonl")[-1] for name in ("measured", "learnt"))
    assert now["eval/rationale_kl"] < 0.7 * measured["eval/rationale_kl"]
    assert now["eval/rationale_mass"] > measured["eval/rationale_mass"] and "eval/attention_entropy" in now
    assert not run("parts", attention=learnt, stop_at=15)["finished"]
    run("parts", attention=learnt)
    assert (tmp_path / "parts/predictions.jsonl").read_bytes() == (tmp_path / "learnt/predictions.jsonl").read_bytes()

    for changes, words in (
        (dict(attention=SupervisedAttention(entropy=0.1, layers=(3,))), "attention.layers: the model has no layer 3"),
        (dict(attention=SupervisedAttention(layers=(0,)), data=ClassifyData(there.train, there.validation)),
         "attention.layers: nothing is asked of the heads"),
        (dict(data=ClassifyData(**files, rationale="because")), "has no column 'because' of marked words"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            main(config_for(there, tmp_path / "refused", **{"data": data, **changes}))
        assert not (tmp_path / "refused").exists()
    with pytest.raises(UserError, match="needs marked words: name their column with --data.rationale"):
        ClassifyConfig(attention=SupervisedAttention(supervision=1.0))
    with pytest.raises(UserError, match="each once"):
        PretrainConfig(attention=AttentionTerms(entropy=1.0, layers=(1, 1)))
