"""The optimizers there are, one entry each: what step, memory model, time model and flags know of them.

An entry names functions of optax; the rate, decay and clipping around them are the same for all
(`training.optimizer`). Imports no JAX, for presets read it.

AdamW: Loshchilov & Hutter 2019. Muon: Jordan et al. 2024, the orthogonalised momentum times √max(1, out/in).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optax import GradientTransformation

    from espalier.training.config import OptimizerConfig

RATES = ("learning_rate", "muon_learning_rate", "weight_decay")
"""Settings of the optimizer that are values in the state of a run."""
AtMatrices = Callable[[Callable[[tuple[Any, Any]], Any]], Any]
"""f → a tree like the parameters: f((reduction axes, output axes)) where Muon may treat a leaf as matrices, whose other
axes count them, and optax.MaskedNode elsewhere."""


def _adam(config: OptimizerConfig) -> GradientTransformation:
    import optax

    return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)


@dataclass(frozen=True)
class OptimizerKind:
    """One optimizer: gradients → directions, in which the parameters go by rate · direction."""

    direction: Callable[[OptimizerConfig], GradientTransformation] = _adam
    """Of all parameters, or of those that are no matrices where `matrices` is set."""
    matrices: Callable[[OptimizerConfig, AtMatrices], GradientTransformation] | None = None
    """Of the matrices of the layers, if they are treated apart."""
    matrix_rate: str = "learning_rate"
    """Which of RATES is theirs."""
    matrix_scale: Callable[[int, int], float] = lambda fan_in, fan_out: 1.0
    """What their directions are multiplied by."""
    moments: int = 2
    """float32 values that it keeps for each parameter."""
    matrix_moments: int = 2
    """The same of those matrices."""
    matrix_flops: Callable[[int, int], float] = lambda rows, columns: 0.0
    """FLOPs of a step for one such matrix, beside a few for each of its elements."""


def _muon(config: OptimizerConfig, at_matrices: AtMatrices) -> GradientTransformation:
    from optax.contrib import MuonDimensionNumbers, scale_by_muon

    return scale_by_muon(weight_dimension_numbers=at_matrices(lambda axes: MuonDimensionNumbers(*axes)))


def _newton_schulz_flops(rows: int, columns: int) -> float:
    """Five steps of X Xᵀ, its square, and the product with X."""
    short, long = sorted((rows, columns))
    return 5 * (4 * short * short * long + 2 * short**3)


OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind(),
    "muon": OptimizerKind(
        matrices=_muon,
        matrix_rate="muon_learning_rate",
        # The effect of a step on the output is alike for matrices of every form.
        matrix_scale=lambda fan_in, fan_out: math.sqrt(max(1.0, fan_out / fan_in)),
        matrix_moments=1,
        matrix_flops=_newton_schulz_flops,
    ),
}
"""By the name of --optimizer.name, which the state of a run with matrices apart holds as well."""
