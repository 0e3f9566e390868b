"""The policy gradient: completions whose reward was above that of their group become more probable.

REINFORCE (Williams 1992) with the ratio of PPO, which is exactly 1 in the first update on a batch of completions:

    Σ_rows Σ_tokens min(ρ A, clip(ρ, 1 - ε, 1 + ε′) A) / normaliser,   ρ = π(token) / π of the first update(token)

Of completions that are one step behind (policy.asynchronous), ρ = π(token) / π where it was drawn(token).

The value of the loss is the mean reward, negated, which is what people want to see fall; its gradient is of the above.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from espalier.models.config import Execution, ModelConfig
from espalier.models.logprobs import label_logprobs
from espalier.training.step import Objective

if TYPE_CHECKING:
    from collections.abc import Callable

    from espalier.training.state import TrainState
    from finetune.tasks.reinforce.record import PolicyGradient


def policy_objective(
    model: ModelConfig,
    policy: PolicyGradient,
    *,
    execution: Execution,
    collect: Callable[[TrainState, dict, jax.Array], dict] | None = None,
    ahead: Callable[[TrainState, int, jax.Array], dict] | None = None,
) -> Objective:
    """The objective over batches as `rollouts.Rollouts` makes them.

    Metrics: reward and length of a completion; pass@1 and pass@G; shares of completions that were cut off, that gave an
    error and that were dropped for mismatch, and of groups without gradient; per token entropy (what was drawn is less
    probable than 1), mismatch (nats), clipped, and kl to the reference (k3).
    """

    def prepare(batch, key, step, train):
        rows = jnp.float32(batch["rewards"].shape[0])
        return batch, {"rows": rows, "tokens": jnp.maximum(jnp.sum(batch["weights"]), 1.0)}

    def loss(params, batch, key, norms, train):
        logprob_BC = completion_logprobs(model, params, batch, policy.temperature, execution)
        first_BC = jax.lax.stop_gradient(logprob_BC)
        if train and policy.updates > 1:
            first_BC = jnp.where(jnp.max(batch["fresh"]) > 0, first_BC, batch["first_logprobs"])
        weights_BC = batch["weights"]
        gap_BC = (first_BC - batch["drawn_logprobs"]) * weights_BC
        length_B = jnp.sum(weights_BC, axis=1)
        dropped_B = jnp.sum(jnp.abs(gap_BC), axis=1) > policy.mismatch * length_B
        learnt_BC = jnp.where(dropped_B[:, None], 0.0, weights_BC)

        ratio_BC = jnp.exp(logprob_BC - (batch["drawn_logprobs"] if policy.asynchronous else first_BC))
        advantage_B1 = batch["advantages"][:, None]
        low, high = 1 - policy.clip, 1 + (policy.clip if policy.clip_high is None else policy.clip_high)
        gain_BC = jnp.minimum(ratio_BC * advantage_B1, jnp.clip(ratio_BC, low, high) * advantage_B1)
        if policy.correction is not None:
            gain_BC = gain_BC * jnp.minimum(jnp.exp(gap_BC), policy.correction)
        kl_BC = None
        if "reference_logprobs" in batch:
            kl_BC = k3(logprob_BC, batch["reference_logprobs"])
            if policy.kl == "k3":
                gain_BC = gain_BC - policy.beta * kl_BC
        if policy.normaliser == "budget":
            part_B1 = 1 / (norms["rows"] * logprob_BC.shape[1])
        elif policy.normaliser == "tokens":
            part_B1 = 1 / norms["tokens"]
        else:
            part_B1 = 1 / (norms["rows"] * jnp.maximum(length_B, 1.0)[:, None])
        gained = jnp.sum(learnt_BC * gain_BC * part_B1)
        counted_B, valid_B = batch["counted"], batch["valid"]
        reward, valid, rows, tokens = (
            jnp.sum(batch["rewards"] * valid_B), jnp.sum(valid_B), jnp.sum(counted_B), jnp.sum(length_B)
        )  # fmt: skip
        value = jax.lax.stop_gradient(gained) - gained - reward / norms["rows"]
        outside_BC = (ratio_BC < low) | (ratio_BC > high)
        metrics = {
            "loss": (-reward, valid),
            "reward": (reward, valid),
            "length": (jnp.sum(batch["lengths"]), rows),
            "pass@1": (jnp.sum(batch["solved"] * valid_B), valid),
            f"pass@{policy.samples}": (jnp.sum(batch["any_solved"] * counted_B), rows),
            "cut": (jnp.sum(batch["cut"] * counted_B), rows),
            "no_gradient": (jnp.sum(batch["equal"] * counted_B), rows),
            "reward_errors": (rows - valid, rows),
            "entropy": (-jnp.sum(batch["drawn_logprobs"] * weights_BC), tokens),
            "mismatch": (jnp.sum(jnp.abs(gap_BC)), tokens),
            "dropped": (jnp.sum(dropped_B), rows),
        }
        if policy.updates > 1 or policy.asynchronous:
            metrics["clipped"] = (jnp.sum(outside_BC * weights_BC), tokens)
        if kl_BC is not None:
            metrics["kl"] = (jnp.sum(kl_BC * weights_BC), tokens)
        return value, jax.lax.stop_gradient(jax.tree.map(lambda total: jnp.asarray(total, jnp.float32), metrics))

    return Objective(prepare, loss, collect=collect, collected_for=policy.updates, ahead=ahead)


def completion_logprobs(
    model: ModelConfig, params: Any, batch: dict, temperature: float, execution: Execution
) -> jax.Array:
    """log π of each token of completions by the pass of training, float32 [B, C]; of no meaning where there is none.

    batch: `input_ids`, `segment_ids`, `positions` [B, T + C], `completions` int32 [B, C].
    """
    completion_BC = batch["completions"]
    first = batch["input_ids"].shape[1] - completion_BC.shape[1] - 1
    row = {name: batch[name] for name in ("input_ids", "segment_ids", "positions")}
    return label_logprobs(model, params, row, completion_BC, execution, first=first, temperature=temperature)[0]


def k3(logprob: jax.Array, reference: jax.Array) -> jax.Array:
    """Schulman's estimator of KL(π ‖ π_ref) from what π drew: π_ref/π - 1 - log π_ref/π, never negative (2020)."""
    difference = reference - logprob
    return jnp.exp(difference) - 1 - difference
