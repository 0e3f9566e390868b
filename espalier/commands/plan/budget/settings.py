"""The settings of `plan budget`. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from espalier.commands.plan import numbers
from espalier.commands.plan.budget import scaling_laws as laws
from espalier.commands.plan.objectives import OBJECTIVES
from espalier.errors import UserError

LIMITS = {"params": (1e3, 1e15), "flops": (1e10, 1e32), "hours": (1e-3, 1e6), "gb": (1e-6, 1e9)}
"""Of each quantity to start from, what is taken for an intended one."""
START = "give one of --params 124M, --preset gpt2, --flops 1e21, --hours 24 --chip h100, --gb 10"


@dataclass(frozen=True)
class BudgetConfig:
    """How much data and compute does it take? Give one of --params, --preset, --flops, --hours, --gb."""

    params: str | None = None
    """A model size: 124M, 7B, 1.5e9."""
    preset: str | None = None
    """The model size of a preset of `clm` or `mlm`: gpt2, llama-8b, bert-base."""
    flops: str | None = None
    """A compute budget in floating-point operations: 1e21."""
    hours: str | None = None
    """A time limit, with --chip."""
    gb: str | None = None
    """Text at hand, in gigabytes (10⁹ bytes), to be read up to four times."""
    chip: str | None = None
    """What it runs on, for times: h100, a100, v5p; an unknown name lists all."""
    chips: int = 1
    """How many of them."""
    mfu: float = 0.35
    """The part of the chips' peak that the model's own operations reach. Llama 3 405B reached 0.38 to 0.43 on up to
    16,384 H100 (2407.21783, table 4); 0.35 leaves a margin, and much less is usual before anything is tuned."""
    objective: str | None = None
    """What it is trained for, by its command: clm (causal LM) or mlm (masked LM); unset = the preset's, else clm."""
    sequence_length: int | None = None
    """Tokens in a row; unset = the preset's, else 1024 (clm) or 512 (mlm)."""
    bytes_per_token: float = round(laws.BYTES_PER_TOKEN, 1)
    """Bytes of text that a token stands for; 4.4 is English web text in GPT-2's vocabulary."""
    json: bool = False
    """Print one JSON object instead of the text."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self):
        given = {name: getattr(self, name) for name in ("params", "preset", "flops", "hours", "gb")}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) != 1:
            count = " and ".join(f"--{name} {value}" for name, value in given.items()) or "nothing"
            raise UserError(f"{count} given to plan from; exactly one is accepted: {START}")
        if self.hours is not None and self.chip is None:
            raise UserError(f"--hours {self.hours} says nothing without a chip; add --chip h100 (and --chips 8)")
        for name, (least, most) in LIMITS.items():
            value = getattr(self, name)
            if value is not None and not least <= (number := as_number(name, value)) <= most:
                raise UserError(f"{name}={value} is {number:g}, which must lie between {least:g} and {most:g}; {START}")
        if not 1 <= self.chips <= 10**7:
            raise UserError(f"chips={self.chips} must be at least 1 and at most ten million")
        if not 0 < self.mfu <= 1:
            raise UserError(f"mfu={self.mfu} is a part of the peak, above 0 and at most 1; try 0.35")
        if self.objective is not None and self.objective not in OBJECTIVES:
            raise UserError(f"objective={self.objective} is unknown; it is one of {', '.join(OBJECTIVES)}")
        if self.sequence_length is not None and self.sequence_length < 8:
            raise UserError(f"sequence_length={self.sequence_length} is too short; at least 8")
        if not 0.1 <= self.bytes_per_token <= 100:
            raise UserError(f"bytes_per_token={self.bytes_per_token} must lie between 0.1 and 100; English: 4.4")


def as_number(name: str, value: str) -> float:
    """The number that '124M' or '1.5e9' means; UserError for anything else."""
    number = numbers.read(value)
    if number is None:
        raise UserError(
            f"{name}={value} is not a number; accepted are figures like 12.5, 1e9 or 124M (K, M, B, T); try "
            f"--{name} {dict(params='124M', flops='1e21', hours='24', gb='10')[name]}"
        )
    return number
