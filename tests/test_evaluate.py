"""`evaluate`: the metrics that a run itself wrote; perplexities against transformers and brute force."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import transformers as hf
from labelled_words import ENCODER, config_for, sentences, write_jsonl
from labelled_words import TEXTS as SENTENCES
from tiny_models import BERT, GPT, random_params
from tiny_runs import write_run

import espalier
from espalier.data.tokenizer import vocabulary_size
from espalier.data.train_tokenizer import train_tokenizer
from espalier.intervals import ratio_interval
from espalier.models.hub import save_pretrained
from espalier.predict.likelihood import causal_scores, pseudo_scores
from espalier.pretraining.config import TextFiles
from espalier.pretraining.evaluate import measure_text
from finetune.train import main

TEXTS = [
    "the quick brown fox jumps over the lazy dog while the cat sleeps in the warm sun by the old stone wall " * 3,
    "巴黎是法国的首都，人们喜欢在河边散步。我们今天去看大海，明天回家。",
    "the dog",
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A decoder and an encoder in folders of Hugging Face format, and the texts in files."""
    root = tmp_path_factory.mktemp("evaluate")
    for name, base, kind, head in (("gpt", GPT, "bpe", "causal_lm"), ("bert", BERT, "wordpiece", "masked_lm")):
        tokenizer = train_tokenizer(TEXTS * 20, kind, 320, for_masked_lm=not base.causal)
        config = dataclasses.replace(base, vocab_size=vocabulary_size(tokenizer))
        save_pretrained(root / name, config, random_params(config, (head,)), tokenizer, head=head)
    with (root / "x.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS)
    return root


def ids_of(model, texts=TEXTS) -> list[list[int]]:
    return [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def test_a_run_is_measured_as_it_measured_itself(tmp_path, ask):
    """By its own settings, which may be left out; and on another file, with predictions."""
    files = {
        name: write_jsonl(tmp_path / f"{name}.jsonl", sentences(count))
        for name, count in (("train", 48), ("validation", 20))
    }
    there = type("There", (), files | {"encoder": write_run(tmp_path / "encoder", ENCODER, SENTENCES)})
    written = main(config_for(there, tmp_path / "run", steps=4))["metrics"]
    code, out, _ = ask(tmp_path / "run", "--json")
    *shown, last = out.splitlines()
    found = json.loads(last)
    assert code == 0 and found["task"] == "sequence_classification"
    # The majority of the run is that of its training file.
    compared = written.keys() - {"majority", "calibration_error"}
    assert found["metrics"]["calibration_error"] == pytest.approx(written["calibration_error"], abs=1e-7)
    assert {name: found["metrics"][name] for name in compared} == {name: written[name] for name in compared}
    assert any(line.split()[:1] == ["accuracy"] for line in shown)
    output = tmp_path / "out"
    code, out, _ = ask(tmp_path / "run", "--data.validation", files["train"], "--output", output, "--json")
    rows = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    right = sum(row["label"] == row["prediction"] for row in rows)
    assert len(rows) == 48 and json.loads(out.splitlines()[-1])["metrics"]["accuracy"] == right / 48
    assert (output / "predictions.jsonl").read_text() != (tmp_path / "run" / "predictions.jsonl").read_text()
    # A setting that decides what is read: of 8 tokens, 6 are of the text, and the word that matters is the seventh.
    begin = "we saw the here here here"
    late = [{"sentence": f"{begin} {one['sentence'].split()[-2]}", "label": one["label"]} for one in sentences(20)]
    late = write_jsonl(tmp_path / "late.jsonl", late)
    for length, same in ((8, True), (16, False)):
        code, _, _ = ask(tmp_path / "run", "--data.validation", late, "--output", output, "--data.max-length", length)
        rows = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
        assert code == 0 and (len({row["probability"] for row in rows}) == 1) == same
    for flags, words in [
        (["--data.max-length", 17], "max_length=17 must lie between 8 and"),
        (["--data.validation", tmp_path / "none.jsonl"], "no file"),
        (["--task", "masked_lm"], "task masked_lm is of models with the head masked_lm"),
        (["--task", "classify"], "unknown task 'classify'"),
        (["--data.lines"], "unknown flag --data.lines"),
    ]:
        code, _, err = ask(tmp_path / "run", *flags)
        assert code == 2 and words in err.splitlines()[-1]
    code, _, err = ask(tmp_path / "nowhere")
    assert code == 2 and err.startswith("error: no checkpoint in")


def test_perplexity_is_that_of_transformers(models, ask):
    """Each text behind the beginning-of-text token; a longer one in windows, as transformers' page on it does."""
    code, out, _ = ask(f"hf:{models}/gpt", "--data.validation", models / "x.jsonl", "--json")
    metrics = json.loads(out.splitlines()[-1])["metrics"]
    model, tokenizer = (
        hf.AutoModelForCausalLM.from_pretrained(models / "gpt"),
        espalier.load(f"hf:{models}/gpt").tokenizer,
    )
    model.eval()
    nats, tokens = 0.0, 0
    for text in TEXTS:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        for begin in range(0, len(ids) - 1, 64):
            inputs, labels = ids[begin : begin + 64], ids[begin + 1 : begin + 65]
            with torch.no_grad():
                scores = torch.log_softmax(model(torch.tensor([inputs])).logits[0], -1)
            nats -= sum(float(scores[at, label]) for at, label in enumerate(labels))
            tokens += len(labels)
    assert code == 0 and metrics["tokens"] == tokens and metrics["texts"] == 3
    assert metrics["loss"] == pytest.approx(nats / tokens, abs=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    size = sum(len(text.encode()) for text in TEXTS)
    assert metrics["bytes"] == size and metrics["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    low, high = metrics["loss_interval"]
    assert low < metrics["loss"] < high and "95 % interval" in out


def test_a_token_is_scored_once_in_the_first_window_that_reaches_it(models):
    model = espalier.load(f"hf:{models}/gpt")
    ids = ids_of(model)[0][:45]
    logits = {}

    def logprob(context: tuple[int, ...], token: int) -> float:
        if context not in logits:
            scores = np.asarray(model.logits({"input_ids": [list(context)]}), np.float64)[0, -1]
            logits[context] = scores - np.log(np.exp(scores).sum())
        return logits[context][token]

    stream = [model.tokenizer.bos_token_id, *ids]
    (scored,) = causal_scores(model, [ids], 16, 8)
    for at in range(len(ids)):
        begin = max(0, -(-(at + 1 - 16) // 8) * 8)
        assert scored.logprobs[at] == pytest.approx(logprob(tuple(stream[begin : at + 1]), ids[at]), abs=1e-4)


def test_pseudo_perplexity_masks_every_token_once(models, ask):
    """By brute force, a token at a time."""
    model = espalier.load(f"hf:{models}/bert")
    pieces = []
    for ids in ids_of(model):
        # 30 tokens have room between [CLS] and [SEP]: pieces as equal as can be.
        pieces += [piece.tolist() for piece in np.array_split(np.array(ids), -(-len(ids) // 30))]
    cls, sep, mask = (model.tokenizer.convert_tokens_to_ids(name) for name in ("[CLS]", "[SEP]", "[MASK]"))
    expected, right = [], 0
    for piece in pieces:
        for at, token in enumerate(piece):
            row = [cls, *piece[:at], mask, *piece[at + 1 :], sep]
            scores = np.asarray(model.logits({"input_ids": [row]}), np.float64)[0, at + 1]
            expected.append(scores[token] - np.log(np.exp(scores).sum()))
            right += scores.argmax() == token
    found = np.concatenate([scored.logprobs for scored in pseudo_scores(model, ids_of(model), 32)])
    np.testing.assert_allclose(found, expected, atol=1e-4)

    code, out, _ = ask(f"hf:{models}/bert", "--data.validation", models / "x.jsonl", "--data.length", 32, "--json")
    metrics = json.loads(out.splitlines()[-1])["metrics"]
    assert code == 0 and metrics["pseudo_perplexity"] == pytest.approx(math.exp(-np.mean(expected)), rel=1e-4)
    assert metrics["accuracy"] == pytest.approx(right / len(expected)) and "bits_per_byte" not in metrics


def test_lines_are_texts_and_tokens_have_an_end(models, tmp_path):
    model = espalier.load(f"hf:{models}/gpt")
    (tmp_path / "x.txt").write_text("\n\n".join(TEXTS))
    files = (str(tmp_path / "x.txt"),)
    by_lines = measure_text(model, TextFiles(files, lines=True)).metrics
    by_text = measure_text(model, TextFiles((str(models / "x.jsonl"),))).metrics
    assert by_lines["texts"] == 3 and by_lines["loss"] == pytest.approx(by_text["loss"], abs=1e-6)
    few = measure_text(model, TextFiles(files, tokens=10)).metrics
    assert (few["tokens"], few["texts"]) == (10, 1) and few["bytes"] < len(TEXTS[0])


def test_what_cannot_be_measured_is_refused(models, ask, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    for model, flags, words in [
        ("gpt", [], "no --data.validation FILE given"),
        ("gpt", ["--data.validation", tmp_path / "empty.txt"], "there is no text that becomes tokens"),
        ("gpt", ["--data.validation", "none.txt"], "no file matches none.txt"),
        ("gpt", ["--data.length", 65], "exceeds the model's 64"),
        ("bert", ["--data.stride", 4], "data.stride is of causal models"),
        ("gpt", ["--data.stride", 65], "must lie between 1 and the 64 tokens"),
    ]:
        if "--data.validation" not in flags and flags:
            flags = [*flags, "--data.validation", models / "x.jsonl"]
        code, out, err = ask(f"hf:{models}/{model}", *flags)
        assert code == 2 and words in err.splitlines()[-1], (flags, err)


def test_the_interval_holds_the_mean_as_often_as_it_says():
    """Of parts of unequal weight, drawn many times."""
    generator = np.random.default_rng(0)
    inside = 0
    for trial in range(100):
        weights = generator.integers(1, 20, 200)
        sums = weights * 3.0 + generator.normal(size=200) * weights
        low, high = ratio_interval(sums, weights, seed=trial)
        inside += low < 3.0 < high
    assert 88 <= inside <= 100
