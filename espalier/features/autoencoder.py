"""The sparse autoencoder: vectors of a stream as sums of few directions out of many.

    z = (x / scale − b_dec) W_enc + b_enc
    f = z where z > θ and z > 0, else 0
    x̂ = scale (f W_dec + b_dec)

While it learns, θ is the value that keeps k features a token on average over the whole batch (BatchTopK, Bussmann et
al. 2024, section 3); it is measured, saved and used with the running mean of these values (JumpReLU, Rajamanoharan et
al. 2024). scale brings the mean square norm of the vectors to their width D. It is a number of the saved weights, so
that no use can differ from the training. Letters: F features, N = B × T places.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sharding.mesh import constrain

MEMORY = 0.9
"""How much of the running threshold stays from step to step, at most: it begins as the mean of all steps."""


def init_autoencoder(key: jax.Array, width: int, features: int) -> dict:
    """Fresh parameters: directions of length 1, the encoder their transpose (Gao et al. 2024, section 2.4)."""
    directions_FD = unit(jax.random.normal(key, (features, width)))
    return {
        "encoder": {"kernel": directions_FD.T, "bias": jnp.zeros(features)},
        "decoder": {"kernel": directions_FD, "bias": jnp.zeros(width)},
        "statistics": {
            "scale": jnp.ones(()),
            "mean": jnp.zeros(width),
            "threshold": jnp.zeros(()),
            "idle": jnp.zeros(features),
        },
    }


def unit(x_FD: jax.Array) -> jax.Array:
    """Rows of length 1."""
    return x_FD / jnp.maximum(jnp.linalg.norm(x_FD, axis=-1, keepdims=True), 1e-12)


def strengths(autoencoder: dict, x_BTD: jax.Array) -> jax.Array:
    """How strongly each feature is there, z above 0, [B, T, F], of a stream as the model has it, float32."""
    x_BTD = normalised(autoencoder, x_BTD) - autoencoder["decoder"]["bias"]
    z_BTF = x_BTD @ autoencoder["encoder"]["kernel"] + autoencoder["encoder"]["bias"]
    return constrain(jax.nn.relu(z_BTF), "batch", "sequence", "tensor")


def normalised(autoencoder: dict, x_BTD: jax.Array) -> jax.Array:
    return x_BTD.astype(jnp.float32) / jax.lax.stop_gradient(autoencoder["statistics"]["scale"])


def features(autoencoder: dict, x_BTD: jax.Array) -> jax.Array:
    """The features of a stream by the saved threshold, [B, T, F]."""
    z_BTF = strengths(autoencoder, x_BTD)
    return jnp.where(z_BTF > autoencoder["statistics"]["threshold"], z_BTF, 0.0)


def decoded(autoencoder: dict, f_BTF: jax.Array) -> jax.Array:
    """What features stand for, in units of `scale`."""
    return f_BTF @ unit(autoencoder["decoder"]["kernel"]) + autoencoder["decoder"]["bias"]


def reconstructed(autoencoder: dict, f_BTF: jax.Array) -> jax.Array:
    """What features stand for, as the model has it."""
    return autoencoder["statistics"]["scale"] * decoded(autoencoder, f_BTF)


def kth_largest(z: jax.Array, count: jax.Array) -> jax.Array:
    """The count-th largest of numbers ≥ 0, exactly; 0 where there are not so many above 0.

    By halving the interval of bit patterns, whose order is that of the numbers: 31 counts, of which each device makes
    its part. To sort would gather all numbers on every device.
    """
    bits, count = jax.lax.bitcast_convert_type(z, jnp.int32), count.astype(jnp.uint32)
    bits = bits.reshape(-1, bits.shape[-1])

    def narrowed(number: jax.Array, low: jax.Array) -> jax.Array:
        middle = low | (jnp.int32(1) << (30 - number))
        # The sum over the first axis is the one that XLA:CPU vectorises.
        found = (bits >= middle).sum(0, dtype=jnp.uint32).sum(dtype=jnp.uint32)
        return jnp.where(found >= count, middle, low)

    return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, 31, narrowed, jnp.int32(0)), jnp.float32)


def batch_top_k(z_BTF: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The `count` largest of a batch, and equals of the last, with 0 for the others; and the smallest that stays."""
    smallest = kth_largest(jax.lax.stop_gradient(z_BTF), count)
    return jnp.where(z_BTF >= smallest, z_BTF, 0.0), smallest


