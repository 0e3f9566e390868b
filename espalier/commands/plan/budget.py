"""How much data and compute a model takes, before anything is prepared or rented: `./launch.sh plan budget`.

From one of a model size, a compute budget, a time limit or an amount of text to the others, by the laws of
`commands/plan/scaling_laws.py`; docs/plan-budget.md says what they are good for.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from espalier import cli
from espalier.commands.plan import numbers
from espalier.commands.plan import scaling_laws as laws
from espalier.commands.plan.budget_text import as_text
from espalier.commands.plan.numbers import short
from espalier.commands.plan.scaling_laws import Allocation, Law
from espalier.errors import UserError

Door = Literal["clm", "mlm"]
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
    door: Door | None = None
    """Causal (clm) or masked (mlm) language model; unset = the preset's, else clm."""
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
        if self.sequence_length is not None and self.sequence_length < 8:
            raise UserError(f"sequence_length={self.sequence_length} is too short; at least 8")
        if not 0.1 <= self.bytes_per_token <= 100:
            raise UserError(f"bytes_per_token={self.bytes_per_token} must lie between 0.1 and 100; English: 4.4")


@dataclass(frozen=True)
class Row:
    """A model and its training, as a law or a paper has it."""

    name: str
    parameters: float
    tokens: float
    tokens_per_parameter: float
    flops: float
    loss: float | None
    source: str

    @classmethod
    def of(cls, name: str, source: str, a: Allocation, loss: laws.Loss | None = None) -> Row:
        return cls(name, a.parameters, a.tokens, a.ratio, a.flops, loss and loss(a.parameters, a.tokens), source)


@dataclass(frozen=True)
class Batch:
    """A batch size by one source."""

    name: str
    tokens: float


@dataclass(frozen=True)
class Budget:
    """The answer; its fields are the keys of `--json`. The plain figures are those of the recommended row."""

    given: str
    door: Door
    law: str
    why: str
    parameters: float
    tokens: float
    tokens_per_parameter: float
    flops: float
    loss: float | None
    """Nats a token on the text of the law's authors; None where the law predicts none."""
    extrapolated: bool
    """Whether the budget lies beyond the runs that the laws were fitted on."""
    sequence_length: int
    critical_batch_tokens: float
    batch_size: int
    steps: int
    bytes_per_token: float
    text_gb: float
    unique_text_gb: float
    """Enough when it is read four times."""
    chip: str | None
    chips: int
    mfu: float
    hours: float | None
    command: str
    nearest_preset: str
    nearest_parameters: int
    laws: tuple[Row, ...]
    batches: tuple[Batch, ...]
    published: tuple[Row, ...]


def main(config: BudgetConfig) -> dict[str, Any]:
    """Print the plan as text, or leave it to `--json`."""
    budget = plan(config)
    if not config.json:
        print(as_text(budget))
    return dataclasses.asdict(budget)


def plan(config: BudgetConfig) -> Budget:
    """Everything that follows from the one quantity given."""
    preset, door = find_preset(config.preset, config.door) if config.preset else (None, config.door or "clm")
    length = config.sequence_length
    if length is None:
        length = preset.data.sequence_length if preset else 1024 if door == "clm" else 512
    speed = chip_speed(config)
    given, allocate = start(config, door, speed)
    choices, chosen = (laws.CAUSAL_LAWS, laws.BESIROGLU) if door == "clm" else (laws.ENCODER_HABITS, None)
    chosen = chosen or choices[0]
    best = Row.of(chosen.name, chosen.source, allocate(chosen), chosen.loss)
    least, most = laws.FITTED_FLOPS
    critical = laws.critical_batch(best.tokens)
    rows = 2 ** max(0, math.floor(math.log2(critical / length)))
    steps = math.ceil(best.tokens / (rows * length))
    batches = [
        Batch("critical (Zhang et al. 2024)", critical),
        Batch("of least loss (Li et al. 2025)", laws.best_batch(best.tokens)),
        Batch("of least loss (Bi et al. 2024)", laws.best_batch_at_flops(best.flops)),
    ]
    if best.loss:
        batches.insert(1, Batch("critical at this loss (Kaplan et al. 2020)", laws.critical_batch_at_loss(best.loss)))
    name = config.preset or min(sizes(door), key=lambda other: abs(math.log(sizes(door)[other] / best.parameters)))
    text_gb = best.tokens * config.bytes_per_token / 1e9
    return Budget(
        given=given,
        door=door,
        law=chosen.name,
        why=(
            "Hoffmann's runs fitted anew; unlike their own fit it agrees with their approaches 1 and 2, and it "
            "predicts a loss"
            if door == "clm"
            else "no compute-optimal law of like standing is known for masked LM; these ratios are what published "
            "encoders had, and the plan follows BERT-base"
        ),
        parameters=best.parameters,
        tokens=best.tokens,
        tokens_per_parameter=best.tokens_per_parameter,
        flops=best.flops,
        loss=best.loss,
        extrapolated=not least <= best.flops <= most,
        sequence_length=length,
        critical_batch_tokens=critical,
        batch_size=rows,
        steps=steps,
        bytes_per_token=config.bytes_per_token,
        text_gb=text_gb,
        unique_text_gb=text_gb / laws.FREE_EPOCHS,
        chip=config.chip,
        chips=config.chips,
        mfu=config.mfu,
        hours=best.flops / speed / 3600 if speed else None,
        command=command(door, name, steps, rows, length),
        nearest_preset=name,
        nearest_parameters=sizes(door)[name],
        laws=tuple(Row.of(law.name, law.source, allocate(law), law.loss) for law in choices),
        batches=tuple(batches),
        published=tuple(Row.of(model.name, model.source, model.allocation) for model in laws.PUBLISHED),
    )


