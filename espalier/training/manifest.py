"""The manifest of a checkpoint: the SHA-256 of every file, written last.

A checkpoint counts only once its manifest is there, and nothing is read whose contents are not those of its manifest.
Several processes share the files out among them.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import jax

from espalier.errors import UserError
from espalier.files import sha256_of_file, write_json
from sharding.processes.coordination import LONG_WAIT, from_first, gather

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


def complete_steps(folder: Path) -> list[int]:
    """Steps with a complete checkpoint, oldest first."""
    return [step for step in step_folders(folder) if (folder / str(step) / MANIFEST).exists()]


def step_folders(folder: Path) -> list[int]:
    """Steps with a folder, complete or not, in their order."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal()) if folder.is_dir() else []


def write_manifest(folder: Path) -> int:
    """Write the manifest of a step's folder, all processes together; returns the bytes it covers."""
    files = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
    files = from_first("files of the manifest", files, LONG_WAIT)
    sums = _sums(folder, files, "sums of the manifest")
    unread = [name for name, found in sums.items() if found is None]
    if unread:
        raise OSError(errno.EIO, f"{unread[0]} cannot be read again")
    if jax.process_index() == 0:
        write_json(folder / MANIFEST, {"format_version": FORMAT_VERSION, "sha256": sums})
    return sum(size_of(folder / name) for name in files)


def verify(folder: Path, item: str, together: bool = False) -> None:
    """UserError unless every file of the item is there with the contents it was written with.

    together: all processes are here, and each reads a part.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        version, sums = manifest["format_version"], manifest["sha256"]
        names = sorted(name for name in sums if name.startswith(item + "/"))
        found = _sums(folder, names, f"sums of {item}" if together else None)
        damaged = [name for name in names if found.get(name) != sums[name]]
    except (OSError, ValueError, KeyError) as error:
        version, damaged = FORMAT_VERSION, [str(error)]
    if version != FORMAT_VERSION:
        raise UserError(f"{folder} has format version {version} and this code reads {FORMAT_VERSION}; use its own code")
    if damaged:
        others = [str(step) for step in complete_steps(folder.parent) if str(step) != folder.name]
        rest = f"; delete {folder} to go on from step {others[-1]}" if others else "; restore it from a copy"
        raise UserError(f"checkpoint {folder} is damaged: {damaged[0]} is not as it was written{rest}")


def size_of(path: Path) -> int:
    """Bytes of a file, 0 for one that is not there."""
    try:
        return path.stat().st_size
    except FileNotFoundError:  # renamed just now
        return 0


def bytes_in(folder: Path) -> int:
    """Bytes of all files in a folder, at any depth."""
    return sum(size_of(Path(place, name)) for place, _, names in os.walk(folder) for name in names)


def _sums(folder: Path, names: list[str], what: str | None) -> dict[str, str | None]:
    """SHA-256 of these files, None for one that cannot be read.

    what: under which name the processes share them out; None = this one alone reads them all.
    """
    mine = names[jax.process_index() :: jax.process_count()] if what else names
    sums = {name: _sha256(folder / name) for name in mine}
    return {name: found for part in gather(what, sums, LONG_WAIT) for name, found in part.items()} if what else sums


def _sha256(path: Path) -> str | None:
    try:
        return sha256_of_file(path)
    except OSError:
        return None
