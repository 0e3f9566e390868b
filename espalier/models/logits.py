"""What a tokenizer returns → a batch, and the logits of any head on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from espalier.errors import UserError
from espalier.models.config import Execution, ModelConfig
from espalier.models.heads import (
    LANGUAGE_MODELS,
    causal_lm_head,
    masked_lm_head,
    replaced_logits,
    sequence_logits,
    span_logits,
    token_logits,
)
from espalier.models.inputs import completed
from espalier.models.taps import Taps
from espalier.models.transformer import apply
from espalier.models.vocabulary import logits

OF_TOKENS = {
    "token_classification": token_logits,
    "question_answering": span_logits,
    "replaced_token_detection": replaced_logits,
}


TAKEN = ("input_ids", "attention_mask", "token_type_ids", "segment_ids", "positions")
"""What a batch is made of; of `position_ids` too, which is another name of positions."""


def batch_of_tokens(tokens: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The batch, int32 [B, T] each, of what a tokenizer of transformers returns (`return_tensors="np"`, padded).

    Segments and positions are filled in (models.inputs), on whichever side the padding is. UserError where the rows are
    no rectangle or the mask is not 0 and 1.
    """
    if "input_ids" not in tokens:
        raise UserError(f"tokens need input_ids, and these have {', '.join(map(str, tokens)) or 'nothing'}")
    named = {"positions": tokens.get("position_ids")} | dict(tokens)
    shape = _array(named, "input_ids").shape
    batch = {name: _array(named, name, shape) for name in TAKEN if named.get(name) is not None}
    if not np.isin(batch.get("attention_mask", 0), (0, 1)).all():
        raise UserError("attention_mask has values other than 0 and 1; name the documents of a row by segment_ids")
    batch = completed(batch)
    batch.pop("attention_mask", None)
    return batch


def head_logits(
    config: ModelConfig,
    head: str,
    params: dict,
    batch: Mapping[str, Any],
    execution: Execution | None = None,
    taps: Taps | None = None,
) -> Any:
    """Logits of a head, float32, in evaluation (no dropout).

    [B, T, V] of a language model, [B, C] of a classifier of sequences, [B, T, C] of tokens, [B, T, 2] start and end of
    an answer, [B, T] that a token was replaced. head: a name in models.heads.HEADS; UserError for `embedding`. With
    taps (logits, what they read), as models.transformer.stack has it.
    """
    execution = execution or Execution(dtype="float32")
    if head not in (*LANGUAGE_MODELS, "sequence_classification", *OF_TOKENS):
        raise UserError(f"a model with the head {head!r} has no logits; take models.transformer.apply for its states")
    if taps is None:
        x_BTD, seen = apply(config, params, dict(batch), execution=execution), None
    else:
        x_BTD, seen = apply(config, params, dict(batch), execution=execution, taps=taps)
    scores = of_states(config, head, params, x_BTD, batch["segment_ids"], execution)
    return scores if seen is None else (scores, seen)


def of_states(
    config: ModelConfig, head: str, params: dict, x_BTD: jax.Array, segment_ids_BT: jax.Array, execution: Execution
) -> jax.Array:
    """The logits of a head on final states."""
    if head == "sequence_classification":
        return sequence_logits(config, params, x_BTD, segment_ids_BT)
    if head in OF_TOKENS:
        return OF_TOKENS[head](config, params, x_BTD)
    language_model = masked_lm_head if head == "masked_lm" else causal_lm_head
    features_BTE, table_VE, bias_V = language_model(config, params, x_BTD, execution)
    return logits(features_BTE, table_VE, bias_V, config.vocab_size, config.final_logit_softcapping)


def _array(tokens: Mapping[str, Any], name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
    try:
        array = np.asarray(tokens[name])
    except ValueError:
        raise UserError(f"the rows of {name} are of different lengths; pad them (padding=True)") from None
    if array.ndim != 2 or array.dtype.kind not in "iub" or shape not in (None, array.shape):
        wanted = "rows × tokens" if shape is None else f"{shape} as input_ids"
        raise UserError(f"{name} has the shape {array.shape} of {array.dtype}, expected whole numbers, {wanted}")
    return array.astype(np.int32)
