"""The runs of a folder and of its subfolders."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from espalier.errors import UserError
from espalier.runs.run import Run

WITHIN_A_RUN = frozenset(("checkpoints", "tokenizer", "tensorboard", "frozen", "collected", "wandb", "mlflow"))
"""Folders of a run that hold no other run."""
TRAINED = ("metrics.jsonl", ".lock", "checkpoints")
"""One of these tells a run from another folder with a config.json, such as an exported model."""


class Folder:
    """Looked at again and again: `look` finds new runs, and what is new of those that are known."""

    def __init__(self, path: str | Path):
        """UserError where there is no such folder."""
        self.path = Path(path).expanduser().absolute()
        if not self.path.is_dir():
            raise UserError(f"no folder {path}; give one that holds runs, or lies above them (default: runs)")
        self.runs: dict[str, Run] = {}
        """By name: the path within the folder. The newest first."""
        self.problems: list[str] = []

    def look(self) -> None:
        """Read what has changed since the last look."""
        unreadable: list[str] = []
        found = {name: path for path, name in self._found(unreadable)}
        runs = {name: self.runs.get(name) or Run(path, name) for name, path in found.items()}
        for run in runs.values():
            run.look()
        self.runs = dict(sorted(runs.items(), key=lambda item: (-item[1].updated, item[0])))
        self.problems = unreadable + [line for run in self.runs.values() for line in run.problems]

    def rows(self) -> list[dict[str, Any]]:
        """Run.row of each."""
        now = time.time()
        return [run.row(now) for run in self.runs.values()]

    def _found(self, unreadable: list[str]) -> Iterator[tuple[Path, str]]:
        def refused(error: OSError) -> None:
            unreadable.append(f"{error.filename}: {error.strerror}")

        been: set[tuple[int, int]] = set()
        # Links too, for runs often lie on another disk; each folder once, for links may lead back.
        for folder, folders, files in os.walk(self.path, onerror=refused, followlinks=True):
            here = Path(folder)
            try:
                there = here.stat()
            except OSError:
                continue
            if (there.st_dev, there.st_ino) in been:
                folders.clear()
                continue
            been.add((there.st_dev, there.st_ino))
            if "config.json" in files and (any(name in files or name in folders for name in TRAINED)):
                folders[:] = [name for name in folders if name not in WITHIN_A_RUN]
                relative = here.relative_to(self.path)
                yield here, _readable(str(relative) if relative.parts else self.path.name)
            folders[:] = sorted(name for name in folders if not name.startswith("."))


def _readable(name: str) -> str:
    """A name of the file system as text, also where it is no UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def differing(runs: list[Run]) -> list[str]:
    """Names of the settings that are not the same in all of them, in their order."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    return [name for name in names if len({json.dumps(run.settings.get(name)) for run in runs}) > 1]
