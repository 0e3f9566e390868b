"""Pairs of texts learnt by an encoder-decoder: the loss of transformers, a run from files to answers, refusals."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
import transformers as hf

from espalier.data.tokenizer import vocabulary_size
from espalier.data.train_tokenizer import train_tokenizer
from espalier.errors import UserError
from espalier.loading import load
from espalier.models.config import Execution
from espalier.models.families.t5 import T5_SMALL
from espalier.models.hub import save_pretrained
from espalier.models.transformer import init_params
from finetune.config import LoraConfig
from finetune.tasks.rewrite.record import RewriteConfig, RewriteData
from finetune.tasks.rewrite.task import encoded_pairs, measure, read_pairs, rewriting_objective
from finetune.train import main

WORDS = "one two three four five six".split()
PAIRS = [(f"{a} {b}", f"{b} {a}") for a in WORDS for b in WORDS]


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A folder with an untrained model, and two files of pairs; the second are parallel lines."""
    folder = tmp_path_factory.mktemp("rewrite")
    tokenizer = train_tokenizer([" ".join(WORDS)] * 20, "bpe", 300)
    sizes = dict(hidden_size=32, head_dim=8, intermediate_size=64, num_attention_heads=4)
    config = dataclasses.replace(
        T5_SMALL,
        vocab_size=vocabulary_size(tokenizer),
        num_hidden_layers=1,
        num_decoder_layers=1,
        decoder_start_token_id=tokenizer.pad_token_id,
        initializer_range=0.1,
        **sizes,
    )
    params = jax.jit(lambda: init_params(config, jax.random.key(0)))()
    save_pretrained(folder / "model", config, params, tokenizer)
    lines = [json.dumps({"source": source, "target": target}) for source, target in PAIRS]
    (folder / "train.jsonl").write_text("\n".join(lines))
    for name, side in (("val.a", 0), ("val.b", 1)):
        (folder / name).write_text("\n".join(pair[side] for pair in PAIRS[:8]) + "\n")
    return folder


def settings(there, **more):
    data = RewriteData(train=(str(there / "train.jsonl"),), validation=(str(there / "val.a"), str(there / "val.b")))
    data = dataclasses.replace(data, max_length=16, max_target_length=16, answers=4, beams=2, prefix="turn: ")
    base = RewriteConfig(init_from=f"hf:{there / 'model'}", data=data, batch_size=8, steps=4, log_every=1)
    return dataclasses.replace(base, **more)


def test_the_loss_is_that_of_transformers(there):
    model, data = load(f"hf:{there / 'model'}"), settings(there).data
    examples = encoded_pairs(PAIRS[3:11], model.tokenizer, data, 16)
    shape = (len(examples), 16)
    batch = {name: np.zeros(shape, np.int32) for name in ("input_ids", "segment_ids", "positions")}
    for row, example in enumerate(examples):
        size = len(example.ids)
        batch["input_ids"][row, :size], batch["segment_ids"][row, :size] = example.ids, 1
        batch["positions"][row, :size] = range(size)
    batch["row_lengths"] = batch["segment_ids"].sum(1, dtype=np.int32)
    for name in ("target_ids", "target_length"):
        batch[name] = np.array([example.of_row[name] for example in examples], np.int32)
    objective = rewriting_objective(model.config, execution=Execution(dtype="float32"))

    def run(params, batch):
        batch, norms = objective.prepare(batch, jax.random.key(0), 0, False)
        return objective.loss(params, batch, jax.random.key(0), norms, False)[0]

    labels = np.where(np.arange(16) < batch["target_length"][:, None], batch["target_ids"], -100)
    theirs = hf.T5ForConditionalGeneration.from_pretrained(there / "model").eval()
    ids, mask, wanted = (torch.tensor(x).long() for x in (batch["input_ids"], batch["segment_ids"], labels))
    with torch.no_grad():
        expected = float(theirs(input_ids=ids, attention_mask=mask, labels=wanted).loss)
    assert float(jax.jit(run)(model.params, batch)) == pytest.approx(expected, abs=1e-5)
    prefix = model.tokenizer("turn: ", add_special_tokens=False).input_ids
    assert batch["input_ids"][0, : len(prefix)].tolist() == prefix
    assert (ids.gather(1, mask.sum(1, keepdim=True) - 1) == model.tokenizer.eos_token_id).all()


def test_a_run_learns_and_is_asked(there, tmp_path):
    summary = main(settings(there, run_dir=str(tmp_path / "run"), export=str(tmp_path / "out")))
    assert {"bleu", "chrf", "rougeL", "baseline_bleu"} <= summary["metrics"].keys()
    rows = list(map(json.loads, (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()))
    assert [(row["prompt"], row["reference"]) for row in rows] == PAIRS[:8:2]
    model = load(tmp_path / "run")
    written = model.generate([row["prompt"] for row in rows], max_new_tokens=16, temperature=0.0, beams=2)
    assert written == [row["prediction"] for row in rows]
    again = measure(load(f"hf:{tmp_path / 'out'}"), settings(there).data).metrics
    assert again == {name: summary["metrics"][name] for name in again}


def test_what_will_not_do_is_one_line(there, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"a": "x", "b": "y"}\n')
    run, bad = str(tmp_path / "run"), RewriteData(train=(str(tmp_path / "bad.jsonl"),))
    for refused, message in (
        (lambda: read_pairs(bad, "train"), "has 'a', 'b'; it must have 'source' and 'target' or"),
        (lambda: RewriteData(beams=0), "data.beams=0 .at least 1."),
        (lambda: main(settings(there, run_dir=run, lora=LoraConfig(rank=4))), "--lora.rank is for models of one stack"),
        (lambda: main(settings(there, run_dir=run, freeze=("embeddings",))), "--freeze is for models of one stack"),
    ):
        with pytest.raises(UserError, match=message):
            refused()
