"""ELECTRA: a step against both classes of transformers, the draw against its softmax, a run from text to export."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.numpy import load_file
from tiny_models import random_params

import finetune.train
import mlm.config
import mlm.presets
import mlm.pretrain
from espalier.commands.convert import ExportConfig, export_model
from espalier.errors import UserError
from espalier.loading import load
from espalier.models.families.electra import ELECTRA_SMALL
from espalier.models.hub import Export, save_pretrained
from espalier.models.pretrained import completed
from espalier.models.vocabulary import drawn_tokens
from espalier.models.weight_map import param_shapes
from espalier.pretraining.objective import Setup
from espalier.training.restore import restore_params
from finetune.tasks.classify import record as classification
from mlm.electra.loss import generated, replaced
from mlm.electra.record import NAME, build, generator_of, init_params

SIZES = dict(
    **dict(vocab_size=12, embedding_size=24, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    intermediate_size=48,
    max_position_embeddings=32,
    hidden_dropout=0.0,
    attention_dropout=0.0,
)
CONFIG = dataclasses.replace(
    mlm.presets.electra_demo(),
    model=dataclasses.replace(ELECTRA_SMALL, **SIZES),
    generator=mlm.config.GeneratorConfig(size=0.5),
    masking=mlm.config.MaskingConfig(rate=0.4, mask_fraction=0.85, random_fraction=0.0),
    execution=dataclasses.replace(mlm.presets.electra_demo().execution, dtype="float32", scan_layers=False),
)
GENERATOR = generator_of(CONFIG.model, CONFIG.generator)
LENGTHS = (16, 12, 9, 5)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Tiny programs run for microseconds and compile for seconds."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def both() -> dict:
    """Random parameters of both models, biases and scales too; the generator's without what they have in common."""
    generator = random_params(GENERATOR, ("masked_lm",), seed=1)
    generator["embeddings"] = {"project": generator["embeddings"]["project"]}
    return {"discriminator": random_params(CONFIG.model, (NAME,)), "generator": generator}


def rows() -> dict:
    """Rows of one document each, of these lengths."""
    present = (np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]).astype(np.int32)
    ids = np.random.default_rng(0).integers(5, 12, present.shape).astype(np.int32) * present
    positions = np.broadcast_to(np.arange(max(LENGTHS), dtype=np.int32), present.shape)
    return {"input_ids": ids, "segment_ids": present, "positions": positions}


def test_one_step_equals_the_classes_of_transformers(tmp_path):
    """Loss and gradients of everything, the embeddings common to both, with the same tokens drawn."""
    params, batch = both(), rows()
    objective = build(Setup(CONFIG, CONFIG.model, None))
    prepared, norms = objective.prepare(batch, jax.random.key(3), 0, True)

    def step(params):
        return objective.loss(params, prepared, jax.random.key(4), norms, True)

    (loss, sums), gradient = jax.jit(jax.value_and_grad(step, has_aux=True))(params)
    drawn_BM = generated(GENERATOR, params, prepared, None, CONFIG.execution)[2]
    corrupted = np.asarray(replaced(prepared, drawn_BM))
    at, used = np.asarray(prepared["masked_positions"]), np.asarray(prepared["masked_weights"]) > 0
    hidden = np.zeros_like(batch["input_ids"], bool)
    for row in range(len(hidden)):
        hidden[row, at[row][used[row]]] = True
    same = corrupted == batch["input_ids"]
    assert same[~hidden].all() and same[hidden].any() and not same[hidden].all()
    assert float(sums["replaced"][0]) == (~same).sum()

    def write(folder, params):
        whole = completed(params["generator"], params["discriminator"], param_shapes(GENERATOR, "masked_lm"))
        beside = {"generator": Export(GENERATOR, whole, "masked_lm")}
        save_pretrained(folder, CONFIG.model, params["discriminator"], head=NAME, beside=beside)

    write(tmp_path / "params", params)
    write(tmp_path / "gradient", jax.device_get(gradient))
    discriminator = hf.ElectraForPreTraining.from_pretrained(tmp_path / "params").train()
    generator = hf.ElectraForMaskedLM.from_pretrained(tmp_path / "params" / "generator").train()
    generator.electra.embeddings = discriminator.electra.embeddings
    generator.generator_lm_head.weight = generator.electra.embeddings.word_embeddings.weight

    def tensor(array):
        return torch.from_numpy(np.array(array, np.int64))

    attention = tensor(batch["segment_ids"])
    labels = tensor(np.where(hidden, batch["input_ids"], -100))
    nats = generator(tensor(prepared["input_ids"]), attention_mask=attention, labels=labels).loss
    told = discriminator(tensor(corrupted), attention_mask=attention, labels=tensor(~same)).loss
    (nats + 50 * told).backward()
    nats, told = nats.item(), told.item()
    assert float(loss) == pytest.approx(nats + 50 * told, rel=1e-5)
    for name, expected in (("generator_loss", nats), ("detection_loss", told)):
        assert float(sums[name][0] / sums[name][1]) == pytest.approx(expected, rel=1e-5)
    for folder, model in (("", discriminator), ("generator", generator)):
        ours = load_file(tmp_path / "gradient" / folder / "model.safetensors")
        theirs = {name: one.grad.numpy() for name, one in model.named_parameters() if one.grad is not None}
        assert len(theirs) > 30 and theirs.keys() <= ours.keys()
        for name, expected in theirs.items():
            scale = max(1e-3, np.abs(expected).max())
            np.testing.assert_allclose(ours[name] / scale, expected / scale, atol=1e-4, rtol=0, err_msg=name)


