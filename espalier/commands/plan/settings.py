"""The settings of a plan beside those of the run it is for. Imports no JAX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import clm.presets
import mlm.presets
from espalier.commands.plan import numbers
from espalier.errors import UserError
from espalier.short_help import often


@dataclass(frozen=True)
class PlanSettings:
    """What is planned for: chips, tokens and their price."""

    topology: str | None = often(None)
    """A TPU slice, whose compiler is asked: v4:2x2x2, v5e:16x16, v5p:4x4x4, v6e:4x4, tpu7x:2x2x1."""
    slices: int = 1
    """So many of these slices; the axis replica reaches from one to the next."""
    chip: str | None = often(None)
    """Any chip, by analysis: h100, h200, a100, l4, t4, v5p and others."""
    chips: int = often(1)
    """How many of that chip."""
    tokens: str | None = often(None)
    """Tokens to train on (10B); unset = steps × batch size × sequence length."""
    price: float | None = often(None)
    """Of a chip for an hour, in any currency."""
    search: bool = True
    """If it does not fit, look for a layout, micro-batches and rematerialisation that do."""

    def __post_init__(self):
        parent: Any = super()
        parent.__post_init__()
        if self.chips < 1 or self.slices < 1:
            raise UserError(f"chips={self.chips} and slices={self.slices} must be at least 1")
        if self.price is not None and self.price < 0:
            raise UserError(f"price={self.price:g} must be at least 0")
        if self.tokens is not None:
            as_tokens(self.tokens)


def as_tokens(text: str) -> float:
    """10B, 1.5e12 or 300000000 as a number."""
    value = numbers.read(text)
    if value is None or value <= 0:
        raise UserError(f"tokens={text!r} is no number of tokens; write 10B, 1.5T or 3e11")
    return value


@dataclass(frozen=True)
class MaskedPlan(PlanSettings, mlm.presets.PretrainConfig):
    """Plan a masked-LM pretraining run."""


@dataclass(frozen=True)
class CausalPlan(PlanSettings, clm.presets.PretrainConfig):
    """Plan a causal-LM pretraining run."""
