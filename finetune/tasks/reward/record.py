"""What a reward model is: its settings, presets, and the record from which runs, reports and cards read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from espalier.training.config import CheckpointConfig
from finetune.config import FinetuneConfig, PairedData
from finetune.task import FinetuneTask
from finetune.tasks.reward.report import REPORT


@dataclass(frozen=True)
class RewardData(PairedData):
    """Which of two answers is better: `prompt`, `chosen`, `rejected` (texts or messages, also without prompt), or lists
    `completions` with `scores`: .jsonl, .json, .csv, .tsv, .parquet (also .gz, .zst, URLs), hf:…"""


@dataclass(frozen=True)
class RewardConfig(FinetuneConfig):
    """A fine-tuning run that learns how good an answer is."""

    task: ClassVar[str] = "reward"
    data: RewardData = field(default_factory=RewardData)


def reward() -> RewardConfig:
    """Score texts or answers: `./launch.sh finetune reward --init-from RUN --data.train F --data.validation F`.

    From an mlm or a clm run, of pairs `prompt`, `chosen`, `rejected` (Bradley and Terry 1952; Ouyang et al. 2022).
    """
    return RewardConfig(log_every=10, checkpoint=CheckpointConfig(every=1000), data=RewardData(pairs_per_row=0))


REWARD = FinetuneTask(
    name="reward",
    head="sequence_classification",
    report=REPORT,
    data=RewardData,
    splits_rows=False,
    place="finetune.tasks.reward.task:Reward",
)
