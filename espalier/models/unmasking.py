"""Text by masked diffusion: rows begin as masks, and every pass of the model unmasks some of them.

With one token a pass in random order, at temperature 1, a row is drawn from the distribution that the training loss
bounds (mlm/diffusion/loss.py); in fewer passes the tokens of one are drawn independently (Sahoo et al. 2024, sec. 4).
The order by confidence, the surest tokens first (Chang et al. 2022; Nie et al. 2025, sec. 2.4), is another one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from espalier.models.config import Execution, ModelConfig
from espalier.models.decoding import Sampling, drawn_from, drawn_token, logprob_of
from espalier.models.heads import masked_lm_head
from espalier.models.transformer import apply
from espalier.models.vocabulary import logits

Order = Literal["confidence", "random"]


@dataclass(frozen=True)
class Unmasking:
    """How masks are filled; known when the program is compiled."""

    steps: int
    """S: passes of the model."""
    order: Order
    mask_id: int
    sampling: Sampling
    """temperature, top_k and top_p of the draws."""


def unmasked(
    config: ModelConfig,
    params: Any,
    batch: dict[str, jax.Array],
    allowed_V: jax.Array,
    keys_B: jax.Array,
    how: Unmasking,
    execution: Execution,
) -> jax.Array:
    """The rows with their masks filled, int32 [B, T].

    batch: as `apply` takes it; of a row with N masks, N·s/S (rounded down) are filled after s steps. allowed_V: bool,
    of the real vocabulary, what may be written. keys_B: what is drawn for a row depends on its key and tokens alone.
    """
    masked_BT = (batch["input_ids"] == how.mask_id) & (batch["segment_ids"] > 0)
    count_B = masked_BT.sum(1, dtype=jnp.int32)
    rows, length = masked_BT.shape
    places = jnp.arange(length, dtype=jnp.uint32)

    def step(number, ids_BT):
        x_BTD = apply(config, params, batch | {"input_ids": ids_BT}, execution=execution)
        head = masked_lm_head(config, params, x_BTD, execution)
        scores_BTV = logits(*head, config.vocab_size, config.final_logit_softcapping)
        scores_NV = jnp.where(allowed_V, scores_BTV, -jnp.inf).reshape(rows * length, -1)
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, number)
        of_place = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)), in_axes=(0, None))
        keys_N = of_place(keys, places).reshape(-1)
        drawn_N = drawn_token(drawn_from(scores_NV, how.sampling), keys_N, how.sampling)
        if how.order == "confidence":
            rank_N = logprob_of(scores_NV, drawn_N)
        else:
            rank_N = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1)))(keys_N)
        rank_BT = rank_N.reshape(rows, length)
        left_BT = ids_BT == how.mask_id
        rank_BT = jnp.where(left_BT & masked_BT, rank_BT, -jnp.inf)
        before_B, after_B = (count_B * n // how.steps for n in (number, number + 1))
        # Places in order of rank; equal ones from left to right.
        order_BT = jnp.argsort(jnp.argsort(-rank_BT, axis=1, stable=True), axis=1)
        chosen_BT = masked_BT & left_BT & (order_BT < (after_B - before_B)[:, None])
        return jnp.where(chosen_BT, drawn_N.reshape(rows, length), ids_BT)

    return jax.lax.fori_loop(0, how.steps, step, batch["input_ids"])
