"""What a column of labels holds: classes, numbers (regression), or lists (several labels a text)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

from espalier.data.description import listed
from espalier.errors import UserError

MANY = 20
"""So many classes may be any numbers; more of them must be numbered without holes, or be words."""
FEW_ROWS = 20
"""Fewer examples say nothing about what their labels are."""
FORCE = "if they are classes, say --data.label-kind classes"
SEPARATORS = "|;,"
"""Between the labels of a cell; the first that any cell has."""


class Labels(NamedTuple):
    """What a column of labels was taken for."""

    kind: str
    """classes, numbers or lists."""
    names: list[str]
    """The classes, or the labels of lists, in their order; of numbers none."""
    words: str
    """What the column holds, and how that is changed, in a sentence."""


PROBLEMS = {
    "classes": None,
    "numbers": "regression",
    "lists": "multi_label_classification",
}
"""Kind of labels → the problem_type of the model, as transformers names it; None = that of one label a text."""


def labels_of(labels: Sequence[str], column: str, place: str, kind: str) -> Labels:
    """What the labels of a training file are. place: file and column, for people.

    kind: classes, numbers or lists where the user says so. auto takes decimals, and many whole numbers with holes, for
    numbers, JSON arrays for lists, everything else for classes; it refuses what looks like an identifier or a text.
    UserError where the labels are not of that kind, or where there is nothing to tell apart.
    """
    found = _kind(labels) if kind == "auto" else kind
    if found == "numbers":
        values = numbers_of(labels, place)
        if min(values) == max(values):
            raise UserError(f"{place}: every example has the number {values[0]:g}; there is nothing to learn")
        why = f", {_why(labels)}" if kind == "auto" else ""
        words = f"labels: column {column!r} holds numbers from {min(values):g} to {max(values):g}{why}; regression"
        return Labels(found, [], words + _hint(kind, "; --data.label-kind classes takes each for a class"))
    if found == "lists":
        names = in_order({name for cell in lists_of(labels, place) for name in cell})
        if len(names) < 2:
            raise UserError(f"{place}: {len(names)} different labels in all lists; a classifier needs two or more")
        words = f"labels: column {column!r} holds lists; several of {len(names)} labels may be right"
        return Labels(found, names, words + _hint(kind, "; --data.label-kind classes takes each for a class"))
    names = class_names(labels, place, kind)
    return Labels("classes", names, f"labels: column {column!r} holds {len(names)} classes")


def class_names(labels: Sequence[str], place: str, kind: str) -> list[str]:
    """The classes in their order (numbers by value). kind: auto refuses what looks like an identifier or a text."""
    names = in_order(set(labels))
    if len(names) < 2:
        raise UserError(f"{place}: every example has the label {names[0]!r}; a classifier needs two or more")
    if kind != "classes" and len(labels) >= FEW_ROWS and len(names) > len(labels) / 2:
        raise UserError(
            f"{place} has {len(names):,} different values in {len(labels):,} examples ({quoted(names, 3)}), as an "
            f"identifier or a text has; name the column of labels with --data.label, or {FORCE}"
        )
    return names


def numbers_of(labels: Sequence[str], place: str) -> list[float]:
    """The numbers that the labels are, also with a decimal comma. UserError for the first that is none."""
    values = []
    for label in labels:
        if (value := _value(label)) is None:
            raise UserError(f"{place}: {label!r} is not a finite number; correct it, or say --data.label-kind classes")
        values.append(value)
    return values


def lists_of(labels: Sequence[str], place: str) -> list[list[str]]:
    """The labels of each cell: a JSON array, or names separated by | ; or a comma. An empty cell has none."""
    if all(_array(label) is not None for label in labels if label):
        return [list(dict.fromkeys(filter(None, _array(label) or []))) for label in labels]
    separator = next((sign for sign in SEPARATORS if any(sign in label for label in labels)), SEPARATORS[0])
    if bad := next((label for label in labels if _array(label) is not None), None):
        raise UserError(f"{place}: some cells are JSON arrays ({bad!r}) and others are not; write all in one way")
    return [list(dict.fromkeys(name.strip() for name in label.split(separator) if name.strip())) for label in labels]


def in_order(labels: Collection[str]) -> list[str]:
    """By value where all are finite numbers, equal ones by their text; else by their text."""
    values = {label: None if "," in label else _value(label) for label in labels}
    if any(value is None for value in values.values()):
        return sorted(labels)
    return sorted(labels, key=lambda label: (values[label] or 0.0, label))


def quoted(labels: Sequence[str], most: int = 8) -> str:
    """The first labels in quotation marks, long ones cut."""
    return listed([repr(label if len(label) <= 40 else f"{label[:39]}…") for label in labels], most)


def _kind(labels: Sequence[str]) -> str:
    if all(_array(label) is not None for label in labels):
        return "lists"
    return "numbers" if _why(labels) else "classes"


def _why(labels: Sequence[str]) -> str:
    """Why labels look like the target of a regression; "" where they do not."""
    names = in_order(set(labels))
    values = [value for name in names if (value := _value(name)) is not None]
    if len(values) < len(names) or len(names) < 2:
        return ""
    fractions = [name for name, value in zip(names, values, strict=True) if value != int(value)]
    if fractions:
        more = " …" if len(fractions) > 4 else ""
        return f"among them decimals ({', '.join(fractions[:4])}{more})"
    holes = max(values) - min(values) + 1 != len(set(values)) or min(values) not in (0, 1)
    unique = len(labels) >= FEW_ROWS and len(names) > len(labels) / 2
    return f"{len(names)} different ones" if len(names) > MANY and holes and not unique else ""


def _hint(kind: str, words: str) -> str:
    return words if kind == "auto" else ""


def _array(label: str) -> list[str] | None:
    """The names in a JSON array; None where it is none."""
    if not label.startswith("["):
        return None
    try:
        found = json.loads(label)
    except ValueError:
        return None
    if not isinstance(found, list) or not all(isinstance(name, str | int | float) for name in found):
        return None
    return [name.strip() if isinstance(name, str) else json.dumps(name) for name in found]


def _value(label: str) -> float | None:
    """The finite number that a label is, also with a decimal comma."""
    if re.fullmatch(r"[-+]?\d+,\d+", label):
        label = label.replace(",", ".")
    try:
        value = float(label)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
