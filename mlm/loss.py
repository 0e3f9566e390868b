"""The masked-LM objective: maximise Σ log p(w_t | text with M hidden) over the hidden positions t in M.

Only the hidden positions reach the vocabulary head (Devlin et al. 2019, sec. 3.1); of masked next-token prediction, the
positions before them (BehnamGhader et al. 2024, section 2.1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from espalier.models.attention_settings import AttentionTerms
from espalier.models.attention_terms import entropy, states
from espalier.models.config import Execution, ModelConfig
from espalier.models.heads import hidden_token_head
from espalier.models.vocabulary import token_logprobs
from espalier.training.step import Objective
from mlm.masking import Vocabulary, mask_batch

if TYPE_CHECKING:
    from mlm.config import MaskingConfig


def masked_lm_objective(
    model: ModelConfig,
    masking: MaskingConfig,
    vocabulary: Vocabulary,
    *,
    rate: Callable,
    execution: Execution,
    mask: Callable = mask_batch,
    attention: AttentionTerms | None = None,
    head: str = "masked_lm",
) -> Objective:
    """The objective.

    rate: (traced) step, whether it trains → mask rate, see `mlm.masking.rate_at`. mask: called as `mask_batch` is.
    attention: a loss on where the heads look; with it there is a metric attention_entropy (nats, mean over
    tokens, heads and layers). head: masked_lm, or causal_lm for masked next-token prediction.
    """

    def prepare(batch, key, step, train):
        batch = mask(batch, key, rate(step, train), masking, vocabulary)
        masked = jnp.maximum(jnp.sum(batch["masked_weights"]), 1.0)
        if attention is None:
            return batch, masked
        return batch, (masked, jnp.sum(batch["segment_ids"] > 0).astype(jnp.float32))

    def loss(params, batch, key, norms, train):
        x_BTD, p_LBNTS = states(attention, model, params, batch, execution, key if train else None)
        at_BM = batch["masked_positions"]
        features_BMD, table_VD, bias_V = hidden_token_head(model, head, params, x_BTD, at_BM, execution)
        logprob_BM, correct_BM = token_logprobs(
            features_BMD,
            table_VD,
            bias_V,
            batch["masked_labels"],
            vocab_size=model.vocab_size,
            softcap=model.final_logit_softcapping,
        )
        weights_BM = batch["masked_weights"]
        loss_sum, weight = -jnp.sum(weights_BM * logprob_BM), jnp.sum(weights_BM)
        metrics = {"loss": (loss_sum, weight), "accuracy": (jnp.sum(weights_BM * correct_BM), weight)}
        if attention is not None:
            assert p_LBNTS is not None
            masked, tokens = norms
            nats, _ = metrics["attention_entropy"] = entropy(p_LBNTS, batch["segment_ids"])
            return loss_sum / masked + attention.entropy * nats / tokens, jax.lax.stop_gradient(metrics)
        return loss_sum / norms, jax.lax.stop_gradient(metrics)

    return Objective(prepare, loss)
