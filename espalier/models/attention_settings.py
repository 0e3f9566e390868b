"""The settings of losses on where attention heads look. Imports nothing heavy."""

from __future__ import annotations

import math
from dataclasses import dataclass

from espalier.errors import UserError


@dataclass(frozen=True)
class AttentionTerms:
    """A loss on where the heads look, beside that of the task (espalier/models/attention_terms.py)."""

    entropy: float = 0.0
    """What a nat of the heads' mean entropy costs: above 0 heads come to look at few tokens, below 0 at many (Attanasio
    et al. 2022); 0 = off. Try 0.1."""
    layers: tuple[int, ...] = ()
    """The layers whose heads are meant, from 0; unset = all."""

    def __post_init__(self):
        if not math.isfinite(self.entropy):
            raise UserError(f"attention.entropy={self.entropy} must be a number; try 0.1")
        if any(layer < 0 for layer in self.layers) or len(set(self.layers)) < len(self.layers):
            raise UserError(
                f"attention.layers={self.layers}: numbers of layers from 0, each once; leave it out for all"
            )

    def check(self, layers: int, used: bool) -> None:
        """UserError where the model, of so many layers, has not all that are named, or nothing is asked of them."""
        if self.layers and not used:
            raise UserError("attention.layers: nothing is asked of the heads; add --attention.entropy 0.1")
        if beyond := [layer for layer in self.layers if layer >= layers]:
            raise UserError(f"attention.layers: the model has no layer {beyond[0]}; it has 0 to {layers - 1}")


@dataclass(frozen=True)
class SupervisedAttention(AttentionTerms):
    """With the words that people marked in the examples (`data.rationale`)."""

    supervision: float = 0.0
    """What a nat costs by which the heads' mean look differs from the marked words, KL(marked ‖ heads); needs
    --data.rationale. 0 = it is measured and not learnt. Try 1."""

    def __post_init__(self):
        if not 0 <= self.supervision < math.inf:
            raise UserError(f"attention.supervision={self.supervision} must be a number of at least 0; try 1")
        super().__post_init__()
