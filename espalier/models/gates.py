"""Gates between 0 and 1 that are 0 and 1 with a probability of their own: HardKuma (Bastings et al. 2019).

A Kumaraswamy variable k of shapes a, b has the distribution function F(k) = 1 - (1 - k^a)^b on (0, 1). It is stretched
to (LOW, HIGH) and cut at 0 and 1: z = min(1, max(0, LOW + (HIGH - LOW) k)). Samples have gradients in a and b.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

LOW, HIGH = -0.1, 1.1
"""The stretched support (their section 4)."""
LEAST = 1e-3
"""Of a shape, and of a uniform number's distance from 0 and 1."""


def shapes(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(a, b) of two scores [..., 2], positive."""
    positive = jax.nn.softplus(logits) + LEAST
    return positive[..., 0], positive[..., 1]


def sample(a: jax.Array, b: jax.Array, uniform: jax.Array) -> jax.Array:
    """Gates z, of uniform numbers in (0, 1)."""
    uniform = jnp.clip(uniform, LEAST, 1 - LEAST)
    k = jnp.power(1.0 - jnp.power(1.0 - uniform, 1.0 / b), 1.0 / a)
    return jnp.clip(LOW + (HIGH - LOW) * k, 0.0, 1.0)


def closed(a: jax.Array, b: jax.Array) -> jax.Array:
    """P(z = 0)."""
    return _distribution(a, b, -LOW / (HIGH - LOW))


def wide_open(a: jax.Array, b: jax.Array) -> jax.Array:
    """P(z = 1)."""
    return 1.0 - _distribution(a, b, (1 - LOW) / (HIGH - LOW))


def likely_open(a: jax.Array, b: jax.Array) -> jax.Array:
    """P(z > 1/2)."""
    return 1.0 - _distribution(a, b, (0.5 - LOW) / (HIGH - LOW))


def _distribution(a: jax.Array, b: jax.Array, k: float) -> jax.Array:
    return 1.0 - jnp.power(1.0 - jnp.power(k, a), b)
