"""What tagging is: its settings, presets, and the record from which runs, reports and cards read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from espalier.errors import UserError
from espalier.short_help import often
from espalier.training.config import CheckpointConfig
from finetune.config import FinetuneConfig, FinetuneData
from finetune.task import FinetuneTask
from finetune.tasks.tag.report import REPORT


@dataclass(frozen=True)
class TagData(FinetuneData):
    """Sentences whose words have tags: a word and its tag on each line (CoNLL), .jsonl, .parquet, or hf:…"""

    tokens: str | None = often(None)
    """Where the words are: the number of a column, or the name of a field; unset = the first, or tokens, words, …"""
    tags: str | None = often(None)
    """Where the tags are, given likewise (-1 = the last column); unset = the last, or tags, ner_tags, labels, …"""
    tag_kind: Literal["auto", "words"] = "auto"
    """auto takes B-person, I-person and the like for entities; words takes each tag for itself (parts of speech)."""
    stride: int | None = None
    """Tokens that the windows of a long sentence share; unset = a quarter of a row."""

    def __post_init__(self):
        super().__post_init__()
        if self.stride is not None and self.stride < 0:
            raise UserError(f"data.stride={self.stride} must not be negative; try 32")


@dataclass(frozen=True)
class TagConfig(FinetuneConfig):
    """A fine-tuning run that learns to tag words."""

    task: ClassVar[str] = "token_classification"
    data: TagData = field(default_factory=TagData)


def tag() -> TagConfig:
    """Tag words, entities or others: `./launch.sh finetune tag --init-from RUN --data.train F --data.validation F`.

    From an mlm or a clm run. Three epochs of batches of 32, dropout 0.1, linear decay (Devlin et al. 2019, app. A.3).
    """
    return TagConfig(log_every=10, checkpoint=CheckpointConfig(every=1000))


TAGGING = FinetuneTask(
    name="token_classification",
    head="token_classification",
    report=REPORT,
    data=TagData,
    splits_rows=False,
    place="finetune.tasks.tag.task:Tagging",
)
