"""From a model size, a compute budget, a time limit or an amount of text to the other three, by scaling_laws.py.

docs/plan-budget.md says what the laws are good for.
"""

from __future__ import annotations

import difflib
import functools
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from espalier.commands.plan.budget import scaling_laws as laws
from espalier.commands.plan.budget.scaling_laws import Allocation, Law
from espalier.commands.plan.budget.settings import BudgetConfig, as_number
from espalier.commands.plan.numbers import short
from espalier.commands.plan.objectives import OBJECTIVES, PRESETS, objective_of
from espalier.errors import UserError
from espalier.pretraining.objective import TextObjective


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
    objective: str
    """As the command that trains it."""
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


def plan(config: BudgetConfig) -> Budget:
    """All quantities, from the one that is given."""
    preset, objective = None, OBJECTIVES[config.objective or "clm"]
    if config.preset:
        preset, objective = find_preset(config.preset, config.objective)
    guide = laws.guide(objective.causal)
    length = config.sequence_length or (preset.data.sequence_length if preset else guide.length)
    speed = chip_speed(config)
    given, allocate = start(config, objective, speed)
    chosen = guide.followed
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
    presets = PRESETS[objective.command]
    known = {name: size for name, size in sizes(objective.command).items() if presets[name]().task == objective.name}
    name = config.preset or min(known, key=lambda other: abs(math.log(known[other] / best.parameters)))
    text_gb = best.tokens * config.bytes_per_token / 1e9
    return Budget(
        given=given,
        objective=objective.command,
        law=chosen.name,
        why=guide.why,
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
        command=command(objective, name, steps, rows, length),
        nearest_preset=name,
        nearest_parameters=known[name],
        laws=tuple(Row.of(law.name, law.source, allocate(law), law.loss) for law in guide.laws),
        batches=tuple(batches),
        published=tuple(Row.of(model.name, model.source, model.allocation) for model in laws.PUBLISHED),
    )


def start(
    config: BudgetConfig, objective: TextObjective, speed: float | None
) -> tuple[str, Callable[[Law], Allocation]]:
    """(the given quantity in words, how it is turned into an allocation by a law)."""
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
        parameters = float(sizes(objective.command)[config.preset])
        of = f" ({objective.command} {config.preset})"
    return f"{short(parameters)} parameters{of}", lambda law: law.at_parameters(parameters)


def chip_speed(config: BudgetConfig) -> float | None:
    """Model FLOP/s of all chips together; None if no chip is given."""
    if config.chip is None:
        return None
    from sharding.topology import chip_named

    chip = chip_named(config.chip)
    return chip.flops * chip.devices_per_chip * chip.sustained_clock * config.chips * config.mfu


def find_preset(name: str, command: str | None) -> tuple[Any, TextObjective]:
    """The preset of that name, of this command or of the only one that has it."""
    asked = {other: presets for other, presets in PRESETS.items() if command in (None, other)}
    having = [other for other, presets in asked.items() if name in presets]
    if len(having) == 1:
        preset = asked[having[0]][name]()
        return preset, objective_of(preset)
    if having:
        raise UserError(
            f"preset {name} is in {' and '.join(having)}; add --objective {' or --objective '.join(having)}"
        )
    near = difflib.get_close_matches(name, [preset for presets in asked.values() for preset in presets], 1)
    listed = "; ".join(f"{other}: {', '.join(presets)}" for other, presets in asked.items())
    raise UserError(f"unknown preset {name!r}{f'; did you mean {near[0]}?' if near else ''}; known are {listed}")


@functools.cache
def sizes(objective: str) -> Mapping[str, int]:
    """Parameters of every preset of a command, embeddings and head included."""
    # Only shapes are computed: an accelerator that another program holds must not be waited for.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from espalier.models.counts import count_params

    made = {name: preset() for name, preset in PRESETS[objective].items()}
    return {name: count_params(one.model, objective_of(one).head) for name, one in made.items()}


def command(objective: TextObjective, preset: str, steps: int, batch_size: int, length: int) -> str:
    """The command of this training, with the preset of the nearest size."""
    model = PRESETS[objective.command][preset]().model
    line = f"./launch.sh {objective.command} {preset} --steps {steps} --batch-size {batch_size}"
    line += f" --data.sequence-length {length}"
    if model.max_length is not None and length > model.max_length:
        line += f" --model.max-position-embeddings {length + model.position_offset}"
    return f"{line} --data.files 'text/*.jsonl.gz'"
