"""Log-probabilities of labels by a forward pass, as training takes their gradient: of rows, or of their ends alone."""

from __future__ import annotations

from typing import Any

import jax

from espalier.models.config import Execution, ModelConfig
from espalier.models.heads import causal_lm_head
from espalier.models.transformer import apply
from espalier.models.vocabulary import token_logprobs


def label_logprobs(
    config: ModelConfig,
    params: Any,
    batch: dict[str, jax.Array],
    labels_BC: jax.Array,
    execution: Execution,
    *,
    first: int = 0,
    temperature: float = 1.0,
    key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(log p(label), 1.0 where the label is the most probable token), float32 [B, C].

    batch: as models.transformer.apply takes it. labels_BC: what should follow the places first … first + C - 1.
    temperature: what scores are divided by, as where tokens were drawn at it. key: turns dropout on.
    """
    x_BTD = apply(config, params, batch, execution=execution, key=key)
    x_BCD = x_BTD[:, first : first + labels_BC.shape[1]]
    features_BCD, table_VD, bias_V = causal_lm_head(config, params, x_BCD, execution)
    softcap = config.final_logit_softcapping
    if temperature != 1:
        # c·tanh(z / c) / τ = (c / τ)·tanh((z / τ) / (c / τ))
        features_BCD = features_BCD / temperature
        bias_V = None if bias_V is None else bias_V / temperature
        softcap = None if softcap is None else softcap / temperature
    head = (features_BCD, table_VD, bias_V)
    return token_logprobs(*head, labels_BC, vocab_size=config.vocab_size, softcap=softcap)
