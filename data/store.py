"""Tokens on disk: memory-mapped shards, the borders of documents, and a manifest that is written last.

<folder>/tokens-00000.bin …   uint16 or uint32, nothing but token ids
         offsets.bin          int64 [documents + 1], in tokens
         rejects.jsonl        what could not be read: where, kind, message
         manifest.json        counts, fingerprints, SHA-256 of every file and of its own content; without it the folder
                              does not count

While a store is written it lies beside that as .<name>.unfinished with a journal: after an interruption, writing goes
on behind the last entry, of which everything is known to be on the disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cli import UserError
from data.documents import Reject

MANIFEST, OFFSETS, REJECTS, JOURNAL = "manifest.json", "offsets.bin", "rejects.jsonl", "journal.jsonl"
SHARD_TOKENS = 2**26
FORMAT_VERSION = 3


class Encoded(NamedTuple):
    """The tokens of a document, and the UTF-8 bytes and the characters of its text."""

    ids: np.ndarray
    size: int
    characters: int


class TokenStore:
    """The tokens of a prepared text, read on demand. A shard that is not what was written is found at its first use."""

    label = "the text"
    """What it holds, for messages."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest: dict = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        self._check(MANIFEST)
        self._check(OFFSETS)
        self.offsets: np.ndarray = _map(folder / OFFSETS, np.dtype(np.int64))
        self._names = [shard["file"] for shard in self.manifest["shards"]]
        self._begins = np.cumsum([0, *(shard["tokens"] for shard in self.manifest["shards"])])
        self._shards: dict[int, np.ndarray] = {}
        self._opening = threading.Lock()

    def take(self, index: np.ndarray) -> np.ndarray:
        """int32 tokens at these places of the stream."""
        if len(self._names) == 1:
            return self._shard(0)[index].astype(np.int32)
        number_I = np.searchsorted(self._begins, index, side="right") - 1
        out = np.empty(len(index), np.int32)
        for number in np.unique(number_I).tolist():
            chosen = number_I == number
            out[chosen] = self._shard(number)[index[chosen] - self._begins[number]]
        return out

    def counts(self, size: int, chunk: int = 2**22) -> np.ndarray:
        """int64 [size]: how often each id below `size` occurs."""
        total = np.zeros(size, np.int64)
        for number in range(len(self._names)):
            shard = self._shard(number)
            for start in range(0, len(shard), chunk):
                total += np.bincount(shard[start : start + chunk], minlength=size)
        return total

    def damaged(self) -> list[Path]:
        """Every file of the store whose content is not what was written."""
        names = [MANIFEST, OFFSETS, REJECTS, *self._names]
        with ThreadPoolExecutor() as pool:
            intact = pool.map(self._intact, names)
            return [self.folder / name for name, whole in zip(names, intact, strict=True) if not whole]

    def _shard(self, number: int) -> np.ndarray:
        if number not in self._shards:
            with self._opening:
                if number not in self._shards:
                    self._check(self._names[number])
                    path = self.folder / self._names[number]
                    self._shards[number] = _map(path, np.dtype(self.manifest["dtype"]))
        return self._shards[number]

    def _intact(self, name: str) -> bool:
        try:
            if name == MANIFEST:
                found = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
                return found["sum"] == _sum_of_manifest(found)
            return _sum(self.folder / name) == self.manifest["sha256"][name]
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
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextlib.contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which takes its name when the block ends; an interruption leaves nothing there.

    Where another process was faster its folder stays, for it may be in use, and holds the same.
    """
    unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}")
    make_folder(unfinished)
    try:
        yield unfinished
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to {folder.parent} ({error.strerror}); choose another folder (of tokens: --data.cache)"
        ) from error


def write_store(
    folder: Path,
    items_from: Callable[[int], Iterator[list[Encoded | Reject]]],
    dtype: str,
    about: dict,
    *,
    check: Callable[[dict[str, Any], bool], None] = lambda counts, ended: None,
    keep: Callable[[Encoded], str | None] = lambda encoded: None,
    shard_tokens: int = SHARD_TOKENS,
) -> TokenStore:
    """Write the encoded documents into `folder`; memory stays flat. Where the store is there already, it is taken.

    items_from: number of items to leave out → the others, in lists; after each, what is written is safe.
    about: what goes into the manifest beside the counts. keep: a reason to drop a document; None = it stays.
    check: is shown the counts after each list and at the end, and may raise. One process writes, others wait for it.
    """
    make_folder(folder.parent)
    with _alone(folder):
        if exists(folder):
            return TokenStore(folder)
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        make_folder(unfinished)
        with _Writer(unfinished, dtype, shard_tokens) as writer:
            for items in items_from(writer.counts["items"]):
                for item in items:
                    writer.add(item, keep)
                writer.commit()
                check(writer.counts, False)
            check(writer.counts, True)
        manifest = about | writer.counts | {"dtype": dtype}
        write_manifest(unfinished, manifest, [(unfinished / name, n) for name, n in writer.shards()])
        (unfinished / JOURNAL).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        _sync_folder(unfinished)
        unfinished.rename(folder)
        _sync_folder(folder.parent)
    return TokenStore(folder)


def write_manifest(folder: Path, manifest: dict, shards: list[tuple[Path, int]]) -> None:
    """The manifest of a folder with offsets, rejects and these shards (path, tokens): all sums are taken here."""
    paths = [path for path, _ in shards] + [folder / OFFSETS, folder / REJECTS]
    with ThreadPoolExecutor() as pool:
        sums = dict(zip([path.name for path in paths], pool.map(_sum, paths), strict=True))
    entries = [{"file": path.name, "tokens": tokens} for path, tokens in shards]
    size = (folder / REJECTS).stat().st_size
    manifest = manifest | {"format_version": FORMAT_VERSION, "rejects_size": size, "shards": entries, "sha256": sums}
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(json.dumps(manifest | {"sum": _sum_of_manifest(manifest)}, indent=1) + "\n")
        _sync(file)


class _Writer:
    """Appends to the files of an unfinished store. `counts` says what there is, and is the entry of the journal."""

    def __init__(self, folder: Path, dtype: str, shard_tokens: int):
        self._folder, self._dtype, self._shard_tokens = folder, np.dtype(dtype), shard_tokens
        self.counts: dict[str, Any] = {"items": 0, "documents": 0, "tokens": 0, "bytes": 0}
        self.counts |= {"records": 0, "rejected": {}, "repaired": {}, "dropped": {}}

    def __enter__(self) -> _Writer:
        rejects, journal = self._recover()
        self._offsets = self._reopen(OFFSETS, 8 * (self.counts["documents"] + 1) if self.counts["items"] else 0)
        self._rejects = self._reopen(REJECTS, rejects)
        self._journal = self._reopen(JOURNAL, journal)
        if not self.counts["items"]:
            self._offsets.write(np.int64(0).tobytes())
        self._tokens = self._open_shard()
        return self

    def __exit__(self, *error: object) -> None:
        for file in (self._tokens, self._offsets, self._rejects, self._journal):
            file.close()

    def add(self, item: Encoded | Reject, keep: Callable[[Encoded], str | None]) -> None:
        counts = self.counts
        counts["items"] += 1
        if isinstance(item, Reject):
            kinds = counts["rejected" if item.dropped else "repaired"]
            kinds[item.kind] = kinds.get(item.kind, 0) + 1
            counts["records"] += item.dropped
            self._rejects.write(json.dumps(item._asdict(), ensure_ascii=False).encode(errors="replace") + b"\n")
            return
        counts["records"] += 1
        reason = keep(item)
        if reason:
            counts["dropped"][reason] = counts["dropped"].get(reason, 0) + 1
            return
        ids = item.ids
        while len(ids):
            room = self._shard_tokens - counts["tokens"] % self._shard_tokens
            self._tokens.write(ids[:room].astype(self._dtype).data)
            counts["tokens"] += min(room, len(ids))
            ids = ids[room:]
            if counts["tokens"] % self._shard_tokens == 0:
                _sync(self._tokens)
                self._tokens.close()
                self._tokens = self._open_shard()
        counts["documents"] += 1
        counts["bytes"] += item.size
        self._offsets.write(np.int64(counts["tokens"]).tobytes())

    def commit(self) -> None:
        for file in (self._tokens, self._offsets, self._rejects):
            _sync(file)
        entry = json.dumps(self.counts | {"rejects_size": self._rejects.tell()})
        self._journal.write(entry.encode() + b"\n")
        _sync(self._journal)

    def shards(self) -> list[tuple[str, int]]:
        """(file, tokens) of each."""
        whole, rest = divmod(self.counts["tokens"], self._shard_tokens)
        sizes = [self._shard_tokens] * whole + [rest] * bool(rest)
        if not rest and whole or not sizes:
            _shard(self._folder, whole).unlink(missing_ok=True)
        return [(_shard(self._folder, number).name, size) for number, size in enumerate(sizes)]

    def _recover(self) -> tuple[int, int]:
        """Take up the last entry of the journal of which the files still hold everything; where there is none, nothing.

        Returns the sizes of the rejects and of the journal then.
        """
        content = b""
        with contextlib.suppress(OSError):
            content = (self._folder / JOURNAL).read_bytes()
        while end := content.rfind(b"\n") + 1:
            begin = content.rfind(b"\n", 0, end - 1) + 1
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(content[begin:end])
                rejects = entry.pop("rejects_size")
                if all(_size(self._folder / name) >= size for name, size in self._sizes(entry, rejects)):
                    self.counts = entry
                    return rejects, end
            content = content[:begin]
        return 0, 0

    def _sizes(self, entry: dict[str, Any], rejects: int) -> Iterator[tuple[str, int]]:
        """(file, bytes) that belong to an entry of the journal, each at least."""
        yield OFFSETS, 8 * (entry["documents"] + 1)
        yield REJECTS, rejects
        whole, rest = divmod(entry["tokens"], self._shard_tokens)
        for number, tokens in enumerate([self._shard_tokens] * whole + [rest]):
            yield _shard(self._folder, number).name, tokens * self._dtype.itemsize

    def _reopen(self, name: str, size: int):
        file = (self._folder / name).open("ab")
        # Longer by what no entry tells of; never shorter, which would be filled up with zeros.
        assert os.fstat(file.fileno()).st_size >= size
        file.truncate(size)
        _sync_folder(self._folder)
        return file

    def _open_shard(self):
        number, within = divmod(self.counts["tokens"], self._shard_tokens)
        return self._reopen(_shard(self._folder, number).name, within * self._dtype.itemsize)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time writes this store; its end, however it comes, lets the next one in."""
    with folder.with_name(f".{folder.name}.lock").open("a") as lock:
        told = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    print(f"another process is preparing {folder}; waiting for it", flush=True)
                    told = True
                time.sleep(0.5)
                continue
            except OSError as error:
                raise UserError(
                    f"{folder.parent} is on a file system without locks ({error.strerror}); choose another folder of "
                    "tokens: --data.cache"
                ) from error
            break
        yield


def _shard(folder: Path, number: int) -> Path:
    return folder / f"tokens-{number:05}.bin"


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sum_of_manifest(manifest: dict) -> str:
    """SHA-256 of all that it says but this."""
    content = json.dumps({key: value for key, value in manifest.items() if key != "sum"}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _size(path: Path) -> int:
    """0 where it is not there."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _sync_folder(folder: Path) -> None:
    """What is new in a folder has its name for good."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
