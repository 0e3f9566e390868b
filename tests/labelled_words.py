"""Sentences of which one word tells the kind, and small runs that a classifier of them starts from."""

import dataclasses
import json
import pathlib
from types import SimpleNamespace

import numpy as np
from tiny_runs import write_run

from espalier.models.config import ModelConfig
from espalier.training.config import CheckpointConfig
from finetune.config import FinetuneOptimizer
from finetune.tasks.classify.record import ClassifyConfig, ClassifyData
from sharding.mesh import MeshConfig

WORDS = {
    "fruit": "apple pear plum cherry".split(),
    "bird": "crow robin wren heron".split(),
    "tool": "saw axe file plane".split(),
}
ENCODER = ModelConfig(
    vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, type_vocab_size=2,
    max_position_embeddings=16, hidden_dropout=0.3, attention_dropout=0.3, classifier_pooling="mean",
)  # fmt: skip
DECODER = dataclasses.replace(
    ENCODER, causal=True, norm_position="pre", final_norm=True, embedding_norm=False, type_vocab_size=0, head_bias=False
)


def sentences(count: int) -> list[dict]:
    """One word of a kind among others that say nothing."""
    random = np.random.default_rng(count)
    rows = []
    for number in range(count):
        kind = list(WORDS)[number % 3]
        rows.append({"sentence": f"we saw the {random.choice(WORDS[kind])} here", "label": kind})
    return rows


TEXTS = [row["sentence"] for row in sentences(60)] * 3


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_runs(root: pathlib.Path) -> SimpleNamespace:
    """An encoder run, a decoder run, and labelled files."""
    return SimpleNamespace(
        root=root,
        encoder=write_run(root / "encoder", ENCODER, TEXTS),
        decoder=write_run(root / "decoder", DECODER, TEXTS),
        train=write_jsonl(root / "train.jsonl", sentences(48)),
        validation=write_jsonl(root / "validation.jsonl", sentences(20)),
    )


def config_for(there, run_dir, init_from=None, **changes) -> ClassifyConfig:
    defaults = dict(
        init_from=str(init_from or there.encoder),
        run_dir=str(run_dir),
        steps=30,
        batch_size=16,
        eval_every=15,
        data=ClassifyData(train=there.train, validation=there.validation),
        optimizer=FinetuneOptimizer(learning_rate=5e-3),
        checkpoint=CheckpointConfig(every=100),
        mesh=MeshConfig(2, 2, 2),
    )
    return ClassifyConfig(**defaults | changes)


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
