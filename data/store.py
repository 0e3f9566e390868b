"""Tokens on disk: memory-mapped shards, the borders of documents, and a manifest that is written last.

<folder>/tokens-00000.bin …   uint16 or uint32, nothing but token ids
         offsets.npy          int64 [documents + 1], in tokens
         manifest.json        counts and fingerprints; without it the folder does not count
"""

from __future__ import annotations

import contextlib
import json
import shutil
import uuid
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cli import UserError

MANIFEST = "manifest.json"
SHARD_TOKENS = 2**28
FORMAT_VERSION = 1


class TokenStore:
    """The tokens of a prepared text, read on demand."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest: dict = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        self.offsets: np.ndarray = np.load(folder / "offsets.npy", mmap_mode="r")
        self._shard_tokens: int = self.manifest["shard_tokens"]
        self._shards = [np.memmap(path, self.manifest["dtype"], mode="r") for path in _shard_files(folder)]

    def take(self, index: np.ndarray) -> np.ndarray:
        """int32 tokens at these places of the stream."""
        if len(self._shards) == 1:
            return self._shards[0][index].astype(np.int32)
        shard, within = np.divmod(index, self._shard_tokens)
        out = np.empty(len(index), np.int32)
        for number in np.unique(shard):
            chosen = shard == number
            out[chosen] = self._shards[number][within[chosen]]
        return out

    def counts(self, size: int, chunk: int = 2**22) -> np.ndarray:
        """int64 [size]: how often each id below `size` occurs."""
        total = np.zeros(size, np.int64)
        for shard in self._shards:
            for start in range(0, len(shard), chunk):
                total += np.bincount(shard[start : start + chunk], minlength=size)
        return total


def exists(folder: Path) -> bool:
    """Whether a whole store of this format is there: a deleted or shortened file makes it count as absent."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        offsets = np.load(folder / "offsets.npy", mmap_mode="r")
        size = sum(path.stat().st_size for path in _shard_files(folder))
        return (
            manifest["format_version"] == FORMAT_VERSION
            and offsets.shape == (manifest["documents"] + 1,)
            and size == manifest["tokens"] * np.dtype(manifest["dtype"]).itemsize
        )
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return False


@contextlib.contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which takes its name when the block ends; an interruption leaves nothing there.

    Where another process was faster its folder stays, for it may be in use, and holds the same.
    """
    unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}")
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"cannot write to {folder.parent} ({error.strerror}); choose another folder (of tokens: --data.cache)"
        ) from error
    try:
        yield unfinished
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_store(
    folder: Path, documents: Iterator[tuple[np.ndarray, int]], dtype: str, about: dict, shard_tokens: int = SHARD_TOKENS
) -> TokenStore:
    """Write (tokens, UTF-8 bytes of the text) of every document into `folder`; memory stays flat."""
    with appearing(folder) as unfinished:
        offsets, bytes_read = array("q", [0]), 0
        with contextlib.ExitStack() as stack:
            file = None
            for tokens, size in documents:
                begin = offsets[-1]
                offsets.append(begin + len(tokens))
                bytes_read += size
                while len(tokens):
                    if file is None or begin % shard_tokens == 0:
                        stack.close()
                        name = f"tokens-{begin // shard_tokens:05}.bin"
                        file = stack.enter_context((unfinished / name).open("wb"))
                    room = shard_tokens - begin % shard_tokens
                    file.write(tokens[:room].astype(dtype).data)
                    begin, tokens = begin + min(room, len(tokens)), tokens[room:]
        np.save(unfinished / "offsets.npy", np.array(offsets, np.int64))
        manifest = about | {
            "format_version": FORMAT_VERSION,
            "documents": len(offsets) - 1,
            "tokens": offsets[-1],
            "bytes": bytes_read,
            "dtype": dtype,
            "shard_tokens": shard_tokens,
        }
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return TokenStore(folder)


def _shard_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("tokens-*.bin"))
