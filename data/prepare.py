"""Text → tokenizer → tokens on disk: `python -m data.prepare --data.files 'text/*.txt'`.

What is written is keyed by the fingerprints of the text and of the tokenizer: the same inputs are tokenized once,
however many runs use them, and a changed tokenizer never meets the tokens of another.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import cli
from cli import UserError
from data.config import DataConfig

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerFast

    from data.sources import Source
    from data.store import TokenStore

BATCH_CHARACTERS = 4_000_000
"""Text handed to the tokenizer at once: enough for all cores, little enough for memory."""


class Prepared(NamedTuple):
    """What a pretraining run reads."""

    tokenizer: PreTrainedTokenizerFast
    train: TokenStore
    validation: TokenStore
    fingerprints: dict[str, str]
    """SHA-256 of `tokenizer`, `train` and `validation`: the same values, the same tokens."""


def prepare(
    config: DataConfig,
    vocab_size: int,
    *,
    for_masked_lm: bool,
    of_weights: PreTrainedTokenizerFast | None = None,
) -> Prepared:
    """Tokens of the training and the held-out text, from the cache where they are there already.

    The tokenizer is `of_weights`, that of the weights that are taken, because weights and tokens belong together; else
    config.tokenizer, else one of at most vocab_size tokens, trained on the training text alone. A config.tokenizer
    that is not that of the weights is an error.
    """
    from data.sources import open_sources
    from data.tokenizer import fingerprint, load_tokenizer

    cache = cache_folder(config)
    sources = open_sources(config)
    keys = {name: getattr(sources, name).fingerprint() for name in ("train", "validation")}
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else of_weights
    if tokenizer and of_weights and fingerprint(tokenizer) != fingerprint(of_weights):
        raise UserError(
            f"{config.tokenizer} is not the tokenizer that the weights were trained with; leave out --data.tokenizer, "
            "or start anew, without --init-from and in another --run-dir"
        )
    if tokenizer is None:
        tokenizer = _trained(cache, sources.train, keys["train"], config.tokenizer_kind, vocab_size, for_masked_lm)
    tokenizer_key = fingerprint(tokenizer)
    stores = {
        name: _tokenized(cache, getattr(sources, name), keys[name], tokenizer, tokenizer_key, name) for name in keys
    }
    return Prepared(tokenizer, **stores, fingerprints={"tokenizer": tokenizer_key} | keys)


def cache_folder(config: DataConfig) -> Path:
    """config.cache, else $ESPALIER_CACHE, else ~/.cache/espalier."""
    return Path(config.cache or os.environ.get("ESPALIER_CACHE") or "~/.cache/espalier").expanduser()


def _trained(cache: Path, source: Source, key: str, kind: str, vocab_size: int, for_masked_lm: bool):
    from data.store import appearing
    from data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer

    folder = cache / f"tokenizer-{_digest(key, kind, vocab_size, for_masked_lm)}"
    if not (folder / "tokenizer.json").is_file():
        texts = _Texts(source, f"training a {kind} tokenizer")
        shutil.rmtree(folder, ignore_errors=True)
        with appearing(folder) as unfinished:
            save_tokenizer(train_tokenizer(texts, kind, vocab_size, for_masked_lm=for_masked_lm), unfinished)
    return load_tokenizer(folder)


def _tokenized(cache: Path, source: Source, key: str, tokenizer, tokenizer_key: str, name: str) -> TokenStore:
    from data.store import TokenStore, exists, write_store
    from data.tokenizer import vocabulary_size

    folder = cache / f"tokens-{_digest(key, tokenizer_key)}"
    if exists(folder):
        return TokenStore(folder)
    shutil.rmtree(folder, ignore_errors=True)
    dtype = "uint16" if vocabulary_size(tokenizer) <= 2**16 else "uint32"
    about = {"source": key, "tokenizer": tokenizer_key}
    return write_store(folder, encode(_Texts(source, f"tokenizing {name} text"), tokenizer), dtype, about)


def encode(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[np.ndarray, int]]:
    """(token ids, UTF-8 bytes) of every text, without special tokens; many at a time, on all cores."""
    from data.tokenizer import pieces, plain_backend

    backend = plain_backend(tokenizer)

    def flush(batch: list[tuple[list[str], int]]) -> Iterator[tuple[np.ndarray, int]]:
        import numpy as np

        encoded = iter(
            backend.encode_batch_fast([part for parts, _ in batch for part in parts], add_special_tokens=False)
        )
        for parts, size in batch:
            yield np.concatenate([np.array(next(encoded).ids, np.int64) for _ in parts]), size

    batch: list[tuple[list[str], int]] = []
    characters = 0
    for text in texts:
        batch.append((list(pieces(text)) or [""], len(text.encode())))
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield from flush(batch)
            batch, characters = [], 0
    if batch:
        yield from flush(batch)


class _Texts:
    """The texts of a source, with a progress bar for each time that they are gone through."""

    def __init__(self, source: Source, label: str):
        self._source, self._label = source, label

    def __iter__(self) -> Iterator[str]:
        from tqdm import tqdm

        bar = tqdm(
            desc=self._label,
            total=self._source.size(),
            unit="B",
            unit_scale=True,
            mininterval=0.5,
            leave=False,
            disable=None,
        )
        with bar:
            for document in self._source:
                yield document.text
                bar.update(len(document.text.encode()))


def _digest(*parts) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class PrepareConfig:
    """Train or load a tokenizer and tokenize text, so that a pretraining run with the same flags starts at once."""

    data: DataConfig = field(default_factory=DataConfig)
    vocab_size: int = 30522
    """Size of a tokenizer that is trained here."""
    causal: bool = False
    """For `clm` instead of `mlm`: a byte-level tokenizer then needs no [MASK]."""
    json: bool = False
    """Print one JSON object as the last line of standard output."""
    debug: bool = False
    """Show the traceback of an error."""


def main(config: PrepareConfig) -> dict:
    """Prepare the text and say what is there."""
    from data.tokenizer import vocabulary_size

    prepared = prepare(config.data, config.vocab_size, for_masked_lm=not config.causal)
    summary: dict = {"vocab_size": vocabulary_size(prepared.tokenizer), "fingerprints": prepared.fingerprints}
    for name in ("train", "validation"):
        store = getattr(prepared, name)
        summary[name] = {key: store.manifest[key] for key in ("documents", "tokens", "bytes")}
        summary[name]["folder"] = str(store.folder)
        documents, tokens, size = (store.manifest[key] for key in ("documents", "tokens", "bytes"))
        print(
            f"{name:10}  {documents:,} documents  {tokens:,} tokens  {size:,} bytes  "
            f"{size / max(tokens, 1):.2f} bytes a token  {store.folder}"
        )
    return summary


if __name__ == "__main__":
    cli.run_config(main, PrepareConfig, prog="prepare")
