"""Runs of `mlm hybrid` and `mlm mntp`: resumed, exported, read both ways, begun from decoders, and what is refused."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
import transformers as hf
from tiny_models import same
from toy import quick_compilation  # noqa: F401

import clm.presets
import clm.pretrain
import espalier
import finetune.train
import mlm.presets
import mlm.pretrain
from espalier import cli
from espalier.commands import evaluate
from espalier.data.config import DataConfig
from espalier.data.tokenizer import load_tokenizer
from espalier.errors import UserError
from espalier.predict.use import use_of
from espalier.pretraining.objective import Setup
from espalier.training.config import CheckpointConfig, OptimizerConfig
from finetune.presets import PRESETS
from mlm.next_token import build_hybrid
from sharding.mesh import MeshConfig

WORDS = ("old young grey tall".split(), "cat dog bird fish".split(), "tree river house".split(), "sun rain".split())
NO_CAUSAL = cli.Call(given=frozenset({"model.causal"}))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    lines = [f"the {a} {b} saw a {c} in the {d}." for a, b, c, d in itertools.product(*WORDS)]
    (folder / "text.txt").write_text("\n".join(lines))
    pairs = [f"the {a} {b} saw a {c}.\tthe {a} {b} saw a {c} {c}." for a, b, c, _ in itertools.product(*WORDS)]
    (folder / "pairs.tsv").write_text("\n".join(pairs[:8]))
    return folder


def small(config, text, run_dir, **changes):
    """Four steps of a preset, on the small text and with a small model."""
    sizes = dict(vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    model = dataclasses.replace(config.model, **sizes, head_dim=None, max_position_embeddings=64)
    defaults = dict(
        run_dir=str(run_dir),
        steps=4,
        batch_size=8,
        eval_rows=8,
        eval_every=2,
        log_every=1,
        model=dataclasses.replace(model, layer_period=("global",)),
        data=DataConfig(
            files=(str(text / "text.txt"),), cache=str(text / "cache"), tokenizer_kind="bpe", sequence_length=32
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        checkpoint=CheckpointConfig(every=2),
        mesh=MeshConfig(2, 2, 2),
    )
    return dataclasses.replace(config, **defaults | changes)


@pytest.fixture(scope="module")
def hybrid(text, tmp_path_factory):
    """(run, folder of its export, summary)."""
    root = tmp_path_factory.mktemp("hybrid")
    config = small(mlm.presets.hybrid(), text, root / "run", export=str(root / "exported"), causal_share=0.25)
    return root / "run", root / "exported", mlm.pretrain.main(config)


@pytest.fixture(scope="module")
def decoder(text, tmp_path_factory):
    run = tmp_path_factory.mktemp("decoder") / "run"
    clm.pretrain.main(small(clm.presets.decoder_small(), text, run))
    return run


def measured(capsys, *arguments) -> dict:
    evaluate.command([*map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"]


def test_it_says_what_it_learnt(hybrid):
    run, _, summary = hybrid
    found = summary["eval"]
    assert found["loss"] == pytest.approx(0.25 * found["causal_loss"] + 0.75 * found["masked_loss"], rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(found["causal_loss"]), rel=1e-5) and found["bits_per_byte"] > 0
    page = (run / "report.html").read_text()
    assert "Hybrid of causal and masked language model" in page and "Masked words" in page


def test_a_resumed_run_ends_alike(hybrid, text, tmp_path):
    run, _, summary = hybrid
    config = small(mlm.presets.hybrid(), text, tmp_path / "parts", causal_share=0.25)
    assert not mlm.pretrain.main(dataclasses.replace(config, stop_at=2))["finished"]
    again = mlm.pretrain.main(config)
    same(espalier.load(tmp_path / "parts").params, espalier.load(run).params)
    assert again["eval"] == summary["eval"]
    with pytest.raises(UserError, match="causal_share was 0.25, now 0.5"):
        mlm.pretrain.main(dataclasses.replace(config, causal_share=0.5))


def test_it_is_a_decoder_and_a_masked_model_here_and_in_transformers(hybrid, text, capsys):
    run, exported, _ = hybrid
    model = espalier.load(run)
    assert use_of(model).name == "generate" and use_of(model.bidirectional()).name == "fill"
    sentence = "the old cat saw a tree."
    theirs, tokenizer = hf.AutoModelForCausalLM.from_pretrained(exported).eval(), load_tokenizer(exported)
    ids = [tokenizer.bos_token_id, *tokenizer(sentence, add_special_tokens=False)["input_ids"]]
    turned = hf.AutoConfig.from_pretrained(exported)
    turned.is_causal = False
    both = hf.AutoModelForCausalLM.from_pretrained(exported, config=turned).eval()

    def logprobs(module, row):
        with torch.no_grad():
            return torch.log_softmax(module(torch.tensor([row])).logits[0].double(), -1).numpy()

    as_decoder = sum(logprobs(theirs, ids)[at, label] for at, label in enumerate(ids[1:]))
    hidden = [[*ids[:at], tokenizer.mask_token_id, *ids[at + 1 :]] for at in range(1, len(ids))]
    as_masked = sum(logprobs(both, row)[at, ids[at + 1]] for at, row in enumerate(hidden))
    for one in (model, espalier.load(f"hf:{exported}")):
        for read, expected in ((one, as_decoder), (one.bidirectional(), as_masked)):
            found = read.choose("", [sentence, "the dog."])["log_likelihoods"][0]
            assert found == pytest.approx(expected, abs=1e-4)
    assert abs(as_decoder - as_masked) > 0.01
    (filled,) = model.bidirectional().fill(["the old [MASK] saw a tree."], 3)[0]["masks"]
    text_ids = tokenizer(f"the old {tokenizer.mask_token} saw a tree.", add_special_tokens=False)["input_ids"]
    row = [tokenizer.bos_token_id, *text_ids]
    scores = logprobs(both, row)[row.index(tokenizer.mask_token_id) - 1]
    assert [one["id"] for one in filled] == np.argsort(-scores)[:3].tolist()
    assert filled[0]["probability"] == pytest.approx(np.exp(scores.max()), rel=1e-4)

    pairs = ("--task", "multiple_choice", "--data.validation", text / "pairs.tsv")
    assert measured(capsys, run, *pairs) == measured(capsys, f"hf:{exported}", *pairs)
    masked = measured(capsys, run, *pairs, "--bidirectional")
    assert masked == measured(capsys, f"hf:{exported}", *pairs, "--bidirectional")
    whole = ("--data.validation", text / "text.txt", "--data.tokens", 40)
    assert "perplexity" in measured(capsys, run, *whole)
    assert "pseudo_perplexity" in measured(capsys, run, *whole, "--bidirectional")
    with pytest.raises(UserError, match="sees both sides already; leave it out"):
        model.bidirectional().bidirectional()
    with pytest.raises(UserError, match="sees both sides and does not generate"):
        model.bidirectional().generate("the")


def test_a_decoder_learns_to_see_both_sides_and_leaves_as_such(decoder, text, tmp_path, capsys):
    """A vocabulary without a mask token lends another one; what is exported says that it is not causal."""
    preset = mlm.presets.mntp()
    config = small(preset, text, tmp_path / "run", init_from=str(decoder), export=str(tmp_path / "exported"))
    with pytest.raises(UserError, match="has no mask token"):
        mlm.pretrain.main(config)
    config = dataclasses.replace(config, masking=dataclasses.replace(preset.masking, token="_"))
    assert not mlm.pretrain.main(dataclasses.replace(config, stop_at=2))["finished"]
    assert mlm.pretrain.main(config)["finished"]
    model = espalier.load(tmp_path / "run")
    assert not model.config.causal and model.head == "causal_lm" and use_of(model).name == "fill"
    assert (
        model.tokenizer.mask_token == "_"
        and model.tokenizer.get_vocab().keys() == load_tokenizer(decoder / "tokenizer").get_vocab().keys()
    )
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    assert type(theirs).__name__ == "Qwen3ForCausalLM" and theirs.config.is_causal is False
    ids = np.arange(10, 30)[None]
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(model.logits({"input_ids": ids}), expected, atol=1e-4)
    again = espalier.load(f"hf:{tmp_path / 'exported'}")
    assert not again.config.causal and use_of(again).name == "fill"
    pairs = ("--task", "multiple_choice", "--data.validation", text / "pairs.tsv")
    assert measured(capsys, tmp_path / "run", *pairs) == measured(capsys, f"hf:{tmp_path / 'exported'}", *pairs)


def test_causal_first_and_masked_after(decoder, text, tmp_path):
    """arXiv 2507.00994: a decoder's weights, seen from both sides from now on, learn masked LM."""
    preset = mlm.presets.encoder_small()
    masking = dataclasses.replace(preset.masking, token="_")
    config = small(preset, text, tmp_path / "run", init_from=str(decoder), masking=masking)
    with pytest.raises(UserError, match="pretrain it by `clm`; to have it see both sides .* --model.no-causal"):
        mlm.pretrain.main(config)
    assert mlm.pretrain.main(config, NO_CAUSAL)["finished"]
    model, before = espalier.load(tmp_path / "run"), espalier.load(decoder)
    assert model.config == dataclasses.replace(before.config, causal=False) and model.head == "masked_lm"
    assert model.fill("the [MASK] cat")[0]["masks"]
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps and np.isfinite(steps[0]["loss"])


