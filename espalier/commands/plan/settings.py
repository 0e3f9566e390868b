"""The settings of a plan, alone and beside those of the run it is for. Imports no JAX."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from espalier.commands.plan import numbers, objectives
from espalier.errors import UserError
from espalier.short_help import often


@dataclass(frozen=True)
class PlanSettings:
    """What is planned for: chips, tokens and their price."""

    SELDOM: ClassVar[tuple[str, ...]] = ("seed", "stop_at", "init_from", "export")
    """Settings of a run on which its plan does not depend."""
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
        # Beside a run's settings (`PRESETS`), those are checked first.
        getattr(super(), "__post_init__", lambda: None)()
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
        raise UserError(f"tokens={text!r} is not a number of tokens; write 10B, 1.5T or 3e11")
    return value


def _presets() -> dict[str, Callable[[], Any]]:
    names = [name for presets in objectives.PRESETS.values() for name in presets]
    return {
        f"{command}-{name}" if names.count(name) > 1 else name: _with_settings(preset)
        for command, presets in objectives.PRESETS.items()
        for name, preset in presets.items()
    }


def _with_settings(preset: Callable[[], Any]) -> Callable[[], Any]:
    def make() -> Any:
        config = preset()
        values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        return _combined(type(config))(**values)

    make.__doc__ = preset.__doc__
    return make


@functools.cache
def _combined(kind: type) -> type:
    """Settings of a plan and of a run in one class, as a command line needs them."""
    namespace = {"__doc__": f"Plan a run of `{kind.__module__.split('.')[0]}`."}
    return dataclass(frozen=True)(type(f"Plan{kind.__name__}", (PlanSettings, kind), namespace))


PRESETS = _presets()
"""The presets of all objectives with PlanSettings added; a name that several have begins with the command."""
