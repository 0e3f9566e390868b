"""A plan as a page: bars of a device's memory and of the time of a step, by part."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from espalier.commands.plan.numbers import short
from espalier.commands.plan.plan import Layout, Plan
from espalier.commands.plan.text import GIB, duration, verdict
from espalier.files import write_json
from espalier.progress import plural
from espalier.report.page import Section, tiles, write_page
from sharding.mesh import AXES


class Part(NamedTuple):
    """A piece of a bar."""

    name: str
    value: float
    shown: str


COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#a463f2", "#97bbf5")


def write_plan(run_dir: str | None, plan: Plan, command: str | None) -> Path:
    """Write plan.html and plan.json into the folder of the plan; returns the page."""
    folder = Path(run_dir or "runs/plan").expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "plan.json", plan.as_json())
    title = f"Plan: {short(plan.params)} parameters on {plan.hardware.name}"
    return write_page(folder / "plan.html", title, verdict(plan), sections(plan, command), tiles(figures(plan)))


def figures(plan: Plan) -> list[tuple[str, str]]:
    """The key figures at the top."""
    time, bill = plan.layout.time, plan.bill
    shown = [
        ("fits", "yes" if plan.asked.fits else "no"),
        ("memory a device", f"{plan.asked.peak / GIB:.1f} of {plan.asked.limit / GIB:.1f} GiB"),
        ("a step", f"{time.step:.3g} s"),
        ("tokens/s a chip", f"{time.tokens_per_second_per_chip:,.0f}"),
        ("MFU", f"{time.mfu:.0%}".replace("%", " %")),
        (f"{short(plan.tokens)} tokens", duration(bill.days)),
        ("chip-hours", f"{bill.chip_hours:,.0f}"),
    ]
    return shown if bill.cost is None else [*shown, ("cost", f"{bill.cost:,.0f}")]


def sections(plan: Plan, command: str | None) -> list[Section]:
    asked, found, time = plan.asked, plan.found, plan.layout.time
    parts = [
        Section(
            "Memory of a device",
            bar(memory_parts(asked), asked.limit, f"The mark: the {asked.limit / GIB:.1f} GiB that a program may use."),
            "What was asked for: "
            + described(plan, asked)
            + ". "
            + (
                "State and batch as compiled, the rest in the proportions of the analysis."
                if asked.compiled
                else "By analysis: an estimate."
            ),
        )
    ]
    if found:
        parts.append(
            Section(
                "What fits",
                bar(memory_parts(found), found.limit, f"The mark: {found.limit / GIB:.1f} GiB."),
                f"{described(plan, found)}: {found.flags}",
            )
        )
    names = {
        "matmul": "matrix products",
        "attention": "attention",
        "memory": "activations and weights to and from memory",
        "optimizer": "optimizer",
        "launch": "gaps between kernels",
        "network": "network that is not hidden",
    }
    steps = [Part(names[name], part, f"{part:.3g} s, {part / time.step:.0%}") for name, part in time.parts.items()]
    parts.append(
        Section(
            "Where the time of a step goes",
            bar(steps, time.step, f"In all {time.step:.3g} s."),
            f"By analysis: {time.step:.3g} s, from {time.low:.3g} to {time.high:.3g} s (docs/plan.md: how good it is).",
        )
    )
    if asked.compiled:
        rows = [(f"{tensor.size / GIB:.2f} GiB", tensor.name, tensor.shape) for tensor in asked.compiled.largest]
        parts.append(Section("The largest tensors of a device", table(("size", "what", "shape"), rows)))
        rows = [(name, str(count), "") for name, count in asked.compiled.collectives.items()]
        if rows:
            parts.append(
                Section("Exchanges between devices in the program", table(("operation", "how many", ""), rows))
            )
    settings = [
        ("hardware", f"{plan.hardware.name}, {plural(plan.hardware.chips, 'chip')}", ""),
        ("mesh", " × ".join(f"{axis}={getattr(asked.mesh, axis)}" for axis in AXES), plan.why_mesh or plan.hint or ""),
        ("batch", f"{plan.rows:,} rows of {plan.length:,} tokens", plural(asked.accumulation, "micro-batch")),
        ("attention", asked.attention, plan.attention_reason),
        ("command", command or "", ""),
    ]
    return [*parts, Section("What was planned", STYLE + table(("", "", ""), settings))]


def memory_parts(layout: Layout) -> list[Part]:
    """The parts of a device's memory; for a compiled plan they add up to the compiler's figure."""
    m, compiled = layout.memory, layout.compiled
    state = [("parameters", m.parameters), ("optimizer state", m.optimizer)]
    rest = [
        ("gradients", m.gradients),
        ("weights at work", m.weights),
        ("kept for the backward pass", m.kept),
        ("working space", m.working),
    ]
    if compiled:
        state = _scaled(state, compiled.arguments)
        rest = _scaled(rest, compiled.peak - compiled.arguments)
    return [Part(name, value, f"{value / GIB:.2f} GiB") for name, value in [*state, *rest]]


def bar(parts: Sequence[Part], whole: float, end: str) -> str:
    """A horizontal stacked bar with a legend and a mark at `whole`, beyond which it may grow."""
    total = sum(part.value for part in parts)
    scale = 100 / max(total, whole)
    pieces, legend = [], []
    for part, colour in zip(parts, COLOURS, strict=False):
        title = escape(f"{part.name}: {part.shown}")
        pieces.append(f'<i title="{title}" style="width:{part.value * scale:.3f}%;background:{colour}"></i>')
        legend.append(f'<li><i style="background:{colour}"></i>{escape(part.name)} <b>{escape(part.shown)}</b></li>')
    mark = f'<u style="left:{whole * scale:.3f}%" title="{escape(end)}"></u>'
    return (
        f"<div class=stack>{''.join(pieces)}{mark}</div>"
        f"<p class=note>{escape(end)}</p><ul class=legend>{''.join(legend)}</ul>"
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heads) if any(heads) else ""
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<div class=wide><table class=plain><tr>{head}</tr>{body}</table></div>"


STYLE = (
    "<style>.stack{position:relative;display:flex;height:2.2rem;border-radius:6px;background:rgb(128 128 128/.15)}"
    ".stack i{display:block;height:100%}.stack u{position:absolute;top:-.3rem;bottom:-.3rem;width:0;"
    "border-left:2px solid currentColor}.legend{list-style:none;padding:0;display:flex;flex-wrap:wrap;gap:.3rem 1.2rem}"
    ".legend i{display:inline-block;width:.8rem;height:.8rem;border-radius:2px;margin-right:.4rem}"
    ".wide{overflow-x:auto}.plain{border-collapse:collapse}"
    ".plain td,.plain th{text-align:left;padding:.2rem .8rem .2rem 0;vertical-align:top}</style>"
)


def described(plan: Plan, layout: Layout) -> str:
    return f"{layout.mesh}, {plural(layout.accumulation, 'micro-batch')}, rematerialisation {layout.remat}"


def _scaled(parts: list[tuple[str, float]], total: float) -> list[tuple[str, float]]:
    there = sum(value for _, value in parts)
    return [(name, value * total / there) for name, value in parts] if there and total > 0 else parts
