"""A small prepared text, and documents of bare tokens, for the tests of data.prepare and data.store."""

import pathlib

import numpy as np

from espalier.data.config import DataConfig
from espalier.data.prepare import prepare
from espalier.data.store import Encoded


def scenes(shared_data, tmp_path) -> DataConfig:
    """A few scenes of Shakespeare as documents, with a cache of its own."""
    scenes = (shared_data / "tinyshakespeare" / "input.txt").read_text()[:60_000].split("\n\n")
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text("\n\n".join(scenes[number::6]))
    files = tuple(str(tmp_path / f"{number}.txt") for number in range(4))
    held_out = tuple(str(tmp_path / f"{number}.txt") for number in (4, 5))
    return DataConfig(files=files, validation_files=held_out, tokenizer_kind="bpe", cache=str(tmp_path / "cache"))


def run(config, vocab_size=500, for_masked_lm=True, of_weights=None):
    return prepare(config, vocab_size, for_masked_lm=for_masked_lm, of_weights=of_weights)


def text_of(store, tokenizer) -> list[str]:
    return [
        tokenizer.decode(store.take(np.arange(a, b))) for a, b in zip(store.offsets, store.offsets[1:], strict=False)
    ]


def documents(lengths):
    return [(np.arange(length) + 10 * number, length) for number, length in enumerate(lengths)]


def items(documents):
    """What write_store asks for: the documents behind the first `done`, each in a list of its own."""
    return lambda done: ([Encoded(tokens, size, size, begins_of(tokens))] for tokens, size in documents[done:])


def begins_of(tokens: np.ndarray) -> np.ndarray:
    return tokens * 7 % 5 < 2


def flip(path: pathlib.Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 16
    path.write_bytes(content)
