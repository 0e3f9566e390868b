"""What writing one text from another is: its settings, preset and record. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from espalier.errors import UserError
from espalier.short_help import often
from espalier.training.config import CheckpointConfig
from finetune.config import FinetuneConfig, FinetuneData, one_or_parallel
from finetune.task import FinetuneTask
from finetune.tasks.instruct.report import REPORT


@dataclass(frozen=True)
class RewriteData(FinetuneData):
    """Pairs of texts (source/target, document/summary, prompt/completion …): .jsonl, .json, .csv, .tsv, .parquet (also
    .gz, .zst, URLs), hf:…; or two files of parallel lines."""

    train: tuple[str, ...] = often(())  # type: ignore[assignment]
    """File to learn from; or two text files whose lines belong together: what is read, and what is written."""
    validation: tuple[str, ...] = often(())  # type: ignore[assignment]
    """What to measure on, given likewise."""
    prefix: str = often("")
    """Put before what is read: "translate English to German: " (T5)."""
    max_target_length: int = 128
    """Tokens of what is written, its end token included; longer texts are cut. max_length is for what is read."""
    answers: int = 100
    """How many validation examples are written at the end, for BLEU, chrF, ROUGE and the report; 0 = none."""
    beams: int = 4
    """Beams of these; 1 = the most probable token at each place."""

    def __post_init__(self):
        super().__post_init__()
        one_or_parallel(self)
        if self.max_target_length < 2 or self.answers < 0 or self.beams < 1:
            raise UserError(
                f"data.max_target_length={self.max_target_length} (at least 2), data.answers={self.answers} (0 or "
                f"more), data.beams={self.beams} (at least 1): correct what is out of range"
            )


@dataclass(frozen=True)
class RewriteConfig(FinetuneConfig):
    """A fine-tuning run in which an encoder-decoder learns to write one text from another."""

    task: ClassVar[str] = "sequence_to_sequence"
    data: RewriteData = field(default_factory=RewriteData)


def rewrite() -> RewriteConfig:
    """One text from another: `./launch.sh finetune rewrite --init-from RUN --data.train F --data.validation F`.

    From an `mlm t5-small` run or hf: with T5, Flan-T5, mT5. Translations, summaries; BLEU, chrF and ROUGE at the end.
    """
    return RewriteConfig(log_every=10, checkpoint=CheckpointConfig(every=1000))


SEQUENCE_TO_SEQUENCE = FinetuneTask(
    name="sequence_to_sequence",
    head="seq2seq_lm",
    report=replace(
        REPORT,
        title=lambda config: "Tuned to write one text from another",
        unit="token of what is written",
        pipeline="text2text-generation",
        loader="AutoModelForSeq2SeqLM",
        words="fine-tuned to write one text from another",
    ),
    data=RewriteData,
    place="finetune.tasks.rewrite.task:Rewriting",
)