def test_nothing_of_the_detection_reaches_the_generator():
    """Its own parameters have the gradient of masked LM alone, whatever the weight."""
    batch, params = rows(), both()

    def gradient(weight):
        objective = build(Setup(dataclasses.replace(CONFIG, detection_weight=weight), CONFIG.model, None))
        prepared, norms = objective.prepare(batch, jax.random.key(3), 0, True)
        loss = jax.jit(jax.grad(lambda params: objective.loss(params, prepared, jax.random.key(4), norms, True)[0]))
        return jax.device_get(loss(params))

    found = [gradient(weight) for weight in (1e-30, 1e3)]
    jax.tree.map(np.testing.assert_array_equal, found[0]["generator"], found[1]["generator"])
    assert (
        np.abs(found[1]["discriminator"]["embeddings"]["token"]["embedding"]).max()
        > 10 * np.abs(found[0]["discriminator"]["embeddings"]["token"]["embedding"]).max()
    )


def test_tokens_are_drawn_from_the_softmax():
    """20,000 draws of a vocabulary of 5, three rows of padding behind it; in chunks and by rows the same."""
    rng = np.random.default_rng(0)
    features, table, bias = rng.normal(size=(2, 10_000, 3)), rng.normal(size=(8, 3)), rng.normal(size=8)
    features[:] = features[:, :1]
    arrays = [array.astype(np.float32) for array in (features, table, bias)]
    keys = jax.random.split(jax.random.key(1), 2)
    found = np.asarray(drawn_tokens(*arrays, keys, vocab_size=5, softcap=2.0))
    scores = features[:, 0] @ table.T + bias
    p_BV = np.exp(2 * np.tanh(scores / 2))[:, :5]
    p_BV /= p_BV.sum(1, keepdims=True)
    for row, p_V in zip(found, p_BV, strict=True):
        counts = np.bincount(row, minlength=5)
        # χ² of 4 degrees of freedom: above 23.5 once in ten thousand.
        assert len(counts) == 5 and ((counts - 10_000 * p_V) ** 2 / (10_000 * p_V)).sum() < 23.5
    chunked = drawn_tokens(*arrays, keys, vocab_size=5, softcap=2.0, chunk_elements=48_000)
    np.testing.assert_array_equal(chunked, found)
    np.testing.assert_array_equal(
        drawn_tokens(arrays[0][1:], *arrays[1:], keys[1:], vocab_size=5, softcap=2.0), found[1:]
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    words = (
        "the quick brown fox jumps over a lazy dog while one cat sleeps in some warm old sun by that stone wall".split()
    )
    rng = np.random.default_rng(0)
    for number in range(30):
        (folder / f"{number}.txt").write_text(" ".join(rng.choice(words, 200)))
    rows = [f'{{"text": "{" ".join(rng.choice(words, 6))}", "label": "{"ab"[i % 2]}"}}\n' for i in range(24)]
    (folder / "rows.jsonl").write_text("".join(rows))
    return folder


def config(text, run_dir, **changes):
    base = mlm.presets.electra_demo()
    return dataclasses.replace(
        base,
        run_dir=str(run_dir),
        **dict(steps=4, batch_size=8, eval_rows=8, eval_every=4, log_every=1) | changes,
        model=dataclasses.replace(base.model, **SIZES | dict(vocab_size=300, num_hidden_layers=1, hidden_dropout=0.1)),
        generator=CONFIG.generator,
        data=dataclasses.replace(
            base.data, builtin=None, files=(f"{text}/*.txt",), sequence_length=32, cache=str(text / "cache")
        ),
        checkpoint=dataclasses.replace(base.checkpoint, every=2),
    )


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    """(its folder, its summary, what it exported)"""
    folder = tmp_path_factory.mktemp("run")
    summary = mlm.pretrain.main(config(text, folder / "run", export=str(folder / "out")))
    return folder / "run", summary, folder / "out"


def test_a_run_goes_on_bit_for_bit(run, text, tmp_path):
    settings = config(text, tmp_path / "run")
    mlm.pretrain.main(dataclasses.replace(settings, stop_at=2))
    summary = mlm.pretrain.main(settings)
    assert summary["finished"] and summary["eval"] == run[1]["eval"]
    jax.tree.map(np.testing.assert_array_equal, restore_params(tmp_path / "run"), restore_params(run[0]))
    assert {"generator_loss", "detection_loss", "precision", "recall", "replaced"} <= summary["eval"].keys()


def test_both_models_are_exported_and_compute_the_same(run, text, tmp_path):
    folder, _, out = run
    export_model(ExportConfig(str(folder), str(tmp_path / "out")))
    for name in ("model.safetensors", "generator/model.safetensors"):
        first, again = (load_file(where / name) for where in (out, tmp_path / "out"))
        jax.tree.map(np.testing.assert_array_equal, first, again)
    trained, model = restore_params(folder), load(folder)
    assert model.head == NAME
    words = model.config.vocab_size
    shared = trained["discriminator"]["embeddings"]["token"]["embedding"][:words]
    generator = load(f"hf:{out / 'generator'}")
    np.testing.assert_array_equal(np.asarray(generator.params["embeddings"]["token"]["embedding"])[:words], shared)
    assert "embeddings" in trained["generator"] and trained["generator"]["embeddings"].keys() == {"project"}
    tokens = model.tokenizer(["the quick brown [MASK] jumps", "a cat"], return_tensors="np", padding=True)
    theirs = {name: torch.from_numpy(np.asarray(array)) for name, array in tokens.items()}
    real = tokens["attention_mask"] > 0
    for ours, kind, where in (
        (model, hf.ElectraForPreTraining, out),
        (generator, hf.ElectraForMaskedLM, out / "generator"),
    ):
        with torch.no_grad():
            expected = kind.from_pretrained(where).eval()(**theirs).logits.numpy()
        np.testing.assert_allclose(np.asarray(ours.logits(tokens))[real], expected[real], atol=1e-4, rtol=0)
    assert len(hf.pipeline("fill-mask", str(out / "generator"))("the quick [MASK] fox")) == 5


def test_fine_tuning_starts_from_the_discriminator(run, text, tmp_path):
    data = classification.ClassifyData(train=f"{text}/rows.jsonl", validation=f"{text}/rows.jsonl")
    tuning = dataclasses.replace(classification.classify_debug(), data=data, steps=1)
    tuning = dataclasses.replace(tuning, optimizer=dataclasses.replace(tuning.optimizer, learning_rate=0.0))
    finetune.train.main(dataclasses.replace(tuning, init_from=str(run[0]), run_dir=str(tmp_path / "run")))
    found, expected = restore_params(tmp_path / "run"), restore_params(run[0])["discriminator"]
    for name in ("layers", "embeddings"):
        jax.tree.map(np.testing.assert_array_equal, found[name], expected[name])
    assert found["head"].keys() == {"sequence_classification"}


def test_pretraining_goes_on_from_both_models_and_from_no_other(run, text, tmp_path):
    settings = config(text, tmp_path / "more", init_from=str(run[0]), seed=1, steps=1)
    still = dataclasses.replace(settings, optimizer=dataclasses.replace(settings.optimizer, learning_rate=0.0))
    mlm.pretrain.main(still)
    jax.tree.map(np.testing.assert_array_equal, restore_params(tmp_path / "more"), restore_params(run[0]))
    with pytest.raises(UserError, match="has no generator"):
        mlm.pretrain.main(config(text, tmp_path / "other", init_from=f"hf:{run[2]}"))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: generator_of(CONFIG.model, mlm.config.GeneratorConfig(size=0.3)), "no whole number.*try 0.25"),
        (lambda: mlm.config.GeneratorConfig(size=1.5), "generator.size=1.5 must lie above 0"),
        (lambda: mlm.config.GeneratorConfig(layers=0), "generator.layers=0"),
        (lambda: dataclasses.replace(CONFIG, detection_weight=0.0), "detection_weight=0 must be above 0"),
    ],
)
def test_bad_settings_are_one_line(make, said):
    with pytest.raises(UserError, match=said):
        make()


def test_a_generator_as_wide_as_the_embeddings_has_no_projection():
    model = dataclasses.replace(CONFIG.model, embedding_size=16)
    params = init_params(Setup(CONFIG, model, None), jax.random.key(0))
    assert "embeddings" not in params["generator"] and "project" in params["discriminator"]["embeddings"]
    assert generator_of(model, CONFIG.generator).hidden_size == 16
    batch = {name: jnp.asarray(array) for name, array in rows().items()}
    objective = build(Setup(CONFIG, model, None))
    prepared, norms = objective.prepare(batch, jax.random.key(3), 0, False)
    loss, _ = jax.jit(lambda: objective.loss(params, prepared, jax.random.key(4), norms, False))()
    assert 30 < float(loss) < 50  # ln 12 and 50 ln 2
