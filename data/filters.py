"""PLACEHOLDER: to be overwritten as a whole."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FilterConfig:
    """Optional quality filters."""

    max_tokens_per_character: float | None = None

    @property
    def active(self) -> bool:
        return False
