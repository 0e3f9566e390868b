"""Accuracy of the time model: predictions beside published runs, and the fit of the efficiencies on half of them.

python -m espalier.commands.plan.time.published           # every run with its prediction, and the errors of both halves
python -m espalier.commands.plan.time.published --fit     # refit the efficiencies
python -m espalier.commands.plan.time.published --write   # write the table into docs/plan.md
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
import statistics
from collections.abc import Sequence

from espalier.commands.plan.time.roofline import FITTED, Efficiency, step_time
from espalier.commands.plan.time.runs import Run, runs, sources

FIT_HALF, HELD_OUT = runs()[::2], runs()[1::2]
DOCS = pathlib.Path(__file__).parents[4] / "docs" / "plan.md"
BEGIN, END = "<!-- published runs: begin -->", "<!-- published runs: end -->"


@dataclasses.dataclass(frozen=True)
class Errors:
    """Of |predicted ÷ published − 1|."""

    median: float
    ninth_decile: float
    worst: float


def predicted_speed(run: Run, efficiency: Efficiency = FITTED) -> float:
    """Tokens per second and chip."""
    return step_time(run.job, efficiency).tokens_per_second_per_chip


def error(run: Run, efficiency: Efficiency = FITTED) -> float:
    """Predicted ÷ published − 1."""
    return predicted_speed(run, efficiency) / run.speed - 1


def errors(some: Sequence[Run], efficiency: Efficiency = FITTED) -> Errors:
    """Median, ninth decile and worst of some runs."""
    sizes = sorted(abs(error(run, efficiency)) for run in some)
    return Errors(statistics.median(sizes), sizes[math.ceil(0.9 * len(sizes)) - 1], sizes[-1])


def fit(some: Sequence[Run], start: Efficiency = FITTED) -> Efficiency:
    """The efficiencies with the least loss over some runs, each at most 1.

    Loss: squared logarithm of predicted ÷ published, linear beyond 15 % so that a few unusual programs do not decide
    (Huber 1964). By steps along each number in turn, halved from 10 % to 0.3 % where none helps.
    """
    best, least, step = start, _loss(some, start), 0.1
    while step > 0.003:
        improved = False
        for field in dataclasses.fields(Efficiency):
            for factor in (1 + step, 1 / (1 + step)):
                value = min(1.0, getattr(best, field.name) * factor)
                tried = dataclasses.replace(best, **{field.name: value})
                loss = _loss(some, tried)
                if loss < least - 1e-9:
                    best, least, improved = tried, loss, True
        if not improved:
            step /= 2
    return best


def table() -> str:
    """All runs as Markdown, the errors of both halves above them."""
    lines = ["| | runs | median error | 9 of 10 within | worst |", "|---|---|---|---|---|"]
    for name, half in (("fitted on", FIT_HALF), ("held out", HELD_OUT)):
        found = errors(half)
        sizes = " | ".join(f"{100 * size:.1f} %" for size in dataclasses.astuple(found))
        lines.append(f"| {name} | {len(half)} | {sizes} |")
    lines += [
        "",
        "| half | run | chips | layout | published, tokens/s a chip | predicted | error | source |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for number, run in enumerate(runs()):
        chips = f"{run.job.chips} {run.job.chip.name}"
        speeds = f"{run.speed:,.0f} | {predicted_speed(run):,.0f} | {100 * error(run):+.0f} %"
        source = f"[{run.source}]({sources()[run.source]})" + (f": {run.says}" if run.says else "")
        half = "held out" if number % 2 else "fit"
        lines.append(f"| {half} | {run.name} | {chips} | {_layout(run)} | {speeds} | {source} |")
    return "\n".join(lines)


def documented() -> str:
    """The table as docs/plan.md has it."""
    text = DOCS.read_text()
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()


def main(argv: Sequence[str] | None = None) -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(prog="python -m espalier.commands.plan.time.published", description=__doc__)
    parser.add_argument("--fit", action="store_true", help="refit the efficiencies on the first half")
    parser.add_argument("--write", action="store_true", help="write the table into docs/plan.md")
    arguments = parser.parse_args(argv)
    if arguments.fit:
        found = fit(FIT_HALF)
        print(found)
        print(f"fitted on {errors(FIT_HALF, found)}\nheld out  {errors(HELD_OUT, found)}")
    elif arguments.write:
        text = DOCS.read_text()
        DOCS.write_text(text.replace(documented(), table()))
    else:
        print(table())


def _layout(run: Run) -> str:
    job = run.job
    parts = [
        " × ".join(f"{axis} {size}" for axis, size in job.mesh.items()),
        f"{job.batch_rows} rows of {job.sequence_length}",
    ]
    if job.accumulation > 1:
        parts.append(f"{job.accumulation} micro-batches")
    again = [name for name in job.recomputed or () if name != "elementwise"]
    if again:
        parts.append("again: " + ", ".join(again))
    return "; ".join(parts)


def _loss(some: Sequence[Run], efficiency: Efficiency) -> float:
    total = 0.0
    for run in some:
        off = abs(math.log1p(error(run, efficiency)))
        total += off**2 if off < 0.15 else 0.3 * off - 0.15**2
    return total


if __name__ == "__main__":
    main()