def start(config: BudgetConfig, door: Door, speed: float | None) -> tuple[str, Callable[[Law], Allocation]]:
    """What was given, in words, and how a law goes on from it."""
    if config.flops is not None:
        flops = as_number("flops", config.flops)
        return f"{flops:.3g} FLOPs", lambda law: law.at_flops(flops)
    if config.hours is not None:
        assert speed is not None  # __post_init__ asks for the chip
        hours = as_number("hours", config.hours)
        flops = hours * 3600 * speed
        on = f"{hours:g} hours of {config.chips} × {config.chip} at {config.mfu:.0%} of peak"
        return f"{on}: {flops:.3g} FLOPs", lambda law: law.at_flops(flops)
    if config.gb is not None:
        gb = as_number("gb", config.gb)
        unique = gb * 1e9 / config.bytes_per_token
        tokens = laws.FREE_EPOCHS * unique
        worth = laws.worth_of_epochs(laws.FREE_EPOCHS)
        text = f"{gb:g} GB of text, {short(unique)} tokens, read {laws.FREE_EPOCHS} times"
        return f"{text} (worth {worth:.1f} times new text)", lambda law: law.at_tokens(tokens)
    if config.params is not None:
        parameters, of = as_number("params", config.params), ""
    else:
        assert config.preset is not None
        parameters, of = float(sizes(door)[config.preset]), f" ({door} {config.preset})"
    return f"{short(parameters)} parameters{of}", lambda law: law.at_parameters(parameters)


def as_number(name: str, value: str) -> float:
    """The number that '124M' or '1.5e9' means; UserError for anything else."""
    number = numbers.read(value)
    if number is None:
        raise UserError(
            f"{name}={value} is not a number; accepted are figures like 12.5, 1e9 or 124M (K, M, B, T); try "
            f"--{name} {dict(params='124M', flops='1e21', hours='24', gb='10')[name]}"
        )
    return number


def chip_speed(config: BudgetConfig) -> float | None:
    """FLOP/s of the model that all chips reach together; None where no chip was named."""
    if config.chip is None:
        return None
    from sharding.topology import chip_named

    chip = chip_named(config.chip)
    return chip.flops * chip.devices_per_chip * chip.sustained_clock * config.chips * config.mfu


def doors() -> dict[Door, Mapping[str, Callable[[], Any]]]:
    from clm.presets import PRESETS as causal
    from mlm.presets import PRESETS as masked

    return {"clm": causal, "mlm": masked}


def find_preset(name: str, door: Door | None) -> tuple[Any, Door]:
    """The preset of that name, in this door or in the only one that has it."""
    having: list[Door] = [other for other, presets in doors().items() if name in presets and door in (None, other)]
    if len(having) == 1:
        return doors()[having[0]][name](), having[0]
    if having:
        raise UserError(f"preset {name} is in {' and '.join(having)}; add --door {' or --door '.join(having)}")
    known = {other: list(presets) for other, presets in doors().items() if door in (None, other)}
    near = difflib.get_close_matches(name, [preset for presets in known.values() for preset in presets], 1)
    listed = "; ".join(f"{other}: {', '.join(presets)}" for other, presets in known.items())
    raise UserError(f"unknown preset {name!r}{f'; did you mean {near[0]}?' if near else ''}; known are {listed}")


@functools.cache
def sizes(door: Door) -> Mapping[str, int]:
    """Parameters of every preset of a door, embeddings and head included."""
    # Only shapes are computed: an accelerator that another program holds must not be waited for.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from espalier.models.counts import count_params

    head = {"clm": "causal_lm", "mlm": "masked_lm"}[door]
    return {name: count_params(preset().model, head) for name, preset in doors()[door].items()}


def command(door: Door, preset: str, steps: int, batch_size: int, length: int) -> str:
    """The command that trains so, with the preset whose size is nearest."""
    model = doors()[door][preset]().model
    line = f"./launch.sh {door} {preset} --steps {steps} --batch-size {batch_size} --data.sequence-length {length}"
    if model.max_length is not None and length > model.max_length:
        line += f" --model.max-position-embeddings {length + model.position_offset}"
    return f"{line} --data.files 'text/*.jsonl.gz'"


if __name__ == "__main__":
    cli.run_config(main, BudgetConfig, prog="plan budget")
