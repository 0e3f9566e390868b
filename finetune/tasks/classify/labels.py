"""Whether a column of labels holds classes: regression targets, identifiers and texts are refused."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence

from espalier.data.description import listed
from espalier.errors import UserError

MANY = 20
"""So many classes may be any numbers; more of them must be numbered without holes, or be words."""
FEW_ROWS = 20
"""Fewer examples say nothing about what their labels are."""
FORCE = "if they are classes, say --data.label-kind classes"


def class_names(labels: Sequence[str], place: str, kind: str) -> list[str]:
    """The classes in their order (numbers by value). place: file and column, for people.

    kind: "classes" takes whatever is there; "auto" refuses what looks like a regression target (numbers with
    fractions, or many whole ones), an identifier or a text. UserError where there is nothing to tell apart.
    """
    names = in_order(set(labels))
    if len(names) < 2:
        raise UserError(f"{place}: every example has the label {names[0]!r}; a classifier needs two or more")
    if kind == "classes":
        return names
    values = [value for name in names if (value := _value(name)) is not None]
    regression = f"regression is not there yet; {FORCE}"
    if len(values) == len(names):
        fractions = [name for name, value in zip(names, values, strict=True) if value != int(value)]
        if fractions:
            raise UserError(
                f"{place} looks like a regression target: {len(names)} different numbers, among them decimals "
                f"({', '.join(fractions[:4])}{' …' if len(fractions) > 4 else ''}); {regression}"
            )
        holes = max(values) - min(values) + 1 != len(set(values)) or min(values) not in (0, 1)
        if len(names) > MANY and holes:
            raise UserError(
                f"{place} looks like a regression target: {len(names)} different numbers from {names[0]} to "
                f"{names[-1]}; {regression}"
            )
    if len(labels) >= FEW_ROWS and len(names) > len(labels) / 2:
        raise UserError(
            f"{place} has {len(names):,} different values in {len(labels):,} examples ({quoted(names, 3)}), as an "
            f"identifier or a text has; name the column of labels with --data.label, or {FORCE}"
        )
    return names


def in_order(labels: Collection[str]) -> list[str]:
    """By value where all are finite numbers, equal ones by their text; else by their text."""
    values = {label: None if "," in label else _value(label) for label in labels}
    if any(value is None for value in values.values()):
        return sorted(labels)
    return sorted(labels, key=lambda label: (values[label] or 0.0, label))


def quoted(labels: Sequence[str], most: int = 8) -> str:
    """The first labels in quotation marks, long ones cut."""
    return listed([repr(label if len(label) <= 40 else f"{label[:39]}…") for label in labels], most)


def _value(label: str) -> float | None:
    """The finite number that a label is, also with a decimal comma."""
    if re.fullmatch(r"[-+]?\d+,\d+", label):
        label = label.replace(",", ".")
    try:
        value = float(label)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
