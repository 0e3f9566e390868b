"""The manifest of a checkpoint: SHA-256 and size of every file, written last, under a seal of its own.

A checkpoint counts only once its manifest is there, and nothing is read whose contents are not those of its manifest.
Several processes share the files out among them. Beside the folders of steps there may be

    <step>.unfinished    a file, there from before a checkpoint is begun until its manifest is on the disk
    <step>.removed       a folder that is being deleted
    <step>.damaged       a checkpoint that was set aside (`training.fallback`)

so that a folder without manifest is known for what it is: one whose writer was killed, or one that has lost it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax

from espalier.errors import UserError
from espalier.files import inside, sha256_of_text, write_json
from sharding.processes.coordination import LONG_WAIT, from_first, gather

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SETTLED = 2.0
"""Seconds after which a file that changes again has another time of change, on any disk."""


class Manifest(NamedTuple):
    """What a checkpoint was when it was written."""

    sums: dict[str, str]
    """File, relative to the folder of its step → SHA-256."""
    sizes: dict[str, int]
    """The same → bytes; empty in checkpoints of earlier versions."""


Found = tuple[str, int]
"""SHA-256 and bytes of a file; of one that has another size than it should, or cannot be read: that in words, and
-1."""

_known: dict[Path, tuple[tuple[int, ...], Found]] = {}
"""File → what it was when it was hashed, and what was found: a run that goes on reads its checkpoint once for its sums,
not again for each part that it takes."""


class Damage(Exception):
    """What is wrong with a manifest, in words."""


def complete_steps(folder: Path) -> list[int]:
    """Steps with a complete checkpoint, oldest first."""
    return [step for step in step_folders(folder) if (folder / str(step) / MANIFEST).exists()]


def step_folders(folder: Path) -> list[int]:
    """Steps with a folder, complete or not, in their order."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal()) if folder.is_dir() else []


def unfinished(folder: Path, step: int) -> Path:
    """The file that says that the checkpoint of this step is being written."""
    return folder / f"{step}.unfinished"


def is_unfinished(folder: Path, step: int) -> bool:
    """Whether the writer of a checkpoint was stopped before its end."""
    return unfinished(folder, step).exists() and not (folder / str(step) / MANIFEST).exists()


def write_manifest(folder: Path) -> int:
    """Write the manifest of a step's folder, all processes together; returns the bytes it covers."""
    files = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
    files = from_first("files of the manifest", files, LONG_WAIT)
    found = _found(folder, dict.fromkeys(files), "sums of the manifest", remembered=False)
    unread = [f"{name} {words}" for name, (words, size) in found.items() if size < 0]
    if unread:
        raise OSError(errno.EIO, f"it cannot be read again: {unread[0]}")
    if jax.process_index() == 0:
        sums, sizes = ({name: pair[place] for name, pair in found.items()} for place in (0, 1))
        held = {"format_version": FORMAT_VERSION, "sha256": sums, "bytes": sizes}
        write_json(folder / MANIFEST, held | {"seal": _seal(held)})
    return sum(size for _, size in found.values())


