"""GLUE's files as labelled JSON lines: from its own .tsv files, from `datasets`, or from TFDS."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from espalier.data.tables import Table, read_table
from espalier.errors import UserError
from espalier.files import replacing
from finetune.glue.tasks import COLA_COLUMNS, DIAGNOSTIC, GLUE, MISMATCHED, MNLI, GlueTask

LIBRARIES = ("hf:", "tfds:")
SPLITS = {"dev": "validation", "dev_matched": "validation_matched", "dev_mismatched": "validation_mismatched"}
"""Name of a file → of the split in a library, where it is another."""


class Files(NamedTuple):
    """Where the examples of a task are, as JSON lines of text, text_b and label."""

    train: Path
    dev: Path
    more: dict[str, Path]
    """Further files by name: dev_mismatched, test_matched, diagnostic …"""


def missing_file(source: str, task: GlueTask) -> str | None:
    """What is missing for a task, in words; None where its examples are at hand. A library is asked only later."""
    if source.startswith(LIBRARIES):
        return None
    folder = _folder(source, task)
    if folder is None:
        return f"no folder {task.folder}"
    absent = [name for name in ("train", task.dev) if not (folder / f"{name}.tsv").is_file()]
    return f"no {absent[0]}.tsv in {folder}" if absent else None


def write_files(source: str, task: GlueTask, to: Path, examples: int | None, tests: bool) -> Files:
    """Read the splits of a task and write them under `to`. examples: of the training file at most. tests: also the
    files without labels. UserError where a split that is needed is not there or has other columns."""
    names = ["train", task.dev]
    further = [MISMATCHED[0]] * (task is MNLI)
    if tests:
        further += [task.test] + [MISMATCHED[1], DIAGNOSTIC[2]] * (task is MNLI)
    to.mkdir(parents=True, exist_ok=True)
    found: dict[str, Path] = {}
    for name in (*names, *further):
        needed = name in names
        try:
            table = _table(source, task, name)
        except UserError:
            # A library may have a task without these splits; a file that is there must be read.
            if needed or not source.startswith(LIBRARIES):
                raise
            continue
        if table is None:
            continue
        path = to / f"{name}.jsonl"
        rows = _rows(table, task, source, name)
        with replacing(path) as file:
            for number, row in enumerate(rows):
                if name == "train" and examples is not None and number >= examples:
                    break
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        found[name] = path
    return Files(found.pop("train"), found.pop(task.dev), found)


def _folder(source: str, task: GlueTask) -> Path | None:
    root = Path(os.path.expanduser(source))
    if not root.is_dir():
        raise UserError(
            f"--data.folder {source}: no such folder; accepted is one with GLUE's folders "
            f"({', '.join(one.folder for one in GLUE)}), hf:nyu-mll/glue or tfds:glue"
        )
    known = {task.folder.lower(), task.key, task.name.lower()}
    return next((path for path in sorted(root.iterdir()) if path.is_dir() and path.name.lower() in known), None)


def _table(source: str, task: GlueTask, name: str) -> Table | None:
    """The rows of a split; None where a folder does not have it."""
    library = next((one for one in LIBRARIES if source.startswith(one)), None)
    if library is None:
        folder = _folder(source, task)
        assert folder is not None
        path = folder / f"{name}.tsv"
        return read_table(str(path)) if path.is_file() else None
    key, split = (DIAGNOSTIC[1], "test") if name == DIAGNOSTIC[2] else (task.key, SPLITS.get(name, name))
    if library == "hf:":
        spec = source.removeprefix(library)
        return read_table(f"hf:{spec}{'&' if '?' in spec else '?'}name={key}&split={split}")
    return read_table(f"tfds:{source.removeprefix(library)}/{key}?split={split}")


def _rows(table: Table, task: GlueTask, source: str, name: str) -> Iterator[dict[str, str]]:
    library = source.startswith(LIBRARIES)
    text, label = (task.fields, "label") if library else (task.text, task.label)
    columns: list[str] = list(table.columns)
    first: list[Sequence[str | None]] = []
    if not library and not task.header and name in ("train", task.dev):
        # CoLA: the first line is an example; its cells stand where the names of columns would.
        first, columns = [list(table.columns)], [*map(str, COLA_COLUMNS)]
        if len(table.columns) != len(COLA_COLUMNS):
            raise UserError(
                f"{table.path} has {len(table.columns)} columns; GLUE's CoLA has {len(COLA_COLUMNS)}: "
                f"{', '.join(COLA_COLUMNS)}"
            )
    absent = [column for column in text if column not in columns]
    if absent:
        raise UserError(
            f"{table.path} has no column {absent[0]!r}, as GLUE's {task.name} has; it has {', '.join(columns)}"
        )
    at = [columns.index(column) for column in text]
    label_at = columns.index(label) if label in columns else None
    given = [*first, *(row.values for row in table.rows)]
    if library and "idx" in columns:
        # TFDS shuffles what it prepares; submissions go by these numbers.
        number_at = columns.index("idx")
        given.sort(key=lambda values: int(values[number_at] or 0))
    for values in given:
        row = {"text": values[at[0]] or ""}
        if len(at) == 2:
            row["text_b"] = values[at[1]] or ""
        if label_at is not None and (value := values[label_at]) not in (None, "", "-", "-1", "-1.0"):
            assert value is not None
            row["label"] = task.label_of(value) if library else value
        elif name in ("train", task.dev, MISMATCHED[0]):
            # Examples on which the annotators did not agree (MNLI's "-").
            continue
        yield row
