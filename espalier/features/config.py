"""Settings and presets of sparse autoencoders. A preset is a function; its docstring says how to run it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import clm.presets
import mlm.config
from espalier.errors import UserError
from espalier.short_help import often
from espalier.training.config import CheckpointConfig, OptimizerConfig


@dataclass(frozen=True)
class AutoencoderConfig:
    """BatchTopK (Bussmann et al. 2024), saved and measured as JumpReLU (Rajamanoharan et al. 2024)."""

    layer: int | None = often(None)
    """Whose input is taken apart, from 0 (what enters layer 0 are the embeddings); unset = the middle one."""
    features: int | None = often(None)
    """How many there are; unset = 8 times the width of the model."""
    k: int = often(60)
    """How many of them a token has, on average over a batch."""
    aux_coefficient: float = 1 / 32
    """Weight of the loss by which features that no longer fire come back (Gao et al. 2024); 0 = off."""
    aux_k: int | None = None
    """How many of those a token has in that loss, on average; unset = half the width of the model."""
    dead_after: int = 1_000_000
    """Tokens without firing after which a feature is dead."""
    random: bool = often(False)
    """Take apart the same architecture with random weights instead: the control for every figure."""

    def __post_init__(self):
        for name in ("features", "k", "aux_k", "dead_after"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"autoencoder.{name}={value} must be at least 1")
        if self.features is not None and self.k > self.features:
            raise UserError(f"autoencoder.k={self.k} is more than the {self.features} features; give fewer")
        if self.layer is not None and self.layer < 0:
            raise UserError(f"autoencoder.layer={self.layer}: layers are counted from 0")
        if not self.aux_coefficient >= 0:
            raise UserError(f"autoencoder.aux_coefficient={self.aux_coefficient} must be at least 0; 0 = off")


@dataclass(frozen=True)
class EncoderConfig(mlm.config.PretrainConfig):
    """A sparse autoencoder on an encoder, whose text is masked as in its pretraining."""

    task: ClassVar[str] = "masked_lm_autoencoder"
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)


@dataclass(frozen=True)
class DecoderConfig(clm.presets.PretrainConfig):
    """A sparse autoencoder on a decoder."""

    task: ClassVar[str] = "causal_lm_autoencoder"
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)


def encoder() -> EncoderConfig:
    """Features of an encoder's stream: `./launch.sh features encoder --init-from RUN|hf:ID --data.files …`.

    What it reaches on a small one is in docs/features.md.
    """
    return _settings(EncoderConfig())


def decoder() -> DecoderConfig:
    """Features of a decoder's stream: `./launch.sh features decoder --init-from RUN|hf:ID --data.files …`.

    What it reaches on a small one is in docs/features.md.
    """
    return _settings(DecoderConfig())


def _settings(config):
    return replace(
        config,
        steps=2000,
        batch_size=32,
        log_every=50,
        eval_every=1000,
        eval_rows=256,
        data=replace(config.data, sequence_length=128),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, schedule="wsd", warmup=0.05, weight_decay=0.0, b2=0.999, eps=1e-8
        ),
        checkpoint=CheckpointConfig(every=500),
    )


PRESETS = {"encoder": encoder, "decoder": decoder}
