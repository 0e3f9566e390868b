"""Which text a run reads and how it becomes rows of tokens. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cli import UserError


@dataclass(frozen=True)
class DataConfig:
    """Text, tokenizer and row length of a pretraining run."""

    files: tuple[str, ...] = ()
    """Files or globs of training text: .txt (one document a file), .jsonl, .jsonl.gz (one a line)."""
    builtin: Literal["pydoc", "packages"] | None = None
    """Where no files are given, text that is on this machine already: Python's own documentation (2 MB), or the
    docstrings of all installed packages too (tens of MB)."""
    builtin_exclude: tuple[str, ...] = ()
    """Files of the built-in text to leave out (the demo's held-out ones)."""
    validation_files: tuple[str, ...] = ()
    """Held-out text; unset = a part of the documents (validation_fraction)."""
    validation_fraction: float = 0.02
    """Part of the text held out where there are no validation files."""
    text_field: str = "text"
    """The field of a jsonl line that holds its text."""
    tokenizer: str | None = None
    """Tokenizer folder or tokenizer.json; unset = train one of the model's vocab_size on the training text."""
    tokenizer_kind: Literal["wordpiece", "bpe"] = "wordpiece"
    """What to train: lower-cased WordPiece (BERT) or byte-level BPE (GPT-2)."""
    sequence_length: int = 128
    """Tokens in a row; rows are packed with several documents that never see each other."""
    cache: str | None = None
    """Folder of tokenized text; unset = $ESPALIER_CACHE, else ~/.cache/espalier."""

    def __post_init__(self):
        if self.sequence_length < 8:
            raise UserError(f"data.sequence_length={self.sequence_length} is too short; at least 8")
        if not 0 < self.validation_fraction < 1:
            raise UserError(
                f"data.validation_fraction={self.validation_fraction} must lie between 0 and 1, for instance 0.02"
            )
