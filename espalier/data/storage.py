"""Where bytes come from: local files and URLs, decompressed where they end in .gz or .zst.

The files behind URLs are those of data.remote.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from espalier.data.remote import RemoteFile, is_remote, remote_digest, remote_paths, remote_stat
from espalier.errors import UserError
from espalier.files import sha256_of_file, sha256_of_text, write_json

SUMS_KEPT_AFTER = 2.0
"""Seconds a file must have been left alone for its sum to be remembered: a later change shows in its time of change."""


def expand(patterns: tuple[str, ...], known: Callable[[str], bool]) -> list[str]:
    """Paths and URLs of the files that the globs match, each once and in the order of their full names.

    So the result does not depend on who expands a glob, and from which folder. known: whether a suffix is supported.
    """
    found: dict[str, str] = {}
    for pattern in patterns:
        for path in remote_paths(pattern) if is_remote(pattern) else _local_paths(pattern):
            found.setdefault(path if is_remote(path) else os.path.abspath(path), path)
    for path in found.values():
        if not known(path):
            raise UserError(f"{path}: unknown kind of file; text is read from {SUFFIXES}, each also as .gz and .zst")
    return [found[name] for name in sorted(found)]


SUFFIXES = ".txt, .md, .jsonl, .parquet, .csv"


def plain_name(path: str) -> str:
    """The path without the query string of a URL, so that it ends in the suffix."""
    return path.split("?")[0] if path.startswith(("http://", "https://")) else path


@contextlib.contextmanager
def open_file(path: str) -> Iterator[IO[bytes]]:
    """The bytes of a local or remote file, unpacked where its name ends in .gz or .zst.

    Raises OSError where the file cannot be opened or read, one of damaged_errors() where it is cut off or damaged.
    """
    with contextlib.ExitStack() as stack:
        if is_remote(path):  # noqa: SIM108
            raw = cast(IO[bytes], io.BufferedReader(RemoteFile(path), 2**20))
        else:
            raw = open(path, "rb")  # noqa: SIM115 (the stack closes it)
        file = stack.enter_context(raw)
        if plain_name(path).endswith(".gz"):
            file = stack.enter_context(cast(IO[bytes], gzip.GzipFile(fileobj=file)))
        elif plain_name(path).endswith(".zst"):
            import zstandard

            file = stack.enter_context(
                io.BufferedReader(_Whole(zstandard.ZstdDecompressor(max_window_size=2**31), file), 2**20)
            )
        yield file


def damaged_errors() -> tuple[type[Exception], ...]:
    """What reading a truncated or corrupt compressed file raises."""
    import zlib

    import zstandard

    return EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError


def size(path: str) -> int | None:
    """Bytes as stored; None where they are packed, unknown or cannot be asked for."""
    if plain_name(path).endswith((".gz", ".zst", ".parquet")):
        return None
    try:
        return remote_stat(path)[0] if is_remote(path) else os.path.getsize(path)
    except OSError:
        return None


def digest(path: str, cache: Path | None = None) -> str:
    """A digest of the content: its SHA-256, or for a remote file the checksum kept by its storage, if any.

    The sum of a local file is remembered in `cache`, by path, size and times of change, so that a terabyte is not read
    at each start: also by that of the inode, which the system sets and no tool turns back.
    """
    if is_remote(path):
        return remote_digest(path)
    try:
        status = os.stat(path)
        key = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
        place = cache and cache / "sums" / sha256_of_text(os.path.realpath(path))[:32]
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            known = json.loads(place.read_text()) if place else {"key": None}
            if known["key"] == key:
                return str(known["sha256"])
        found = sha256_of_file(path)
    except OSError as error:
        return f"unreadable {error.errno}"
    if place and time.time() - max(status.st_mtime, status.st_ctime) > SUMS_KEPT_AFTER:
        with contextlib.suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            write_json(place, {"key": key, "sha256": found})
    return found


class _Whole(io.RawIOBase):
    """Zstandard frames one after the other; EOFError where the last is cut off, which the library does not report."""

    def __init__(self, decompressor: Any, file: IO[bytes]):
        self._new = decompressor.decompressobj
        self._file, self._frame, self._begun, self._rest = file, None, False, b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._rest or self._file.read(2**17)
            self._rest = b""
            if not packed:
                if self._frame is not None:
                    raise EOFError("the compressed file ends in the middle")
                if not self._begun:
                    raise EOFError("the compressed file is empty")
                return 0
            if self._frame is None:
                self._frame, self._begun = self._new(), True
            self._ready = memoryview(self._frame.decompress(packed))
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


def _local_paths(pattern: str) -> list[str]:
    name = os.path.expanduser(pattern)
    if os.path.isdir(name):
        raise UserError(
            f"{pattern} is a folder; name its files, for instance '{pattern.rstrip('/')}/**/*.txt' (a glob in quotes "
            "leaves folders out)"
        )
    # A dangling link counts as an unreadable file, not as a missing one.
    found = [name] if os.path.lexists(name) else [p for p in glob.glob(name, recursive=True) if not os.path.isdir(p)]
    if not found:
        raise UserError(f"no file matches {pattern}; check the path (now in {os.getcwd()}) and quote globs")
    return found
