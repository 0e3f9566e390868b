"""Published training speeds: what ran, on what, how it was laid out, how fast, and who says so.

The table is runs.json beside this file. Its runs stand in the order of their sources, and within one in the order of
the source's own table; which rows of a large table are included follows the rule in the source's note, set before any
prediction was made. A model is one of ours (`like`) with other settings. `recomputed` names what of each product's
forward pass runs again in the backward pass: MaxText's policies, with `down` dead code in all of them, and PyTorch's
checkpointing, which runs whole layers again, also what the backward pass does not need.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from espalier.commands.plan.time.amounts import Job
from espalier.models.config import ModelConfig
from espalier.models.counts import products
from espalier.models.families.bert import BERT_BASE, BERT_LARGE
from espalier.models.families.gpt2 import GPT2
from espalier.models.families.llama import LLAMA_8B
from espalier.models.families.modernbert import MODERNBERT_BASE
from sharding.topology import chip_named

LIKE: Mapping[str, ModelConfig] = {
    "bert-base": BERT_BASE,
    "bert-large": BERT_LARGE,
    "gpt2": GPT2,
    "llama-8b": LLAMA_8B,
    "modernbert-base": MODERNBERT_BASE,
}


@dataclass(frozen=True)
class Run:
    """One published measurement."""

    name: str
    """Of the model."""
    job: Job
    speed: float
    """Tokens per second and chip (what is rented), as published or as it follows from what is."""
    source: str
    """Key of `sources()`."""
    says: str = ""
    """What the source says, where it is not tokens per second and chip in a table."""


@functools.cache
def runs() -> tuple[Run, ...]:
    """All published runs. The 1st, 3rd, 5th … are what efficiencies are fitted on; the 2nd, 4th … are held out."""
    return tuple(_run(row) for row in _table()["runs"])


def sources() -> dict[str, str]:
    """Name → URL of every source."""
    return {name: source["url"] for name, source in _table()["sources"].items()}


@functools.cache
def models() -> dict[str, ModelConfig]:
    """Name → architecture of every model that a run trains."""
    return {name: _model(**settings) for name, settings in _table()["models"].items()}


UNITS: Mapping[str, Callable[[float, Job, Mapping[str, Any]], float]] = {
    "tokens/s/chip": lambda value, job, row: value,
    "sequences/s": lambda value, job, row: value * job.sequence_length / job.chips,
    "s/step": lambda value, job, row: job.tokens / value / job.chips,
    "hours": lambda value, job, row: row["steps"] * job.tokens / (value * 3600 * job.chips),
    "TFLOP/s/chip": lambda value, job, row: value * 1e12 / _maxtext_flops(job),
}
"""Unit of a published speed → tokens per second and chip. Hours are those of `steps` steps."""
SAYS = {"sequences/s": "{:g} sequences/s", "TFLOP/s/chip": "{:g} TFLOP/s a chip"}
"""What a source says in that unit, in words."""


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(pathlib.Path(__file__).with_name("runs.json").read_text())


def _model(like: str, **changes: Any) -> ModelConfig:
    return dataclasses.replace(LIKE[like], **changes)


def _run(row: Mapping[str, Any]) -> Run:
    chip = chip_named(row["chip"])
    if "memory_bandwidth" in row:
        chip = dataclasses.replace(chip, memory_bandwidth=row["memory_bandwidth"])
    predicted, of = row.get("predicted", (1, 1))
    job = Job(
        model=models()[row["model"]],
        chip=chip,
        sequence_length=row["length"],
        batch_rows=row["rows"],
        mesh=row["mesh"],
        accumulation=row.get("micro_batches", 1),
        predicted_fraction=predicted / of,
        scan=row.get("scan", False),
        attention=row.get("attention", "fused"),
        head=row["head"],
        recomputed=_table()["recomputed"][row["recomputed"]] if "recomputed" in row else {},
        fast_domain=row.get("fast_domain"),
        slow_bandwidth=row.get("slow_bandwidth"),
    )
    value, unit = row["speed"]
    says = row.get("says") or SAYS.get(unit, "").format(value)
    return Run(row["model"], job, UNITS[unit](value, job, row), row["source"], says)


def _maxtext_flops(job: Job) -> float:
    """FLOPs of a token as MaxText counted them before July 2025: causal attention as if all keys were seen."""
    c = job.model
    keys = 12.0 * c.num_attention_heads * c.head_size * job.sequence_length * c.num_hidden_layers
    return 3 * sum(product.flops for product in products(c)) + keys
