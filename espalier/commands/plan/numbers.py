"""Large numbers as people write them: 124M, 1.5T, 1e21."""

from __future__ import annotations

import re

SUFFIXES = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def read(text: str) -> float | None:
    """The number that '124M' or '1.5e9' means; None where it is none."""
    found = re.fullmatch(r"\s*([-+]?(?:\d[\d_]*\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*([KMBT]?)\s*", text, re.I)
    return float(found[1]) * SUFFIXES[found[2].upper()] if found else None


def short(value: float) -> str:
    """Three digits and K, M, B or T."""
    for suffix in SUFFIXES:
        if float(f"{value:.3g}") < 1000 or suffix == "T":
            return f"{float(f'{value:.3g}'):,.6g}{suffix}"
        value /= 1000
    raise AssertionError("the last suffix returns")