BAD = {
    "share": (lambda: dataclasses.replace(mlm.presets.hybrid(), causal_share=0.0), "with 0 it is `mlm mntp`"),
    "hybrid": (lambda: _model(mlm.presets.hybrid(), causal=False), "some rows are causal; leave it out"),
    "mntp": (lambda: _model(mlm.presets.mntp(), causal=True), "predicted from both sides; leave it out"),
    "window": (
        lambda: build(_model(mlm.presets.hybrid(), layer_period=("local",), sliding_window=8)),
        "model.sliding_window=8: a window lies otherwise",
    ),
}


def build(config):
    return build_hybrid(Setup(config, config.model, None))


def _model(config, **changes):
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


@pytest.mark.parametrize("case", BAD)
def test_settings_that_will_not_do(case):
    make, message = BAD[case]
    with pytest.raises(UserError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_tokens_that_cannot_stand_for_hidden_ones(hybrid, decoder, text, tmp_path):
    run, _, _ = hybrid
    preset = mlm.presets.mntp()
    for origin, token, words in ((decoder, "nowhere at all", "is not a token"), (run, "_", "has <|mask|> for that")):
        masking = dataclasses.replace(preset.masking, token=token)
        config = small(preset, text, tmp_path / "run", init_from=str(origin), masking=masking)
        with pytest.raises(UserError, match=words.replace("|", r"\|")):
            mlm.pretrain.main(config)
    with pytest.raises(UserError, match="of the vocabulary of --init-from, and there is none"):
        mlm.pretrain.main(small(preset, text, tmp_path / "run", masking=masking))
    assert not (tmp_path / "run").exists()


def test_a_hybrid_is_fine_tuned_as_an_encoder_too(hybrid, tmp_path):
    run, _, _ = hybrid
    rows = [f"the {word} cat\t{word in ('old', 'tall')}\n" for word in WORDS[0]] * 4
    (tmp_path / "rows.tsv").write_text("text\tlabel\n" + "".join(rows))
    file, preset = str(tmp_path / "rows.tsv"), PRESETS["classify"]()
    config = dataclasses.replace(
        preset,
        init_from=str(run),
        run_dir=str(tmp_path / "run"),
        bidirectional=True,
        steps=2,
        batch_size=8,
        data=dataclasses.replace(preset.data, train=file, validation=file),
        mesh=MeshConfig(8, 1, 1),
    )
    with pytest.raises(UserError, match="has no qwen3 that sees both sides and classifies by its first token"):
        finetune.train.main(dataclasses.replace(config, export=str(tmp_path / "exported")))
    assert finetune.train.main(config)["finished"]
    model = espalier.load(tmp_path / "run")
    assert not model.config.causal and espalier.load(run).config.causal
    # What it classifies by is the first token, which sees what comes behind it.
    first, second = (one["probability"] for one in model.classify(["the old cat", "the old bird"]))
    assert first != second
    with pytest.raises(UserError, match="sees both sides already; leave it out"):
        again = dataclasses.replace(config, init_from=str(tmp_path / "run"), run_dir=str(tmp_path / "other"))
        finetune.train.main(again)
