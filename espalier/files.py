"""Files that are whole or not there, and the SHA-256 sums that caches and checks go by."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Literal, overload

from espalier.errors import UserError

StrPath = str | os.PathLike[str]


@overload
def replacing(path: StrPath, mode: Literal["w"] = "w") -> contextlib.AbstractContextManager[IO[str]]: ...


@overload
def replacing(path: StrPath, mode: Literal["wb"]) -> contextlib.AbstractContextManager[IO[bytes]]: ...


@contextlib.contextmanager
def replacing(path: StrPath, mode: Literal["w", "wb"] = "w") -> Iterator[IO[Any]]:
    """A file, UTF-8 unless "wb", that takes the place of `path` when the block ends; an error leaves the old one there.

    A reader sees the old contents or the new, whole, even after the machine has died.
    """
    path = Path(path)
    unfinished = _beside(path)
    try:
        with unfinished.open(mode, encoding=None if mode == "wb" else "utf-8") as file:
            yield file
            sync(file)
        os.replace(unfinished, path)
    except OSError as error:
        # What a full disk says does not name the file.
        if error.filename is None:
            error.filename = os.fspath(path)
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: StrPath, value: Any) -> None:
    """Replace the file by this value as JSON, one line an entry."""
    with replacing(path) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: StrPath) -> dict[str, Any]:
    """The JSON object in a file; UserError for anything else."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return values


@contextlib.contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which takes its name when the block ends; an error leaves nothing there.

    Where another process was faster its folder stays, for it may be in use, and holds the same.
    """
    unfinished = _beside(folder)
    make_folder(unfinished)
    try:
        yield unfinished
        sync_tree(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():
                raise
        sync_path(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def make_folder(folder: Path) -> None:
    """Make it and its parents where they are not there; UserError where that is not allowed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to {folder.parent} ({error.strerror}); choose another folder (of tokens: --data.cache)"
        ) from error


def inside(folder: Path, name: object, source: object) -> Path:
    """The path of a file that a manifest or index (`source`) names in its folder; it need not be there.

    UserError for a name that leads elsewhere, by `..`, as an absolute path or through a link: whoever wrote the index
    must not choose what else is read or written. In the cache of the Hub, files are links to the blobs of their
    repository, which are of it.
    """
    bad = not isinstance(name, str) or not name or "\0" in name or "\\" in name
    if bad or os.path.isabs(str(name)) or ".." in Path(str(name)).parts:
        raise UserError(f"{source} names the file {str(name)[:200]!r}; only files within its folder are read")
    path = folder / str(name)
    home = folder.resolve()
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    there = path.resolve()
    if not any(there.is_relative_to(one) for one in homes):
        raise UserError(f"{source} names {name}, a link that leads out of its folder, to {there}; copy the file there")
    return path


def sync(file: IO[Any]) -> None:
    """Wait until the disk holds all that was written to the file."""
    file.flush()
    os.fsync(file.fileno())


def sync_path(path: StrPath) -> None:
    """Wait until the disk holds the contents of a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Wait until the disk holds a folder with everything in it."""
    for path in (*folder.rglob("*"), folder):
        sync_path(path)


def sha256_of_file(path: StrPath) -> str:
    """In hexadecimal digits. OSError where the file cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_text(text: str) -> str:
    """Of its UTF-8 bytes, in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_of_lines(lines: Iterable[str]) -> str:
    """That of the text "\\n".join(lines), which is never held."""
    whole = hashlib.sha256()
    for number, line in enumerate(lines):
        whole.update(f"\n{line}".encode() if number else line.encode())
    return whole.hexdigest()


def hash_of_text(text: str) -> int:
    """The first 64 bits of its SHA-256: the same number everywhere and always, as `hash` is not."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def cache_key(*parts: object) -> str:
    """24 hexadecimal digits that name what depends on `parts` alone; each is told apart by its repr."""
    return sha256_of_text(repr(parts))[:24]


def _beside(path: Path) -> Path:
    """A hidden name in the same folder, hence on the same disk, that nothing else has."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
