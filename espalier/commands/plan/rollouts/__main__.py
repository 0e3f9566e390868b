"""How fast completions are drawn, and what a step that learns from them takes: `./launch.sh plan rollouts`."""

from __future__ import annotations

import dataclasses
from typing import Any

from espalier import cli
from espalier.commands.plan.numbers import short
from espalier.commands.plan.rollouts.rollouts import Rollouts, plan
from espalier.commands.plan.rollouts.settings import RolloutsConfig


def main(config: RolloutsConfig) -> dict[str, Any]:
    """Print the plan as text, or leave it to `--json`."""
    found = plan(config)
    if not config.json:
        print(as_text(config, found))
    return dataclasses.asdict(found)


def as_text(config: RolloutsConfig, r: Rollouts) -> str:
    """The plan for people."""
    mean = config.mean_new_tokens or config.max_new_tokens
    lines = [
        f"plan rollouts: {r.model} ({short(r.params)} parameters) on {r.chips} × {r.chip}",
        f"step      {config.prompts:,} prompts of {config.prompt_length:,} tokens × {config.samples} completions of "
        f"{mean:,} tokens" + (f" (the longest {config.max_new_tokens:,})" if mean < config.max_new_tokens else ""),
        f"drawing   {r.copies} × the weights on {r.tensor} device{'s' * (r.tensor > 1)}; {r.slots:,} of {r.rows:,} "
        f"completions at once, {r.turns:,} turns",
        f"a turn    reads {r.weight_bytes / 1e9:.1f} GB of weights and {r.cache_bytes / 1e9:.1f} GB of keys and values",
        f"tokens/s  {short(r.tokens_per_second)} expected; {short(r.bound_tokens_per_second)} at most, by memory "
        "bandwidth",
        *(
            f"{name:<10}{seconds:>8.1f} s {seconds / r.step:>6.0%}"
            for name, seconds in (("prefill", r.prefill), ("decoding", r.decode), ("training", r.training))
        ),
        f"a step    {r.step:>8.1f} s" + (f"; 1,000 of them cost {r.cost:,.0f}" if r.cost is not None else ""),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run_config(main, RolloutsConfig, prog="plan rollouts")
