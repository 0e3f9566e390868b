"""Fine-tuning beside a PyTorch loop: fifty steps around a class of transformers, from the weights our run begins with.

Both sides have the same order of rows and the same settings: AdamW with its exemptions from decay, warm-up and linear
decay, clipping, no dropout. All else is done twice: the loop reads the examples by itself, encodes them with the
exported tokenizer in transformers, and takes loss and gradient of the class that loads the exported weights.

A task adds one row to `ROWS` in tests/test_parity_of_training.py: a function of (folder, shared data) that writes the
files and returns a `Row`. Its configuration is made with `settings(folder, …)`; its loss takes the model, the tokenizer
and the numbers of the rows of a batch, and gives the loss of PyTorch on those rows of the training file.
"""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
import transformers as hf

from espalier.assembly import opened
from espalier.data.loader import shuffled
from espalier.models.hub import save_pretrained
from espalier.models.pretrained import load_weights
from espalier.training.config import CheckpointConfig
from finetune.config import FinetuneConfig, FinetuneOptimizer
from finetune.train import main
from sharding.mesh import MeshConfig
from sharding.rules import shard_params

STEPS, BATCH, WARMUP = 50, 8, 5
TOLERANCE = 1e-3


class Row(NamedTuple):
    """A fine-tuning, and how PyTorch sees its examples."""

    config: FinetuneConfig
    examples: int
    """Of the training file."""
    loss: Callable[[Any, Any, Sequence[int]], torch.Tensor]
    """(model and tokenizer of transformers, rows of the training file from 0) → the loss of this batch."""


def settings(folder: pathlib.Path, base: pathlib.Path, **more: Any) -> dict[str, Any]:
    """What the configuration of every row is made with. base: the run that it starts from."""
    return {
        "init_from": str(base),
        "run_dir": str(folder / "run"),
        "steps": STEPS,
        "batch_size": BATCH,
        "dropout": 0.0,
        "log_every": 1,
        "eval_every": STEPS,
        "optimizer": FinetuneOptimizer(learning_rate=2e-3, warmup=WARMUP, weight_decay=0.01, clip_norm=1.0),
        "checkpoint": CheckpointConfig(every=1000),
        "mesh": MeshConfig(1, 1, 1),
    } | more


def our_losses(row: Row, folder: pathlib.Path) -> list[float]:
    """Of each step; the weights that the run begins with are exported to `folder` first."""
    _export_beginning(row.config, folder)
    main(row.config)
    assert row.config.run_dir is not None
    lines = pathlib.Path(row.config.run_dir, "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def pytorch_losses(row: Row, folder: pathlib.Path) -> list[float]:
    """Of each step of the loop, from the weights in `folder`."""
    settings = row.config.optimizer
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(hf, architecture).from_pretrained(folder).train()
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    assert not any(module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)), "no dropout"
    optimizer = torch.optim.AdamW(
        _groups(model, settings.weight_decay), lr=1.0, betas=(settings.b1, settings.b2), eps=settings.eps
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: settings.learning_rate * min((step + 1) / WARMUP, (STEPS - step) / (STEPS - WARMUP)),
    )
    losses = []
    for step in range(STEPS):
        rows = shuffled(step * BATCH + np.arange(BATCH), row.examples, row.config.seed)
        loss = row.loss(model, tokenizer, rows.tolist())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        schedule.step()
    return losses


def _groups(model: torch.nn.Module, decay: float) -> list[dict[str, Any]]:
    """Biases, norms and embeddings do not decay."""
    free: set[torch.nn.Parameter] = set()
    for module in model.modules():
        whole = isinstance(module, torch.nn.Embedding) or "norm" in type(module).__name__.lower()
        free |= {p for name, p in module.named_parameters(recurse=False) if whole or name == "bias"}
    return [
        {"params": [p for p in model.parameters() if p in free], "weight_decay": 0.0},
        {"params": [p for p in model.parameters() if p not in free], "weight_decay": decay},
    ]


def _export_beginning(config: FinetuneConfig, folder: pathlib.Path) -> None:
    """The weights that a run begins with, head included, in the format of transformers."""
    record, task, _, mesh, origin = opened(config)
    shapes = jax.eval_shape(task.init_params, jax.random.key(0))
    layout = shard_params(shapes, mesh)
    abstract = jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, layout)
    assert origin is not None and task.exported is not None
    params = load_weights(origin, task.model, record.head, task.init_params, config.seed)(abstract)
    tokenizer, published = task.exported(None)
    save_pretrained(folder, task.model, params, tokenizer, head=record.head, published=published)
