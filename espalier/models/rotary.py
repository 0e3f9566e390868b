"""Rotary positions (Su et al. 2021) in the half-split layout of Hugging Face.

Frequency scaling: Grattafiori et al. 2024, section 3.2 (Llama 3), Peng et al. 2023, section 3 (YaRN).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from espalier.models.config import LayerKind, ModelConfig


def rotary_frequencies(config: ModelConfig, kind: LayerKind = "global") -> np.ndarray:
    """Radians per position of each pair of dimensions in layers of this kind, float32 [rotary_size / 2].

    Scaling: linear (Chen et al. 2023) divides all of them; llama3 only those of wavelengths longer than the original
    context, leaves the short ones and blends in between, by the frequency; yarn likewise, by the number of the pair
    (Peng et al. 2023, section 3.2). Local layers with a base of their own are not scaled.
    """
    c, theta, factor = config, config.rope_theta, config.rope_scaling_factor
    if kind == "local" and c.local_rope_theta is not None:
        theta, factor = c.local_rope_theta, None
    # In float32 step by step, as the published models were trained: at position 30,000 the last bit shows. The power by
    # way of float64, because NumPy's own in float32 depends on the processor.
    exponent = np.arange(0, c.rotary_size, 2, dtype=np.float32) / np.float32(c.rotary_size)
    power = (np.float64(theta) ** exponent.astype(np.float64)).astype(np.float32)
    frequency = np.float32(1) / power
    if factor is not None and c.rope_type == "linear":
        frequency = frequency / factor
    elif factor is not None and c.rope_type == "yarn":
        first, last = _yarn_range(c)
        ramp = (np.arange(c.rotary_size // 2, dtype=np.float32) - np.float32(first)) / np.float32(last - first)
        kept = np.float32(1) - np.clip(ramp, 0, 1)
        frequency = np.float32(1) / (np.float32(factor) * power) * (np.float32(1) - kept) + frequency * kept
    elif factor is not None:
        turns = c.rope_original_max_position_embeddings * frequency / (2 * np.pi)
        low, high = c.rope_low_freq_factor, c.rope_high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequency = kept * frequency + (1 - kept) * frequency / factor
    return frequency.astype(np.float32)


def _yarn_range(c: ModelConfig) -> tuple[float, float]:
    """Between which pairs of dimensions YaRN blends: those that rotate beta_fast and beta_slow times in the original
    context, by the inverse of theta^(-2i/R), R = rotary_size (Peng et al. 2023, eq. 17 to 20, and the
    bounds of their code)."""

    def pair(turns: float) -> float:
        ratio = c.rope_original_max_position_embeddings / (turns * 2 * math.pi)
        return c.rotary_size * math.log(ratio) / (2 * math.log(c.rope_theta))

    first, last = pair(c.rope_beta_fast), pair(c.rope_beta_slow)
    if c.rope_truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, c.rotary_size - 1)
    return first, last + (0.001 if first == last else 0)


def rotary_tables(
    positions_BT: jax.Array, config: ModelConfig, kind: LayerKind = "global"
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every position's angles in layers of this kind, float32 [B, T, 1, R/2] (1: all heads).

    YaRN makes them longer than 1, which sharpens the scores of both queries and keys (Peng et al. 2023, eq. 22).
    """
    frequencies = rotary_frequencies(config, kind)
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if config.rotary_length == 1 or kind == "local" and config.local_rope_theta is not None:
        return cos, sin
    length = jnp.float32(config.rotary_length)
    return cos * length, sin * length


def rotary_by_kind(config: ModelConfig, positions_BT: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The tables of every kind of layer that rotates queries and keys; none with learned positions."""
    if config.position_embedding != "rotary":
        return {}
    kinds = sorted(set(config.layers) - {"nope"})
    return {kind: rotary_tables(positions_BT, config, kind) for kind in kinds}


def rotate(x_BTNH: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate queries or keys by their positions (Su et al. 2021, eq. 34).

    Of the first rotary_size dimensions, i pairs with i + rotary_size / 2; the rest stays as it is.
    """
    cos, sin = tables
    half = cos.shape[-1]
    x = x_BTNH.astype(jnp.float32)
    first, second, *rest = jnp.split(x, [half] if 2 * half == x.shape[-1] else [half, 2 * half], axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, *rest], axis=-1)
    return turned.astype(x_BTNH.dtype)
