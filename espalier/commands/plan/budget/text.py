"""The plan of `./launch.sh plan budget` as text for people."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from espalier.commands.plan.budget import scaling_laws as laws
from espalier.commands.plan.budget.budget import Budget, Row
from espalier.commands.plan.numbers import short
from espalier.commands.plan.objectives import OBJECTIVES

WIDTH = 110
MASKED = {model.name for model in laws.PUBLISHED if model.task == "masked"}


def as_text(b: Budget) -> str:
    """The whole plan; `b` as `budget.plan` returns it."""
    parts = [
        f"plan budget: {b.given}",
        table(laws.guide(OBJECTIVES[b.objective].causal).title, b.laws, b.law),
        paragraph(
            f"* {b.law}: {short(b.parameters)} parameters on {short(b.tokens)} tokens, {b.flops:.2e} FLOPs"
            + (f", loss {b.loss:.2f}" if b.loss else "")
            + f". Why: {b.why}."
        ),
    ]
    parts += [paragraph(text) for text in cautions(b)]
    return "\n\n".join([*parts, needs(b), table("published", b.published), training(b)])


def cautions(b: Budget) -> list[str]:
    """What to keep in mind before the figures are believed."""
    if not OBJECTIVES[b.objective].causal:
        published = [row.parameters for row in b.published if row.name in MASKED]
        inside = min(published) <= b.parameters <= max(published)
        known = f"{short(min(published))} to {short(max(published))} parameters"
        return [] if inside else [f"The published encoders below have {known}: nothing here tells what lies beyond."]
    ratios = [row.tokens_per_parameter for row in b.laws]
    found = f"Tokens per parameter differ by a factor of {max(ratios) / min(ratios):.1f} between the laws"
    if b.extrapolated:
        least, most = laws.FITTED_FLOPS
        found += f", which were fitted on runs of {least:.0e} to {most:.0e} FLOPs; this is beyond"
    return [f"{found}. A model that will be used much is worth more of them: Llama 3 8B had 1,875."]


def needs(b: Budget) -> str:
    """Batch, text and time."""
    causal = OBJECTIVES[b.objective].causal
    tokens = b.batch_size * b.sequence_length
    batch = f"batch  {b.batch_size:,} rows of {b.sequence_length:,}: {short(tokens)} tokens, for {b.steps:,} steps"
    rows = [batch, *(f"       {short(row.tokens):>6}  {row.name}" for row in b.batches)]
    if not causal:
        rows += ["       measured on causal LM; BERT had 131K tokens, RoBERTa 4.19M, ModernBERT 4.72M"]
    text = f"text   {gigabytes(b.text_gb)} at {b.bytes_per_token:g} bytes a token, "
    text += f"or {gigabytes(b.unique_text_gb)} read {laws.FREE_EPOCHS} times (Muennighoff et al. 2023)"
    rows += [text] if causal else [text, "       measured on causal LM; BERT read 3.3B words 40 times"]
    if b.hours is not None:
        hours = f"{b.hours:,.0f} hours ({b.hours / 24:,.1f} days)" if b.hours >= 100 else f"{b.hours:.3g} hours"
        rows += [f"time   {hours} on {b.chips} × {b.chip} at {b.mfu:.0%} of peak"]
    return "\n".join(rows)


def table(title: str, rows: Sequence[Row], marked: str | None = None) -> str:
    with_loss = any(row.loss for row in rows)
    loss = "loss" if with_loss else ""
    head = f"{title:<33}{'params':>7}{'tokens':>9}{'tokens/param':>14}{'FLOPs':>11}{loss:>6}  arXiv"
    return "\n".join([head, *(line(row, "*" if row.name == marked else " ", with_loss) for row in rows)])


def line(row: Row, mark: str, with_loss: bool) -> str:
    ratio = f"{row.tokens_per_parameter:,.{1 if row.tokens_per_parameter < 100 else 0}f}"
    loss = f"{row.loss:.2f}" if row.loss else "–" if with_loss else ""
    figures = f"{short(row.parameters):>9}{short(row.tokens):>9}{ratio:>14}{row.flops:>11.2e}{loss:>6}"
    return f"{mark} {row.name:<29}{figures}  {row.source}"


def training(b: Budget) -> str:
    """The command, and what to change where its preset has another size."""
    found = f"train\n  {b.command}"
    if 0.9 < b.nearest_parameters / b.parameters < 1.1:
        return found
    nearest = f"{b.nearest_preset} with {short(b.nearest_parameters)}"
    note = f"No preset has {short(b.parameters)} parameters; the nearest is {nearest}: change its --model settings."
    return f"{found}\n{note}"


def gigabytes(value: float) -> str:
    return f"{value / 1000:,.3g} TB" if value >= 1000 else f"{value:.3g} GB"


def paragraph(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_on_hyphens=False, break_long_words=False)