def read_manifest(folder: Path) -> Manifest:
    """Raises Damage; UserError where another version of this code wrote it."""
    try:
        held: Any = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Damage(f"{MANIFEST} is gone") from None
    except OSError as error:
        raise Damage(f"{MANIFEST} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise Damage(f"{MANIFEST} is not as it was written") from None
    if isinstance(held, dict) and _authentic(held):
        version, sums, sizes = held["format_version"], held.get("sha256"), held.get("bytes", {})
        if version != FORMAT_VERSION:
            raise UserError(
                f"{folder} has format version {version} and this code reads {FORMAT_VERSION}; use its own code"
            )
        if isinstance(sums, dict) and isinstance(sizes, dict) and all(_inside(folder, name) for name in sums):
            return Manifest(sums, sizes)
    raise Damage(f"{MANIFEST} is not as it was written")


def fault(folder: Path, items: Collection[str] | None = None, together: bool = False) -> str | None:
    """What of these items (default: of all) is not as it was written, in words: the first file and what is wrong.

    None = nothing. together: all processes are here, and each reads a part. What was found sound is not read again by
    this process as long as the files stay what they are. UserError where another version of this code wrote it.
    """
    found: list[Any] = ["", {}, {}]
    if not together or jax.process_index() == 0:
        try:
            found[1:] = read_manifest(folder)
        except (Damage, UserError) as error:
            found[0] = [type(error).__name__, str(error)]
    if together:
        found = from_first(f"manifest of checkpoint {folder.name}", found, LONG_WAIT)
    failed, sums, sizes = found
    if failed:
        if failed[0] == UserError.__name__:
            raise UserError(failed[1])
        return failed[1]
    wanted = {name: sizes.get(name) for name in sorted(sums) if items is None or name.split("/")[0] in items}
    there = _found(folder, wanted, f"sums of checkpoint {folder.name}" if together else None)
    for name in wanted:
        words, size = there[name]
        if words != sums[name]:
            return f"{name} {words if size < 0 else 'is not as it was written'}"
    return None


def fault_by_size(folder: Path) -> str | None:
    """As `fault` of everything, by names and sizes alone: what a disk that was full or a copy that was cut has left."""
    try:
        held = read_manifest(folder)
    except Damage as error:
        return str(error)
    for name in held.sums:
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            return f"{name} is gone" if isinstance(error, FileNotFoundError) else f"{name}: {error.strerror}"
        if size != held.sizes.get(name, size):
            return f"{name} has {size:,} bytes of {held.sizes[name]:,}"
    return None


def verify(folder: Path, item: str, together: bool = False) -> None:
    """UserError unless every file of the item is there with the contents it was written with; arguments as in
    `fault`."""
    found = fault(folder, [item], together)
    if found:
        run = folder.parent.parent
        others = [str(step) for step in complete_steps(folder.parent) if str(step) != folder.name]
        rest = f"there are also {', '.join(others)}: `./launch.sh checkpoint verify {run}` says which are sound"
        raise UserError(f"checkpoint {folder} is damaged: {found}; {rest if others else 'restore it from a copy'}")


def size_of(path: Path) -> int:
    """Bytes of a file, 0 for one that is not there."""
    try:
        return path.stat().st_size
    except FileNotFoundError:  # renamed just now
        return 0


def bytes_in(folder: Path) -> int:
    """Bytes of all files in a folder, at any depth."""
    return sum(size_of(Path(place, name)) for place, _, names in os.walk(folder) for name in names)


def _seal(held: dict[str, Any]) -> str:
    return sha256_of_text(json.dumps(held, sort_keys=True, ensure_ascii=False))


def _authentic(held: dict[str, Any]) -> bool:
    rest = {name: value for name, value in held.items() if name != "seal"}
    # Those of earlier versions have no seal.
    return held["seal"] == _seal(rest) if "seal" in held else rest.keys() == {"format_version", "sha256"}


def _inside(folder: Path, name: str) -> bool:
    """Whether a file that the manifest names is within its folder."""
    try:
        inside(folder, name, MANIFEST)
    except UserError:
        return False
    return True


def _found(folder: Path, sizes: dict[str, int | None], what: str | None, remembered: bool = True) -> dict[str, Found]:
    """What these files are; sizes: what they should have.

    what: under which name the processes share them out; None = this one alone reads them all.
    """
    names = list(sizes)
    mine = names[jax.process_index() :: jax.process_count()] if what else names
    found = {name: _read(folder / name, sizes[name], remembered) for name in mine}
    if not what:
        return found
    found = {name: tuple(one) for part in gather(what, found, LONG_WAIT) for name, one in part.items()}
    if remembered and jax.process_count() > 1:
        # The parts of an item are shared out otherwise than those of a whole checkpoint.
        for name, one in found.items():
            if one[1] >= 0 and (state := _state(folder / name)):
                _known[folder / name] = state, one
    return found


def _read(path: Path, size: int | None, remembered: bool) -> Found:
    try:
        state = _state(path) if remembered else None
        if state and path in _known and _known[path][0] == state:
            return _known[path][1]
        with path.open("rb") as file:
            # Asked once it is open: network disks may remember an older size of what is not.
            there = os.fstat(file.fileno()).st_size
            if size is not None and there != size:
                return f"has {there:,} bytes of {size:,}", -1
            found = hashlib.file_digest(file, "sha256").hexdigest(), there
        if state:
            _known[path] = state, found
        return found
    except FileNotFoundError:
        return "is gone", -1
    except OSError as error:
        return f"cannot be read ({error.strerror})", -1


def _state(path: Path) -> tuple[int, ...] | None:
    """What changes whenever a file is written to; None where it changed so recently that the clock might not tell."""
    try:
        there = os.stat(path)
    except OSError:
        return None
    if abs(time.time() - there.st_ctime) < SETTLED:
        return None
    return there.st_dev, there.st_ino, there.st_size, there.st_mtime_ns, there.st_ctime_ns
