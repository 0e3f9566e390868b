"""What question answering is: its settings, presets, and the record from which runs, reports and cards read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from espalier.errors import UserError
from espalier.short_help import often
from espalier.training.config import CheckpointConfig
from finetune.config import FinetuneConfig, FinetuneData
from finetune.task import FinetuneTask
from finetune.tasks.answer.report import REPORT


@dataclass(frozen=True)
class AnswerData(FinetuneData):
    """Questions on contexts: SQuAD's .json (1.1 or 2.0), or .jsonl, .parquet, hf:… of a question a line."""

    holdout: float | None = often(None)
    """Instead of a validation file: part of the articles of --data.train to measure on (0.2), chosen by title."""
    stride: int = often(128)
    """Tokens that two windows of a long context share, at most half of a window."""
    answer_tokens: int = 30
    """Tokens of an answer at most."""
    n_best: int = 5
    """Best answers that are written for each question."""
    threshold_part: float = 0.1
    """Part of the training articles on which the no-answer threshold is chosen, which are not learnt from; only where
    there are questions without an answer."""
    score_by: Literal["auto", "words", "characters"] = "auto"
    """What F1 counts; auto = characters where most letters are of scripts without blanks (Chinese, Japanese, Thai)."""

    def __post_init__(self):
        super().__post_init__()
        if self.holdout is not None and not 0 < self.holdout < 1:
            raise UserError(f"data.holdout={self.holdout} must be between 0 and 1; try 0.2")
        if not 0 < self.threshold_part < 1:
            raise UserError(f"data.threshold_part={self.threshold_part} must be between 0 and 1; try 0.1")
        for name, least in (("stride", 0), ("answer_tokens", 1), ("n_best", 1)):
            if getattr(self, name) < least:
                raise UserError(f"data.{name}={getattr(self, name)} must be at least {least}")


@dataclass(frozen=True)
class AnswerConfig(FinetuneConfig):
    """A fine-tuning run that learns to find answers in their contexts."""

    task: ClassVar[str] = "question_answering"
    data: AnswerData = field(default_factory=AnswerData)


def answer() -> AnswerConfig:
    """Find answers in contexts: `./launch.sh finetune answer --init-from RUN --data.train F --data.validation F`.

    Files as SQuAD 1.1 and 2.0. Three epochs of batches of 32, dropout 0.1, linear decay (Devlin et al. 2019).
    """
    return AnswerConfig(log_every=10, checkpoint=CheckpointConfig(every=1000))


ANSWERING = FinetuneTask(
    name="question_answering",
    head="question_answering",
    report=REPORT,
    data=AnswerData,
    splits_rows=False,
    place="finetune.tasks.answer.task:QuestionAnswering",
)
