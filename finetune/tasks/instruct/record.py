"""What instruction tuning is: its settings, presets, and the record from which runs, reports and cards read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from espalier.data.text_template import template_parts
from espalier.errors import UserError
from espalier.short_help import often
from espalier.training.config import CheckpointConfig
from finetune.config import FinetuneConfig, FinetuneData, one_or_parallel
from finetune.task import FinetuneTask
from finetune.tasks.instruct.report import REPORT


@dataclass(frozen=True)
class InstructData(FinetuneData):
    """Chats (`messages`), prompts and answers (prompt/completion, or Alpaca's instruction/input/output), or texts for a
    template: .jsonl, .json, .csv, .tsv, .parquet (also .gz, .zst, URLs), hf:…; or two files of parallel lines."""

    train: tuple[str, ...] = often(())  # type: ignore[assignment]
    """File to learn from; or two text files whose lines belong together, which are `source` and `target`."""
    validation: tuple[str, ...] = often(())  # type: ignore[assignment]
    """What to measure on, given likewise."""
    template: str | None = often(None)
    """Text with fields of the file, without a chat: "{source} = {target}"; the last field is what is learnt."""
    chat_template: str | None = None
    """File with a Jinja chat template; unset = the tokenizer's, or one that spells the roles out."""
    answers: int = 100
    """How many validation examples are answered at the end, for BLEU, chrF, ROUGE and the report; 0 = none."""
    beams: int = 1
    """Beams of these answers; 1 = the most probable token at each place."""
    max_new_tokens: int = 128
    """Tokens of each of these answers at most."""

    def __post_init__(self):
        super().__post_init__()
        one_or_parallel(self)
        if self.template is not None:
            template_parts(self.template)
        if self.answers < 0 or self.beams < 1 or self.max_new_tokens < 1:
            raise UserError(
                f"data.answers={self.answers} (0 or more), data.beams={self.beams} (at least 1), "
                f"data.max_new_tokens={self.max_new_tokens} (at least 1): correct what is out of range"
            )


@dataclass(frozen=True)
class InstructConfig(FinetuneConfig):
    """A fine-tuning run in which a decoder learns to answer."""

    task: ClassVar[str] = "instruction_tuning"
    dropout: float = 0.0
    """Dropout of hidden states and attention; replaces the checkpoint's."""
    show: int = often(0)
    """Examples to print, token by token, what is learnt in brackets."""
    data: InstructData = field(default_factory=InstructData)

    def __post_init__(self):
        super().__post_init__()
        if self.show < 0:
            raise UserError(f"show={self.show} must be 0 or more; try 3")


def instruct() -> InstructConfig:
    """Learn to answer: `./launch.sh finetune instruct --init-from RUN --data.train F --data.validation F --show 3`.

    From a clm run or a decoder of the Hub. Chats, prompts and answers, Alpaca's files; loss on the answers alone.
    """
    return InstructConfig(log_every=10, checkpoint=CheckpointConfig(every=1000))


def translate() -> InstructConfig:
    """Translate: `./launch.sh finetune translate --init-from RUN --data.train T.en T.de --data.validation V.en V.de`.

    `instruct` with the template "{source} = {target}" over parallel files; BLEU and chrF of 1,000 translations.
    """
    return InstructConfig(
        log_every=10,
        checkpoint=CheckpointConfig(every=1000),
        data=InstructData(template="{source} = {target}", max_length=256, answers=1000, beams=4),
        dropout=0.1,
    )


INSTRUCTION = FinetuneTask(
    name="instruction_tuning",
    head="causal_lm",
    report=REPORT,
    data=InstructData,
    place="finetune.tasks.instruct.task:InstructionTuning",
)
