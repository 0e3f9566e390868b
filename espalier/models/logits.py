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
from espalier.models.transformer import apply
from espalier.models.vocabulary import logits

OF_TOKENS = {
    "token_classification": token_logits,
    "question_answering": span_logits,
    "replaced_token_detection": replaced_logits,
}


def batch_of_tokens(tokens: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The batch, int32 [B, T] each, of what a tokenizer of transformers returns (`return_tensors="np"`, padded).

    Segments come from `attention_mask` (no mask: all tokens are real), positions count the real tokens of a row, on
    whichever side the padding is. A batch that has `segment_ids` and `positions` already stays as it is, and
    `position_ids` are taken where they are given. UserError where the rows are no rectangle or the mask is not 0 and 1.
    """
    if "input_ids" not in tokens:
        raise UserError(f"tokens need input_ids, and these have {', '.join(map(str, tokens)) or 'nothing'}")
    shape = _array(tokens, "input_ids").shape
    batch = {name: _array(tokens, name, shape) for name in ("input_ids", "token_type_ids") if _has(tokens, name)}
    if _has(tokens, "segment_ids"):
        batch["segment_ids"] = _array(tokens, "segment_ids", shape)
    else:
        mask_BT = (
            _array(tokens, "attention_mask", shape) if _has(tokens, "attention_mask") else np.ones(shape, np.int32)
        )
        if not np.isin(mask_BT, (0, 1)).all():
            raise UserError("attention_mask has values other than 0 and 1; name documents of a row by segment_ids")
        batch["segment_ids"] = mask_BT
    given = next((name for name in ("positions", "position_ids") if _has(tokens, name)), None)
    if given:
        batch["positions"] = _array(tokens, given, shape)
    elif _has(tokens, "segment_ids"):
        raise UserError("segment_ids need positions beside them, which begin at 0 in each document")
    else:
        batch["positions"] = np.maximum(np.cumsum(batch["segment_ids"], axis=1, dtype=np.int32) - 1, 0)
    return batch


def head_logits(
    config: ModelConfig, head: str, params: dict, batch: Mapping[str, Any], execution: Execution | None = None
) -> jax.Array:
    """Logits of a head, float32, in evaluation (no dropout).

    [B, T, V] of a language model, [B, C] of a classifier of sequences, [B, T, C] of tokens, [B, T, 2] start and end of
    an answer, [B, T] that a token was replaced. head: a name in models.heads.HEADS; UserError for `embedding`.
    """
    execution = execution or Execution(dtype="float32")
    if head not in (*LANGUAGE_MODELS, "sequence_classification", *OF_TOKENS):
        raise UserError(f"a model with the head {head!r} has no logits; take models.transformer.apply for its states")
    x_BTD = apply(config, params, dict(batch), execution=execution)
    if head == "sequence_classification":
        return sequence_logits(config, params, x_BTD, batch["segment_ids"])
    if head in OF_TOKENS:
        return OF_TOKENS[head](config, params, x_BTD)
    language_model = masked_lm_head if head == "masked_lm" else causal_lm_head
    features_BTE, table_VE, bias_V = language_model(config, params, x_BTD, execution)
    return logits(features_BTE, table_VE, bias_V, config.vocab_size, config.final_logit_softcapping)


def _has(tokens: Mapping[str, Any], name: str) -> bool:
    return name in tokens and tokens[name] is not None


def _array(tokens: Mapping[str, Any], name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
    try:
        array = np.asarray(tokens[name])
    except ValueError:
        raise UserError(f"the rows of {name} are of different lengths; pad them (padding=True)") from None
    if array.ndim != 2 or array.dtype.kind not in "iub" or shape not in (None, array.shape):
        wanted = "rows × tokens" if shape is None else f"{shape} as input_ids"
        raise UserError(f"{name} has the shape {array.shape} of {array.dtype}, expected whole numbers, {wanted}")
    return array.astype(np.int32)
