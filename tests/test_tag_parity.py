"""Fifty steps of tagging against a PyTorch loop: same weights, as exported by us, same rows, same settings.

The loop reads the file by itself, cuts words with the tokenizer of transformers, gives the first piece of each its tag,
and takes loss, gradients, clipping and AdamW of PyTorch. Sentences are WNUT-17's.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
import transformers as hf
from tiny_runs import write_run

from espalier.assembly import opened
from espalier.data.loader import shuffled
from espalier.data.tokenizer import framed_tokenizer
from espalier.models.families.bert import BERT_BASE
from espalier.models.hub import save_pretrained
from espalier.models.pretrained import load_weights
from espalier.training.config import CheckpointConfig
from finetune.config import FinetuneOptimizer
from finetune.tasks.tag.record import TagConfig, TagData
from finetune.train import main
from sharding.mesh import MeshConfig
from sharding.rules import shard_params

STEPS, BATCH, WARMUP, RATE, DECAY, CLIP = 50, 8, 5, 1e-3, 0.01, 1.0
BERT = dataclasses.replace(
    BERT_BASE, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, head_dim=None,
    max_position_embeddings=128,
)  # fmt: skip


def sentences(path) -> tuple[list[list[str]], list[list[str]]]:
    """Those of medium length among the first 600 of a CoNLL file."""
    parts = path.read_text().replace("\n\t\n", "\n\n").strip().split("\n\n")[:600]
    rows = [[line.split("\t") for line in part.split("\n") if line.strip()] for part in parts]
    rows = [row for row in rows if 20 < sum(len(word) for word, _ in row) < 60]
    return [[word for word, _ in row] for row in rows], [[tag for _, tag in row] for row in rows]


def test_fifty_losses_are_those_of_a_pytorch_loop(tmp_path, shared_data):
    words, tags = sentences(shared_data / "wnut17" / "train.conll")
    base = write_run(tmp_path / "base", BERT, [" ".join(sentence) for sentence in words], vocabulary=1000)
    path = tmp_path / "train.conll"
    pairs = [zip(*pair, strict=True) for pair in zip(words, tags, strict=True)]
    lines = ["".join(f"{word}\t{tag}\n" for word, tag in pair) for pair in pairs]
    path.write_text("\n".join(lines))
    (tmp_path / "few.conll").write_text("\n".join(lines[:8]))
    optimizer = FinetuneOptimizer(learning_rate=RATE, warmup=WARMUP, weight_decay=DECAY, clip_norm=CLIP)
    config = TagConfig(
        init_from=str(base), run_dir=str(tmp_path / "run"), steps=STEPS, batch_size=BATCH, log_every=1, dropout=0.0,
        eval_every=100, data=TagData(train=str(path), validation=str(tmp_path / "few.conll")), optimizer=optimizer,
        checkpoint=CheckpointConfig(every=100), mesh=MeshConfig(1, 1, 1),
    )  # fmt: skip
    export_beginning(config, tmp_path / "exported")
    main(config)
    written = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    ours = [line["loss"] for line in written if "loss" in line]
    theirs = pytorch_losses(tmp_path / "exported", words, tags, config)
    assert len(ours) == STEPS and theirs[-1] < theirs[0] / 2
    assert ours == pytest.approx(theirs, abs=1e-3)


def export_beginning(config: TagConfig, folder) -> None:
    """The weights that a run begins with, head included, in the format of transformers."""
    run = opened(config)
    task = run.task
    shapes = jax.eval_shape(task.init_params, jax.random.key(0))
    layout = shard_params(shapes, run.mesh)
    abstract = jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, layout)
    params = load_weights(run.origin, task.model, run.record.head, task.init_params, config.seed)(abstract)
    tokenizer = framed_tokenizer(task.tokenizer, causal=False)
    save_pretrained(folder, task.model, params, tokenizer, head=run.record.head)


def pytorch_losses(folder, words, tags, config: TagConfig) -> list[float]:
    model = hf.AutoModelForTokenClassification.from_pretrained(folder).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    plain = [name for name, _ in model.named_parameters() if any(w in name for w in ("bias", "Norm", "embeddings"))]
    groups = [
        {"params": [p for name, p in model.named_parameters() if (name in plain) == free], "weight_decay": decay}
        for free, decay in ((True, 0.0), (False, DECAY))
    ]
    given = config.optimizer
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(given.b1, given.b2), eps=given.eps)
    losses = []
    for step in range(STEPS):
        rows = shuffled(step * BATCH + np.arange(BATCH), len(words), config.seed)
        encoded = tokenizer([words[row] for row in rows], is_split_into_words=True, padding=True, return_tensors="pt")
        labels = torch.full_like(encoded["input_ids"], -100)
        for place, row in enumerate(rows):
            seen = set()
            for at, word in enumerate(encoded.word_ids(place)):
                if word is not None and word not in seen:
                    seen.add(word)
                    labels[place, at] = model.config.label2id[tags[row][word]]
        loss = model(**encoded, labels=labels).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        factor = min((step + 1) / WARMUP, 1 - (step - WARMUP) / (STEPS - WARMUP))
        for group in optimizer.param_groups:
            group["lr"] = RATE * factor
        optimizer.step()
    return losses