class Step(NamedTuple):
    """What a batch says while the autoencoder learns; sums over the tokens that take part, in units of `scale`."""

    loss: jax.Array
    """Σ ‖x − x̂‖² / D"""
    aux: jax.Array
    """‖e − ê‖² / ‖e‖² of the error e, and of what dead features make of it."""
    second: jax.Array
    """Σ ‖x − mean‖² / D"""
    f_BTF: jax.Array
    smallest: jax.Array
    dead_F: jax.Array


def learnt(autoencoder: dict, x_BTD: jax.Array, part_BT: jax.Array, settings: Any) -> Step:
    """The losses of a batch. part_BT: which of its tokens take part. settings: a features.config.AutoencoderConfig."""
    width = x_BTD.shape[-1]
    x_BTD = jax.lax.stop_gradient(x_BTD.astype(jnp.float32))
    part_BT1 = part_BT[..., None]
    tokens = part_BT.sum(dtype=jnp.float32)
    z_BTF = jnp.where(part_BT1, strengths(autoencoder, x_BTD), 0.0)
    f_BTF, smallest = batch_top_k(z_BTF, jnp.round(settings.k * tokens))
    target_BTD = normalised(autoencoder, x_BTD)
    error_BTD = jnp.where(part_BT1, target_BTD - decoded(autoencoder, f_BTF), 0.0)
    statistics = jax.lax.stop_gradient(autoencoder["statistics"])
    dead_F = statistics["idle"] >= settings.dead_after
    wanted = jax.lax.stop_gradient(error_BTD)
    count = jnp.round((settings.aux_k or max(1, width // 2)) * tokens)

    def from_the_dead() -> jax.Array:
        revived_BTF, _ = batch_top_k(jnp.where(dead_F, z_BTF, 0.0), count)
        missing_BTD = wanted - jnp.where(part_BT1, revived_BTF @ unit(autoencoder["decoder"]["kernel"]), 0.0)
        return jnp.sum(missing_BTD**2) / jnp.maximum(jnp.sum(wanted**2), 1e-12)

    aux = jnp.zeros(())
    if settings.aux_coefficient:
        aux = jax.lax.cond(dead_F.any(), from_the_dead, lambda: jnp.zeros(()))
    away_BTD = jnp.where(part_BT1, target_BTD - statistics["mean"] / statistics["scale"], 0.0)
    return Step(
        jnp.sum(error_BTD**2) / width, aux, jnp.sum(away_BTD**2) / width, jax.lax.stop_gradient(f_BTF), smallest, dead_F
    )


def after_step(
    before: dict, autoencoder: dict, fired_F: jax.Array, tokens: Any, smallest: Any, step: Any, dead_after: int
):
    """The parameters after the optimizer: directions of length 1, and the statistics of this batch taken in.

    before: those before it, whose statistics no optimizer has touched. fired_F: how often each feature fired.
    """
    known = before["statistics"]
    memory = jnp.minimum(1.0 - 1.0 / (step.astype(jnp.float32) + 1.0), MEMORY)
    idle_F = jnp.where(fired_F > 0, 0.0, jnp.minimum(known["idle"] + tokens, float(dead_after)))
    threshold = memory * known["threshold"] + (1.0 - memory) * smallest
    return autoencoder | {
        "decoder": autoencoder["decoder"] | {"kernel": unit(autoencoder["decoder"]["kernel"])},
        "statistics": known | {"idle": idle_F, "threshold": threshold},
    }


def geometric_median(x_BTD: jax.Array, part_BT: jax.Array, rounds: int = 30) -> jax.Array:
    """The point with the least sum of distances to the vectors that take part, [D] (Weiszfeld 1937)."""
    part_BT1 = part_BT[..., None].astype(jnp.float32)

    def nearer(_: Any, at_D: jax.Array) -> jax.Array:
        weight_BT1 = part_BT1 / jnp.maximum(jnp.linalg.norm(x_BTD - at_D, axis=-1, keepdims=True), 1e-6)
        return (weight_BT1 * x_BTD).sum((0, 1)) / weight_BT1.sum()

    mean_D = (part_BT1 * x_BTD).sum((0, 1)) / part_BT1.sum()
    return jax.lax.fori_loop(0, rounds, nearer, mean_D)
