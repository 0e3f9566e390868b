"""What a plan reads of each pretraining objective. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import clm.presets
import mlm.presets

if TYPE_CHECKING:
    from espalier.models.config import ModelConfig
    from espalier.training.step import Objective

TOKENS = {"input_ids": "int32", "segment_ids": "int32", "positions": "int32"}


@dataclass(frozen=True)
class Planned:
    """An objective, as far as a plan goes."""

    command: str
    """Of launch.sh."""
    head: str
    causal: bool
    """Whether its models see only what came before."""
    config: type
    """Of its presets."""
    presets: Mapping[str, Callable[[], Any]]
    batch: Mapping[str, str]
    """Name → type of every array of a batch, all [B, T]."""
    build: Callable[[Any, ModelConfig], Objective]
    """(config, model) → the objective; which token ids are special changes no shape."""
    predicted: Callable[[Any], float]
    """config → the mean part of the tokens that reach the head."""


def _causal(config: Any, model: ModelConfig) -> Objective:
    from clm.loss import causal_lm_objective

    return causal_lm_objective(model, execution=config.execution)


def _masked(config: Any, model: ModelConfig) -> Objective:
    import numpy as np

    from mlm.loss import masked_lm_objective
    from mlm.masking import Vocabulary, rate_at

    return masked_lm_objective(
        model,
        config.masking,
        Vocabulary(4, np.arange(model.vocab_size) >= 5, np.zeros(model.vocab_size, np.uint8)),
        rate=lambda step: rate_at(config.masking, step, config.steps),
        execution=config.execution,
    )


OBJECTIVES: Mapping[str, Planned] = {
    planned.command: planned
    for planned in (
        Planned(
            command="clm",
            head="causal_lm",
            causal=True,
            config=clm.presets.PretrainConfig,
            presets=clm.presets.PRESETS,
            batch=TOKENS | {"labels": "int32", "loss_weights": "float32", "label_bytes": "int32"},
            build=_causal,
            predicted=lambda config: 1.0,
        ),
        Planned(
            command="mlm",
            head="masked_lm",
            causal=False,
            config=mlm.presets.PretrainConfig,
            presets=mlm.presets.PRESETS,
            batch=TOKENS,
            build=_masked,
            predicted=lambda config: (config.masking.rate + (config.masking.final_rate or config.masking.rate)) / 2,
        ),
    )
}
"""By command."""


def objective_of(config: Any) -> Planned:
    """The objective that a pretraining configuration is for."""
    return next(planned for planned in OBJECTIVES.values() if isinstance(config, planned.config))
