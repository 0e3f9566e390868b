"""Which text a run reads and how it becomes rows of tokens. Imports nothing heavy."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from espalier.data.encodings import codec
from espalier.data.filters import FilterConfig
from espalier.errors import UserError
from espalier.short_help import often

MAX_DOCUMENT_BYTES = 2**25
ALPHABET = 0.99999
"""In Chinese, where most characters are a token, this leaves 0.001 % of the tokens unknown."""


@dataclass(frozen=True)
class DataConfig:
    """Text, tokenizer and row length of a pretraining run."""

    files: tuple[str, ...] = often(())
    """Files, globs or URLs (gs://, s3://, https://) of training text: .txt, .md (one document a file), .jsonl (one a
    line), .csv, .parquet (one a row), each also .gz or .zst. Or one data set: hf:ID_OR_FOLDER?split=train of Hugging
    Face, tfds:NAME_OR_FOLDER?split=train of tensorflow-datasets, builtin:pydoc, or python:FILE.py:NAME, a function of
    yours that returns texts (docs/own-objective.md)."""
    sources: tuple[str, ...] = ()
    """Instead of files, text under several names: 'wiki=wiki/*.jsonl.gz' 'books=hf:my/books'. Names may be repeated."""
    mixture: str | None = None
    """The share of each source in the rows of every batch, 'wiki=0.7,books=0.3'; unset = as much as each holds."""
    builtin: Literal["pydoc", "packages"] | None = None
    """Where no files are given, text that is on this machine already: Python's own documentation (2 MB), or the
    docstrings of all installed packages too (tens of MB)."""
    builtin_exclude: tuple[str, ...] = ()
    """Files of the built-in text to leave out (the demo's held-out ones)."""
    validation_files: tuple[str, ...] = often(())
    """Held-out text; unset = a part of the documents (validation_fraction)."""
    validation_fraction: float = 0.02
    """Part of the text held out where there are no validation files."""
    text_field: str = "text"
    """The field of a jsonl line, or the column of a table, that holds its text."""
    encoding: str = "utf-8"
    """Encoding of the text files (not of .parquet, which has its own), by the names of Python: gb18030, big5, cp932,
    euc-jp, euc-kr, utf-16, cp1252 … Files that are actually Unicode are read as Unicode, with a notice."""
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    """A longer line or field is rejected. (Longer .txt files are cut into several documents.)"""
    max_rejected: float = 0.05
    """If more than this share of the records is bad (broken JSON, not UTF-8 …), the run stops before training. Each bad
    record is listed in rejects.jsonl beside the tokens."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    tokenizer: str | None = None
    """Tokenizer folder or tokenizer.json; unset = train one of the model's vocab_size on the training text."""
    tokenizer_kind: Literal["wordpiece", "bpe", "unigram"] = "wordpiece"
    """What to train: WordPiece (BERT), byte-level BPE (GPT-2) or Unigram (T5, ALBERT)."""
    alphabet: float = ALPHABET
    """Character coverage of WordPiece and Unigram: the most frequent characters that make up this share of the text are
    in the vocabulary, the others become [UNK]. The 1,000 most frequent are always in. Byte-level BPE covers all."""
    lowercase: bool = False
    """WordPiece and Unigram: lower-case, and strip the marks of Latin, Greek and Cyrillic letters (BERT's uncased)."""
    words: Literal["segmenter", "tokens"] | None = None
    """Where words begin in Chinese, Japanese, Thai, Lao, Khmer and Burmese text, for --masking.whole-words: a segmenter
    finds them, and they are stored with the tokens; or each token is a word. unset = with --masking.whole-words by the
    segmenters that are installed; a resumed run keeps the segmenters it began with."""
    sequence_length: int = often(128)
    """Tokens in a row; a row packs several documents, which never attend to each other."""
    cache: str | None = None
    """Folder of tokenized text; unset = $ESPALIER_CACHE, else ~/.cache/espalier."""

    def __post_init__(self):
        if self.sequence_length < 8:
            raise UserError(f"data.sequence_length={self.sequence_length} is too short; at least 8")
        codec(self.encoding)
        if not 0 < self.validation_fraction < 1:
            raise UserError(
                f"data.validation_fraction={self.validation_fraction} must lie between 0 and 1, for instance 0.02"
            )
        if not 0 <= self.max_rejected <= 1:
            raise UserError(f"data.max_rejected={self.max_rejected} must lie between 0 and 1, for instance 0.05")
        if not 0 < self.alphabet <= 1:
            raise UserError(f"data.alphabet={self.alphabet} must be above 0 and at most 1, for instance 0.9995")
        if self.lowercase and self.tokenizer:
            raise UserError("data.lowercase is for a tokenizer that is trained here; leave it or data.tokenizer out")
        if self.lowercase and self.tokenizer_kind == "bpe":
            raise UserError(
                "data.lowercase: byte-level BPE keeps every byte; leave it out, or give --data.tokenizer-kind wordpiece"
            )
        if self.max_document_bytes < 1:
            raise UserError(f"data.max_document_bytes={self.max_document_bytes} must be at least 1")
        for spec in self.sources:
            if not re.fullmatch(r"[\w.-]+=.+", spec):
                raise UserError(f"data.sources={spec!r} is not NAME=TEXT, for instance 'wiki=wiki/*.jsonl.gz'")
        self.weights()

    def training(self) -> tuple[str | float, ...]:
        """How a tokenizer is trained, for cache keys; those of byte-level BPE are older than `alphabet`."""
        return (self.tokenizer_kind,) + (() if self.tokenizer_kind == "bpe" else (self.alphabet, self.lowercase))

    def weights(self) -> dict[str, float] | None:
        """Shares of the sources, summing to 1, in the order of `sources`; None where no mixture was given."""
        if self.mixture is None:
            return None
        names = list(dict.fromkeys(spec.partition("=")[0] for spec in self.sources))
        given: dict[str, float] = {}
        for part in self.mixture.split(","):
            name, _, weight = part.strip().partition("=")
            if name in given:
                raise UserError(f"data.mixture={self.mixture} names {name} more than once; give each source one share")
            try:
                given[name] = float(weight)
            except ValueError:
                given[name] = math.nan
            if name in names and not 0 < given[name] < math.inf:
                raise UserError(
                    f"data.mixture={self.mixture}: {part!r} is not NAME=SHARE, for instance wiki=0.7,books=0.3"
                )
        if set(given) != set(names):
            raise UserError(
                f"data.mixture={self.mixture} names {', '.join(given)}, and data.sources {', '.join(names) or 'none'}; "
                "each needs its text, --data.sources 'wiki=wiki/*.jsonl.gz', and its share"
            )
        total = sum(given.values())
        return {name: given[name] / total for name in names}
