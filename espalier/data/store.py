"""Tokens on disk: memory-mapped shards, document boundaries, and a manifest that is written last.

<folder>/tokens-00000.bin …   uint16 or uint32, nothing but token ids
         starts-00000.bin …   on request: one bit per token of that shard, whether it begins a word
         offsets.bin          int64 [documents + 1], in tokens
         rejects.jsonl        what could not be read: where, kind, message
         manifest.json        counts, fingerprints, SHA-256 of every file and of its own content; without it the folder
                              does not count

data.store_writer writes it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from espalier.errors import UserError
from espalier.files import inside, sha256_of_file, sha256_of_text, sync

DTYPES = ("uint16", "uint32")
MANIFEST, OFFSETS, REJECTS = "manifest.json", "offsets.bin", "rejects.jsonl"
FORMAT_VERSION = 3


class Encoded(NamedTuple):
    """The tokens of a document, the UTF-8 bytes and the characters of its text, and which tokens begin a word."""

    ids: np.ndarray
    size: int
    characters: int
    starts: np.ndarray | None = None


class TokenStore:
    """The tokens of a prepared text, read on demand. A corrupt shard is detected at its first use."""

    label = "the text"
    """What it holds, for messages."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest: dict = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        self._check(MANIFEST)
        if self.manifest["dtype"] not in DTYPES:
            raise UserError(f"{folder / MANIFEST} has tokens of type {self.manifest['dtype']}; they are {DTYPES}")
        self._check(OFFSETS)
        self.offsets: np.ndarray = _map(folder / OFFSETS, np.dtype(np.int64))
        self._names = [shard["file"] for shard in self.manifest["shards"]]
        self._starts = [shard["starts"] for shard in self.manifest["shards"] if "starts" in shard]
        self._begins = np.cumsum([0, *(shard["tokens"] for shard in self.manifest["shards"])])
        self._mapped: dict[str, np.ndarray] = {}
        self._opening = threading.Lock()

    def take(self, index: np.ndarray) -> np.ndarray:
        """int32 tokens at these places of the stream."""
        return self._at(index, np.dtype(np.int32), self._take)

    def word_starts(self, index: np.ndarray) -> np.ndarray:
        """bool: whether the tokens at these places begin a word; only where the manifest names segmenters (`words`)."""
        return self._at(index, np.dtype(bool), self._word_starts)

    def counts(self, size: int, chunk: int = 2**22) -> np.ndarray:
        """int64 [size]: how often each id below `size` occurs."""
        total = np.zeros(size, np.int64)
        for number in range(len(self._names)):
            shard = self._shard(self._names[number])
            for start in range(0, len(shard), chunk):
                total += np.bincount(shard[start : start + chunk], minlength=size)
        return total

    def damaged(self) -> list[Path]:
        """Every file of the store that is corrupt."""
        names = [MANIFEST, OFFSETS, REJECTS, *self._names, *self._starts]
        with ThreadPoolExecutor() as pool:
            intact = pool.map(self._intact, names)
            return [self.folder / name for name, whole in zip(names, intact, strict=True) if not whole]

    def _at(self, index: np.ndarray, dtype: np.dtype, read: Callable[[int, np.ndarray], np.ndarray]) -> np.ndarray:
        """What `read` finds in each shard at these places of the stream."""
        if len(self._names) == 1:
            return read(0, index).astype(dtype)
        number_I = np.searchsorted(self._begins, index, side="right") - 1
        out = np.empty(len(index), dtype)
        for number in np.unique(number_I).tolist():
            chosen = number_I == number
            out[chosen] = read(number, index[chosen] - self._begins[number])
        return out

    def _take(self, number: int, within: np.ndarray) -> np.ndarray:
        return self._shard(self._names[number])[within]

    def _word_starts(self, number: int, within: np.ndarray) -> np.ndarray:
        return self._shard(self._starts[number], "uint8")[within >> 3] >> (within & 7).astype(np.uint8) & 1

    def _shard(self, name: str, dtype: str | None = None) -> np.ndarray:
        """A file of tokens, or of another dtype."""
        if name not in self._mapped:
            with self._opening:
                if name not in self._mapped:
                    self._check(name)
                    path = inside(self.folder, name, self.folder / MANIFEST)
                    self._mapped[name] = _map(path, np.dtype(dtype or self.manifest["dtype"]))
        return self._mapped[name]

    def _intact(self, name: str) -> bool:
        try:
            if name == MANIFEST:
                found = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
                return found["sum"] == _sum_of_manifest(found)
            return sha256_of_file(inside(self.folder, name, self.folder / MANIFEST)) == self.manifest["sha256"][name]
        except UserError:
            raise
        except (OSError, ValueError, KeyError):
            return False

    def _check(self, name: str) -> None:
        if not self._intact(name):
            raise UserError(
                f"{self.folder / name} is damaged: its SHA-256 is not that of the manifest; delete the folder "
                f"{self.folder} and prepare the text again"
            )


def exists(folder: Path) -> bool:
    """Whether a whole store of this format is there: a deleted or shortened file makes it count as absent."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        width = np.dtype(manifest["dtype"]).itemsize
        return (
            manifest["format_version"] == FORMAT_VERSION
            and (folder / OFFSETS).stat().st_size == 8 * (manifest["documents"] + 1)
            and (folder / REJECTS).stat().st_size == manifest["rejects_size"]
            and all((folder / s["file"]).stat().st_size == width * s["tokens"] for s in manifest["shards"])
            and all(
                (folder / s["starts"]).stat().st_size == bytes_of_bits(s["tokens"])
                for s in manifest["shards"]
                if "starts" in s
            )
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_manifest(folder: Path, manifest: dict, shards: list[tuple[Path, int]]) -> None:
    """The manifest of a folder with offsets, rejects and these shards (path, tokens): all sums are taken here.

    Where it has `words`, the file of word starts of each shard is beside it.
    """
    starts = {path: starts_beside(path) for path, _ in shards if "words" in manifest}
    paths = [path for path, _ in shards] + list(starts.values()) + [folder / OFFSETS, folder / REJECTS]
    with ThreadPoolExecutor() as pool:
        sums = dict(zip([path.name for path in paths], pool.map(sha256_of_file, paths), strict=True))
    entries = [
        {"file": path.name, "tokens": tokens} | ({"starts": starts[path].name} if path in starts else {})
        for path, tokens in shards
    ]
    size = (folder / REJECTS).stat().st_size
    manifest = manifest | {"format_version": FORMAT_VERSION, "rejects_size": size, "shards": entries, "sha256": sums}
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(json.dumps(manifest | {"sum": _sum_of_manifest(manifest)}, indent=1) + "\n")
        sync(file)


def starts_beside(shard: Path) -> Path:
    """The file of word starts that belongs to a shard."""
    return shard.with_name(shard.name.replace("tokens-", "starts-"))


def bytes_of_bits(count: int) -> int:
    return -(-count // 8)


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)


def _sum_of_manifest(manifest: dict) -> str:
    """SHA-256 of all that it says but this."""
    content = json.dumps({key: value for key, value in manifest.items() if key != "sum"}, sort_keys=True)
    return sha256_of_text(content)
