"""Writing tokens to disk (data.store), so that an interruption costs nothing.

An unfinished store lies beside its folder as .<name>.unfinished, with a journal. After an interruption, writing
continues after the last entry, whose data is known to be on disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from espalier.data.documents import Reject
from espalier.data.store import (
    OFFSETS,
    REJECTS,
    Encoded,
    TokenStore,
    bytes_of_bits,
    exists,
    starts_beside,
    write_manifest,
)
from espalier.errors import UserError
from espalier.files import make_folder, sync, sync_path

JOURNAL = "journal.jsonl"
SHARD_TOKENS = 2**26


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
    """Write the encoded documents into `folder`; memory stays flat. An existing store is returned as it is.

    items_from: number of items to leave out → the others, in lists; after each, what is written is safe.
    about: what goes into the manifest beside the counts; where it has `words`, the documents' `starts` are written.
    keep: a reason to drop a document; None = it stays.
    check: is shown the counts after each list and at the end, and may raise. One process writes, others wait for it.
    """
    make_folder(folder.parent)
    with _alone(folder):
        if exists(folder):
            return TokenStore(folder)
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        make_folder(unfinished)
        with _Writer(unfinished, dtype, shard_tokens, "words" in about) as writer:
            for items in items_from(writer.counts["items"]):
                for item in items:
                    writer.add(item, keep)
                writer.commit()
                check(writer.counts, False)
            check(writer.counts, True)
            writer.end()
        manifest = about | writer.counts | {"dtype": dtype}
        write_manifest(unfinished, manifest, [(unfinished / name, n) for name, n in writer.shards()])
        (unfinished / JOURNAL).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        sync_path(unfinished)
        unfinished.rename(folder)
        sync_path(folder.parent)
    return TokenStore(folder)


class _Writer:
    """Appends to the files of an unfinished store. `counts` says what there is, and is the entry of the journal."""

    def __init__(self, folder: Path, dtype: str, shard_tokens: int, with_starts: bool = False):
        self._folder, self._dtype, self._shard_tokens = folder, np.dtype(dtype), shard_tokens
        self._with_starts = with_starts
        self._bits: np.ndarray = np.zeros(0, bool)
        """Word starts that do not yet fill a byte; the journal holds them."""
        self.counts: dict[str, Any] = {"items": 0, "documents": 0, "tokens": 0, "bytes": 0}
        self.counts |= {"records": 0, "rejected": {}, "repaired": {}, "dropped": {}}

    def __enter__(self) -> _Writer:
        rejects, journal = self._recover()
        self._offsets = self._reopen(OFFSETS, 8 * (self.counts["documents"] + 1) if self.counts["items"] else 0)
        self._rejects = self._reopen(REJECTS, rejects)
        self._journal = self._reopen(JOURNAL, journal)
        if not self.counts["items"]:
            self._offsets.write(np.int64(0).tobytes())
        self._open_shard()
        return self

    def __exit__(self, *error: object) -> None:
        for file in (*self._shard_files, self._offsets, self._rejects, self._journal):
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
        ids, starts = item.ids, item.starts
        while len(ids):
            room = self._shard_tokens - counts["tokens"] % self._shard_tokens
            self._shard_files[0].write(ids[:room].astype(self._dtype).data)
            if self._with_starts:
                assert starts is not None
                self._write_starts(starts[:room])
                starts = starts[room:]
            counts["tokens"] += min(room, len(ids))
            ids = ids[room:]
            if counts["tokens"] % self._shard_tokens == 0:
                self.end()
                for file in self._shard_files:
                    file.close()
                self._open_shard()
        counts["documents"] += 1
        counts["bytes"] += item.size
        self._offsets.write(np.int64(counts["tokens"]).tobytes())

    def commit(self) -> None:
        for file in (*self._shard_files, self._offsets, self._rejects):
            sync(file)
        entry = self.counts | {"rejects_size": self._rejects.tell()}
        if self._with_starts:
            entry["bits"] = self._bits.tolist()
        self._journal.write(json.dumps(entry).encode() + b"\n")
        sync(self._journal)

    def end(self) -> None:
        """The shard is whole: its last byte of word starts is filled up with zeros."""
        if self._with_starts:
            self._write_starts(np.zeros(-len(self._bits) % 8, bool))
        for file in self._shard_files:
            sync(file)

    def _write_starts(self, starts: np.ndarray) -> None:
        bits = np.concatenate([self._bits, starts])
        whole = len(bits) // 8 * 8
        self._shard_files[1].write(np.packbits(bits[:whole], bitorder="little").tobytes())
        self._bits = bits[whole:]

    def shards(self) -> list[tuple[str, int]]:
        """(file, tokens) of each."""
        whole, rest = divmod(self.counts["tokens"], self._shard_tokens)
        sizes = [self._shard_tokens] * whole + [rest] * bool(rest)
        if not rest and whole or not sizes:
            for path in self._paths(whole):
                path.unlink(missing_ok=True)
        return [(_shard(self._folder, number).name, size) for number, size in enumerate(sizes)]

    def _recover(self) -> tuple[int, int]:
        """Recover the last entry of the journal whose data the files still hold; start anew if there is none.

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
                bits = entry.pop("bits") if self._with_starts else []
                if all(_size(self._folder / name) >= size for name, size in self._sizes(entry, rejects)):
                    self.counts, self._bits = entry, np.array(bits, bool)
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
            if self._with_starts:
                size = tokens // 8 if number == whole else bytes_of_bits(tokens)
                yield starts_beside(_shard(self._folder, number)).name, size

    def _reopen(self, name: str, size: int):
        file = (self._folder / name).open("ab")
        # The file may be longer than its last entry says, never shorter: truncate would fill it up with zeros.
        assert os.fstat(file.fileno()).st_size >= size
        file.truncate(size)
        sync_path(self._folder)
        return file

    def _open_shard(self) -> None:
        number, within = divmod(self.counts["tokens"], self._shard_tokens)
        sizes = (within * self._dtype.itemsize, within // 8)
        paths = self._paths(number)
        self._shard_files = [self._reopen(path.name, size) for path, size in zip(paths, sizes, strict=False)]

    def _paths(self, number: int) -> list[Path]:
        """The files of a shard: tokens and, where they are kept, word starts."""
        path = _shard(self._folder, number)
        return [path, starts_beside(path)] if self._with_starts else [path]


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time writes this store; when it ends, in whatever way, the next one may."""
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


def _size(path: Path) -> int:
    """0 where it is not there."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
