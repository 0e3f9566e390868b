"""Losses of preferences, each as in its paper. Pure functions of log-probabilities of whole answers, float32.

policy, reference: log π(y|x), Σ over the tokens of the answer, its end token included; [B, 2], chosen and rejected.
size: how many tokens these are. All return the loss of each pair, [B]; r = β log π(y|x)/π_ref(y|x) is the implicit
reward.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

BETA = {"dpo": 0.1, "ipo": 0.1, "kto": 0.1, "orpo": 0.1, "simpo": 2.0}
"""Loss → its weight where none is given: DPO's β, IPO's τ, KTO's β, ORPO's λ, SimPO's β."""
WITHOUT_REFERENCE = ("orpo", "simpo")


def dpo(policy_B2: jax.Array, reference_B2: jax.Array, beta: float) -> jax.Array:
    """-log σ(β log π(y_w)/π_ref(y_w) - β log π(y_l)/π_ref(y_l)) (Rafailov et al. 2023, eq. 7). ln 2 at first."""
    ratio_B2 = policy_B2 - reference_B2
    return jax.nn.softplus(-beta * (ratio_B2[:, 0] - ratio_B2[:, 1]))


def ipo(policy_B2: jax.Array, reference_B2: jax.Array, tau: float) -> jax.Array:
    """(h - 1/(2τ))², h = log π(y_w)/π_ref(y_w) - log π(y_l)/π_ref(y_l) (Azar et al. 2023, eq. 17). 1/(4τ²) at first.

    Of whole answers, as in the paper; implementations that take means over tokens have another scale of τ.
    """
    ratio_B2 = policy_B2 - reference_B2
    return jnp.square(ratio_B2[:, 0] - ratio_B2[:, 1] - 1 / (2 * tau))


def orpo(policy_B2: jax.Array, size_B2: jax.Array, weight: float) -> jax.Array:
    """-log P(y_w) - λ log σ(log odds(y_w)/odds(y_l)), odds = P/(1 - P) (Hong et al. 2024, eq. 3 to 7).

    log P(y) is the mean over the tokens of y.
    """
    mean_B2 = policy_B2 / size_B2
    # log(1 - P), which is -∞ where an answer is certain.
    rest_B2 = jnp.log(-jnp.expm1(jnp.minimum(mean_B2, -1e-6)))
    odds_B2 = mean_B2 - rest_B2
    return -mean_B2[:, 0] + weight * jax.nn.softplus(-(odds_B2[:, 0] - odds_B2[:, 1]))


def simpo(policy_B2: jax.Array, size_B2: jax.Array, beta: float, gamma: float) -> jax.Array:
    """-log σ(β/|y_w| log π(y_w) - β/|y_l| log π(y_l) - γ) (Meng et al. 2024, eq. 6)."""
    mean_B2 = policy_B2 / size_B2
    return jax.nn.softplus(-(beta * (mean_B2[:, 0] - mean_B2[:, 1]) - gamma))


def kto(
    ratio_B: jax.Array, good_B: jax.Array, kl: jax.Array, beta: float, desirable: float, undesirable: float
) -> jax.Array:
    """λ_y - v, v = λ_D σ(β (r - z)) of good answers, λ_U σ(β (z - r)) of others (Ethayarajh et al. 2024, eq. 7 and 8).

    ratio_B: r = log π(y|x)/π_ref(y|x). kl: z, a scalar without gradient (`kto_kl`).
    """
    side_B = jnp.where(good_B > 0, 1.0, -1.0)
    weight_B = jnp.where(good_B > 0, desirable, undesirable)
    return weight_B * (1 - jax.nn.sigmoid(side_B * beta * (ratio_B - jax.lax.stop_gradient(kl))))


def kto_kl(total: jax.Array, count: jax.Array) -> jax.Array:
    """z = max(0, mean of log π(y'|x)/π_ref(y'|x)) over the whole batch, y' answers to other prompts (section 4.1)."""
    return jax.lax.stop_gradient(jnp.maximum(total / jnp.maximum(count, 1.0), 0.0))
