"""The settings that every pretraining on text has. Imports no JAX."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from espalier.data.config import DataConfig
from espalier.data.encodings import codec
from espalier.errors import UserError
from espalier.models.config import Execution, ModelConfig
from espalier.short_help import often
from espalier.training.config import TrainConfig


@dataclass(frozen=True)
class TextConfig(TrainConfig):
    """A pretraining run on text; an objective's presets are values of a subclass, which names the task."""

    task: ClassVar[str]
    """In espalier.task.TASKS."""
    objective: str | None = often(None)
    """An objective of your own instead, as FILE.py:NAME (docs/own-objective.md)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    execution: Execution = field(default_factory=Execution)
    eval_rows: int = 512
    """Rows of held-out text in an evaluation (always the same; batches of one size see the same masks)."""

    def __post_init__(self):
        super().__post_init__()
        if self.eval_rows < 1:
            raise UserError(f"eval_rows={self.eval_rows} must be at least 1")


@dataclass(frozen=True)
class TextFiles:
    """Text on which a language model is measured without training (`evaluate`)."""

    validation: tuple[str, ...] = often(())
    """Files, globs or URLs: .txt, .md (one text a file), .jsonl (one a line), .csv, .parquet (one a row), each also .gz
    or .zst; or a data set: hf:ID_OR_FOLDER?split=test, tfds:NAME_OR_FOLDER?split=test."""
    text_field: str = "text"
    """The field of a jsonl line, or the column of a table, that holds its text."""
    encoding: str = "utf-8"
    """Encoding of the files, by the names of Python: gb18030, big5, cp932, euc-jp, euc-kr, utf-16, cp1252 …"""
    lines: bool = False
    """Take every line of a text for a text of its own: sentences."""
    length: int | None = None
    """Tokens that the model reads at once; unset = as many as it has positions, at most 1024 (an encoder: 512)."""
    stride: int | None = None
    """Causal models: tokens by which the window moves on in a longer text; unset = length. A shorter one leaves every
    token length - stride tokens before it, and takes as much longer."""
    tokens: int | None = None
    """Stop after so many tokens; unset = all. Of an encoder each token is a row: 100,000 take a while."""

    def __post_init__(self):
        codec(self.encoding)
        if self.length is not None and self.length < 8:
            raise UserError(f"data.length={self.length} is too short; at least 8")
        if self.tokens is not None and self.tokens < 1:
            raise UserError(f"data.tokens={self.tokens} must be at least 1")


@dataclass(frozen=True)
class BoundFiles(TextFiles):
    """Text on which a masked diffusion model is measured: a bound, estimated by draws."""

    draws: int = 16
    """Sets of hidden tokens that are drawn for each piece of text; more = a surer estimate."""

    def __post_init__(self):
        super().__post_init__()
        if self.draws < 1:
            raise UserError(f"data.draws={self.draws} must be at least 1")
