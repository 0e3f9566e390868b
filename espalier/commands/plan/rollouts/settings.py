"""The settings of `plan rollouts`. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from espalier.commands.plan.objectives import PRESETS
from espalier.errors import UserError


@dataclass(frozen=True)
class RolloutsConfig:
    """Tokens a second of drawing, and the seconds of a step of `finetune reinforce`, on chips that are not here."""

    preset: str = "llama-8b"
    """The model: a preset of clm."""
    chip: str = "h100"
    """h100, a100, v5p, v5e and others; an unknown name lists all."""
    chips: int = 8
    tensor: int | None = None
    """Devices that share a copy of the weights while completions are drawn, by tensor parallelism; unset = the fewest
    that hold one beside the state of the training."""
    prompts: int = 64
    """Of a step."""
    samples: int = 8
    """Completions of each prompt."""
    prompt_length: int = 512
    max_new_tokens: int = 1024
    """Tokens of the longest completion."""
    mean_new_tokens: int | None = None
    """Tokens of a completion on average; unset = all are as long as the longest."""
    slots: int | None = None
    """Completions that are drawn at once; unset = all of a step, or as many as the memory holds."""
    price: float | None = None
    """Of a chip for an hour, in any currency."""
    json: bool = False
    """Print one JSON object instead of the text."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self):
        if self.preset not in PRESETS["clm"]:
            raise UserError(f"preset={self.preset} is no decoder; there are {', '.join(PRESETS['clm'])}")
        for name in ("chips", "prompts", "samples", "prompt_length", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.mean_new_tokens is not None and not 1 <= self.mean_new_tokens <= self.max_new_tokens:
            raise UserError(
                f"mean_new_tokens={self.mean_new_tokens} must lie between 1 and max_new_tokens={self.max_new_tokens}"
            )
        if self.slots is not None and self.slots < self.samples:
            raise UserError(f"slots={self.slots} hold no group of samples={self.samples}; give at least as many")
