"""Learning from preferences: its settings, presets, and the record from which runs, reports and cards read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from espalier.errors import UserError
from espalier.short_help import often
from espalier.training.config import CheckpointConfig
from finetune.config import FinetuneConfig, FinetuneOptimizer, PairedData
from finetune.task import FinetuneTask
from finetune.tasks.prefer.report import REPORT


@dataclass(frozen=True)
class PreferData(PairedData):
    """Which of two answers is better: `prompt`, `chosen`, `rejected` (texts or messages), lists `completions` with
    `scores`, or single answers `completion` with `label`: .jsonl, .json, .csv, .tsv, .parquet (also .gz, URLs), hf:…"""

    chat_template: str | None = None
    """File with a Jinja chat template; unset = the tokenizer's, or for messages one that spells the roles out."""


@dataclass(frozen=True)
class PreferConfig(FinetuneConfig):
    """A fine-tuning run in which a decoder learns to write what is preferred. A row of a batch is a pair."""

    task: ClassVar[str] = "preference"
    loss: Literal["dpo", "ipo", "kto", "orpo", "simpo"] = often("dpo")
    """DPO, IPO and KTO measure by the model that the run starts from, ORPO and SimPO by nothing; KTO takes single
    answers, and pairs as two of them."""
    beta: float | None = often(None)
    """DPO's and KTO's β, IPO's τ, ORPO's λ, SimPO's β; unset = 0.1, of SimPO 2."""
    gamma: float = 1.0
    """SimPO's margin γ."""
    desirable: float = 1.0
    """KTO's weight of good answers."""
    undesirable: float = 1.0
    """KTO's weight of others."""
    reference: Literal["precomputed", "live"] = "precomputed"
    """Log-probabilities of the model that the run starts from. precomputed: once, of both files, kept with the run.
    live: those to learn from at each step, with the adapters switched off (--lora.rank)."""
    dropout: float = 0.0
    """Dropout of hidden states and attention; replaces the checkpoint's."""
    data: PreferData = field(default_factory=PreferData)

    def __post_init__(self):
        super().__post_init__()
        for name in ("beta", "desirable", "undesirable"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise UserError(f"{name}={value} must be greater than 0; leave it out for what the paper took")
        if self.scratch:
            raise UserError("scratch: preferences move a model that writes already; leave it out")
        if self.reference == "live" and not self.lora.rank:
            raise UserError("reference=live is the model with its adapters switched off; give --lora.rank, too")


def prefer() -> PreferConfig:
    """Write what is preferred: `./launch.sh finetune prefer --init-from RUN --data.train F --data.validation F`.

    From a clm run, an instruct run or a decoder of the Hub. DPO with β = 0.1 and a rate of 1e-6 (Rafailov et al. 2023,
    app. B); small models want more, adapters ten times as much.
    """
    return PreferConfig(
        log_every=10,
        checkpoint=CheckpointConfig(every=1000),
        optimizer=FinetuneOptimizer(learning_rate=1e-6),
        data=PreferData(pairs_per_row=0),
    )


PREFERENCE = FinetuneTask(
    name="preference",
    head="causal_lm",
    report=REPORT,
    data=PreferData,
    place="finetune.tasks.prefer.task:Preferring",
)
