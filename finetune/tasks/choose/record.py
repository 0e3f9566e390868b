"""What multiple choice is: its settings, presets, and the record from which runs, reports and cards read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from espalier.errors import UserError
from espalier.short_help import often
from espalier.training.config import CheckpointConfig
from finetune.config import FinetuneConfig, FinetuneData
from finetune.task import FinetuneTask
from finetune.tasks.choose.report import REPORT


@dataclass(frozen=True)
class ChooseData(FinetuneData):
    """Questions with choices, of which one is right: .jsonl, .csv, .tsv, .parquet, hf:…; or minimal pairs, a .tsv of an
    acceptable and an unacceptable sentence without names of columns, or a folder of such files or of .jsonl with
    sentence_good and sentence_bad (BLiMP)."""

    question: tuple[str, ...] = often(())
    """Columns of what stands before a choice, each on a line; unset = guessed (context, question, …), may be none."""
    choices: tuple[str, ...] = often(())
    """A column that lists the choices, or one column for each; unset = guessed (choices, endings, choice1, …)."""
    label: str | None = often(None)
    """Column that says which choice is right: its number, letter or text; unset = guessed (label, answer, …)."""
    normalize: Literal["none", "tokens", "bytes"] = often("none")
    """By what the log-likelihood of a choice is divided: nothing, its tokens or its bytes. All three are measured; this
    one is learnt, and predicts."""
    per_file: int | None = None
    """Of a folder of minimal pairs take so many of each file, evenly spaced; unset = all."""
    within_word: bool = False
    """Models that see both sides: with a token that is scored hide the later ones of its word, too (Kauf & Ivanova
    2023). Without, they give the beginning of a rare word away."""

    def __post_init__(self):
        super().__post_init__()
        if self.per_file is not None and self.per_file < 1:
            raise UserError(f"data.per_file={self.per_file} must be at least 1; leave it out for all pairs")


@dataclass(frozen=True)
class ChooseConfig(FinetuneConfig):
    """A fine-tuning run that learns to prefer the right choice."""

    SELDOM: ClassVar[tuple[str, ...]] = ("stop_at", "scratch")

    task: ClassVar[str] = "multiple_choice"
    data: ChooseData = field(default_factory=ChooseData)


def choose() -> ChooseConfig:
    """Choose answers: `./launch.sh finetune choose --init-from RUN --data.train F --data.validation F`.

    From a clm run or a decoder of the Hub. Batches of 16 questions, each with all of its choices. Without training:
    `./launch.sh evaluate RUN --task multiple_choice --data.validation F` (BLiMP: its folder).
    """
    return ChooseConfig(batch_size=16, log_every=10, checkpoint=CheckpointConfig(every=1000))


MULTIPLE_CHOICE = FinetuneTask(
    name="multiple_choice",
    head="causal_lm",
    measures_heads=("masked_lm",),
    report=REPORT,
    data=ChooseData,
    splits_rows=False,
    place="finetune.tasks.choose.task:MultipleChoice",
)
