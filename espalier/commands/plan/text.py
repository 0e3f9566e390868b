"""A plan as text for a terminal."""

from __future__ import annotations

from espalier.commands.plan.numbers import short
from espalier.commands.plan.plan import Layout, Plan
from espalier.progress import plural
from sharding.advice import KEPT_FREE

GIB = 2**30


def as_text(plan: Plan) -> str:
    """The whole plan, the answer first."""
    hardware, asked, layout = plan.hardware, plan.asked, plan.layout
    where = f"{hardware.name} ({plural(hardware.chips, 'chip')})" if hardware.slice else hardware.name
    lines = [
        f"{plan.model.model_type}, {short(plan.params)} parameters, on {where}",
        "",
        verdict(plan),
        f"  mesh       {asked.mesh}{f': {plan.why_mesh}' if plan.why_mesh else ''}",
        f"  batch      {plan.rows:,} rows of {plan.length:,} tokens in {plural(asked.accumulation, 'micro-batch')}, "
        f"rematerialisation {asked.remat}",
        f"  attention  {asked.attention}: {plan.attention_reason}",
        f"  memory     {memory_line(asked)}",
    ]
    if asked.compiled:
        lines.append(f"  largest    {largest(asked)}")
        lines.append(f"  compiled   in {asked.compiled.seconds:.0f} s by the TPU's compiler{kernels(asked)}")
    if plan.hint:
        lines.append(f"  hint       {plan.hint}")
    if plan.found:
        lines += ["", f"fits: {plan.found.flags}", f"  memory     {memory_line(plan.found)}"]
    elif not asked.fits and plan.tried:
        lines += ["", f"nothing that fits among {plan.tried} layouts; try more chips, a shorter row or a smaller model"]
    time, bill, so = layout.time, plan.bill, "so " if plan.found else ""
    where = ", ".join(
        f"{name} {part / time.step:.0%}" for name, part in time.parts.items() if part >= 0.005 * time.step
    )
    lines += [
        "",
        f"{so}a step takes {time.step:.3g} s, from {time.low:.3g} to {time.high:.3g} (by analysis: docs/plan.md)",
        f"  speed      {short(time.tokens_per_second)} tokens/s, {time.tokens_per_second_per_chip:,.0f} a chip; "
        f"{time.mfu:.1%} of the peak ({time.model_flops_per_token:.3g} model FLOPs a token)",
        f"  where      {where}",
        f"  {short(plan.tokens)} tokens: {duration(bill.days)}, {bill.chip_hours:,.0f} chip-hours{cost(plan)}",
    ]
    return "\n".join(lines)


def verdict(plan: Plan) -> str:
    """One line: whether it fits."""
    asked = plan.asked
    basis = (
        "the compiler says" if asked.compiled else "by analysis (an estimate: there is no compiler for this chip here)"
    )
    answer = "fits" if asked.fits else "does not fit"
    return f"{answer}: {asked.peak / GIB:.2f} of {asked.limit / GIB:.2f} GiB a device, {basis}"


def memory_line(layout: Layout) -> str:
    """The parts of a device's memory."""
    if layout.compiled and layout.compiled.fits:
        c = layout.compiled
        return f"{c.peak / GIB:.2f} GiB: state and batch {c.arguments / GIB:.2f}, temporary {c.temporary / GIB:.2f}"
    m = layout.memory
    state = m.parameters + m.optimizer
    return (
        f"about {m.total / GIB:.2f} GiB: state {state / GIB:.2f}, gradients {m.gradients / GIB:.2f}, weights at work "
        f"{m.weights / GIB:.2f}, kept for the backward pass {m.kept / GIB:.2f}, working {m.working / GIB:.2f}"
        + ("" if layout.compiled else f"; {KEPT_FREE:.0%} of the memory is left free")
    )


def largest(layout: Layout) -> str:
    assert layout.compiled
    return "\n             ".join(
        f"{tensor.size / GIB:6.2f} GiB  {tensor.name} {tensor.shape}" for tensor in layout.compiled.largest[:6]
    ).strip()


def kernels(layout: Layout) -> str:
    assert layout.compiled
    parts = [f"{count} {name}" for name, count in layout.compiled.collectives.items()]
    if layout.compiled.kernels:
        parts.append(plural(layout.compiled.kernels, "attention kernel"))
    return f"; in the program {', '.join(parts)}" if parts else ""


def cost(plan: Plan) -> str:
    return "" if plan.bill.cost is None else f", {plan.bill.cost:,.0f} at the price given"


def duration(days: float) -> str:
    """Days, hours or minutes, whichever reads best."""
    if days >= 2:
        return f"{days:.1f} days"
    return f"{days * 24:.1f} hours" if days >= 1 / 12 else f"{days * 24 * 60:.1f} minutes"
