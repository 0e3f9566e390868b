"""The work of a race: an architecture, weights to start from, and batches, the same for every contender.

What is learnt is made up, so that a race needs no corpus: tokens by a Zipf distribution, half of which a fixed table
tells from the token before.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

WEIGHTS, BATCHES, FACTS = "weights", "batches.npz", "work.json"


@dataclass(frozen=True)
class Work:
    """Sizes of a step; without dropout. AdamW with a constant rate, clipped at a norm of 1."""

    objective: str
    """masked_lm (BERT) or causal_lm (GPT-2)."""
    rows: int = 32
    length: int = 128
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    vocabulary: int = 8192
    mask_rate: float = 0.15
    learning_rate: float = 1e-3
    weight_decay: float = 0.01

    @property
    def masked(self) -> int:
        """Tokens of a row that are predicted, of a masked language model."""
        return round(self.mask_rate * self.length)

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.rows * self.length


WORKS = {
    "W1": Work("masked_lm"),
    # At 1e-3, without a warm-up, its fifth loss jumps, and rounding decides what the later ones are.
    "W2": Work("causal_lm", rows=16, length=256, learning_rate=3e-4),
    "tiny-masked": Work("masked_lm", rows=4, length=32, hidden=32, layers=2, vocabulary=256),
    "tiny-causal": Work("causal_lm", rows=4, length=32, hidden=32, layers=2, vocabulary=256),
    "bert-base": Work("masked_lm", length=512, hidden=768, layers=12, heads=12, vocabulary=30_592, learning_rate=1e-4),
    "gpt2": Work("causal_lm", length=1024, hidden=768, layers=12, heads=12, vocabulary=50_304, learning_rate=1e-4),
}
"""W1 and W2 are for CPUs, the last two for a GPU."""


def model_of(work: Work):
    """Its architecture, a ModelConfig."""
    from espalier.models.families.bert import BERT_BASE
    from espalier.models.families.gpt2 import GPT2

    return dataclasses.replace(
        BERT_BASE if work.objective == "masked_lm" else GPT2,
        vocab_size=work.vocabulary,
        hidden_size=work.hidden,
        num_hidden_layers=work.layers,
        num_attention_heads=work.heads,
        intermediate_size=4 * work.hidden,
        max_position_embeddings=work.length,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )


def flops(work: Work) -> float:
    """Of a step, backward pass included: the head at the masked places alone, causal pairs once."""
    from espalier.models.counts import flops_per_token

    part = work.masked / work.length if work.objective == "masked_lm" else 1.0
    return work.tokens * flops_per_token(model_of(work), work.length, part)


def write(work: Work, folder: Path, steps: int) -> None:
    """Write weights in the format of transformers, batches for so many steps, and the sizes."""
    import jax

    from espalier.models.hub import save_pretrained
    from espalier.models.transformer import init_params

    folder.mkdir(parents=True, exist_ok=True)
    model = model_of(work)
    params = jax.device_get(init_params(model, jax.random.key(0), (work.objective,)))
    save_pretrained(folder / WEIGHTS, model, params, head=work.objective)
    arrays: dict[str, Any] = _batches(work, steps)
    np.savez(folder / BATCHES, **arrays)
    (folder / FACTS).write_text(json.dumps(dataclasses.asdict(work) | {"steps": steps}) + "\n")


def read(folder: Path) -> tuple[Work, dict[str, np.ndarray]]:
    """(the work, arrays [steps, rows, …]: input_ids, labels; masked_positions where tokens are masked)."""
    facts = json.loads((folder / FACTS).read_text())
    del facts["steps"]
    with np.load(folder / BATCHES) as arrays:
        return Work(**facts), dict(arrays)


def _batches(work: Work, steps: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    ordinary = np.arange(5, work.vocabulary)
    share = 1.0 / np.arange(1, len(ordinary) + 1)
    drawn = random.choice(ordinary, (steps, work.rows, work.length), p=share / share.sum()).astype(np.int32)
    after = random.permutation(work.vocabulary).clip(5).astype(np.int32)
    follows = random.random(drawn.shape) < 0.5
    for at in range(1, work.length):
        drawn[:, :, at] = np.where(follows[:, :, at], after[drawn[:, :, at - 1]], drawn[:, :, at])
    if work.objective == "causal_lm":
        return {"input_ids": drawn, "labels": np.roll(drawn, -1, axis=-1)}
    places = np.argsort(random.random(drawn.shape), axis=-1)[:, :, : work.masked]
    places = np.sort(places, axis=-1).astype(np.int32)
    labels = np.take_along_axis(drawn, places, -1)
    np.put_along_axis(drawn, places, np.int32(4), -1)
    return {"input_ids": drawn, "masked_positions": places, "labels": labels}
