"""What may stand at the masks of a text: the question that masked LM learns to answer (Devlin et al. 2019, sec. 3.1).

As the fill-mask pipeline of transformers: every mask is filled on its own, given all masks of the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from espalier.data.examples import Example
from espalier.data.tokenizer import special_ids
from espalier.errors import UserError
from espalier.models.config import Execution, ModelConfig
from espalier.models.heads import hidden_token_head
from espalier.models.transformer import apply
from espalier.models.vocabulary import logits
from espalier.predict.likelihood import framing
from espalier.predict.outputs import outputs
from espalier.predict.use import Use

if TYPE_CHECKING:
    from espalier.predict.loaded import LoadedModel

MASK = "[MASK]"
"""What a mask may be called for every model, whatever its tokenizer calls it."""
MASKS, CANDIDATES = 16, 100
"""Masks of a row and candidates of a mask that one program finds, whatever is asked for. A text with more masks is
several rows."""

Masked = tuple[str, int]
"""A text with masks, and how many candidates are wanted of each."""


def read(row: Mapping[str, Any]) -> Masked:
    text, top_k = row.get("text"), row.get("top_k", 5)
    if not isinstance(text, str):
        raise UserError(f"no text: a row has text with {MASK} in it, and this one {', '.join(row) or 'nothing'}")
    try:
        return text, int(top_k)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"top_k={top_k!r} is not a whole number") from None


def fill(model: LoadedModel, inputs: Sequence[Masked]) -> list[dict[str, Any]]:
    """`filled` and `masks` of each (LoadedModel.fill)."""
    mask = special_ids(model.tokenizer, need=("mask",)).mask
    assert mask is not None
    if not all(1 <= top_k <= CANDIDATES for _, top_k in inputs):
        raise UserError(f"top_k is a number from 1 to {CANDIDATES}")
    texts = [text.replace(MASK, str(model.tokenizer.mask_token)) for text, _ in inputs]
    rows: list[Example] = []
    begins, counts = [], []
    for text in texts:
        example, at = _masked(model, text, mask)
        begins.append(len(rows))
        counts.append(len(at))
        for first in range(0, len(at), MASKS):
            some = at[first : first + MASKS]
            rows.append(example._replace(of_row={"masks": np.pad(some, (0, MASKS - len(some)))}))
    found = outputs(
        most_probable,
        (model.config, model.head, model.execution, min(CANDIDATES, model.config.vocab_size)),
        model.params,
        rows,
        pad_id=special_ids(model.tokenizer).pad,
        longest=model.config.max_length,
        of_row=("masks",),
    )
    results = []
    for text, (_, top_k), begin, count in zip(texts, inputs, begins, counts, strict=True):
        own = found[begin : begin + -(-count // MASKS)]
        ids_MK, logprobs_MK = (np.concatenate([row[name] for row in own])[:count] for name in ("ids", "logprobs"))
        masks = [
            [
                {"token": model.tokenizer.decode([int(id)]), "id": int(id), "probability": float(np.exp(logprob))}
                for id, logprob in zip(ids_K[:top_k], logprobs_K[:top_k], strict=True)
            ]
            for ids_K, logprobs_K in zip(ids_MK, logprobs_MK, strict=True)
        ]
        results.append({"filled": _filled(model, text, [one[0]["token"] for one in masks]), "masks": masks})
    return results


def most_probable(
    config: ModelConfig, head: str, execution: Execution, count: int, params: Any, batch: Mapping[str, Any]
) -> Any:
    """`ids` and `logprobs`, [B, M, count], of the most probable tokens at the positions `masks` [B, M]."""
    x_BTD = apply(config, params, dict(batch), execution=execution)
    features_BME, table_VE, bias_V = hidden_token_head(config, head, params, x_BTD, batch["masks"], execution)
    scores_BMV = logits(features_BME, table_VE, bias_V, config.vocab_size, config.final_logit_softcapping)
    best_BMK, ids_BMK = jax.lax.top_k(scores_BMV, count)
    return {"ids": ids_BMK, "logprobs": best_BMK - jax.nn.logsumexp(scores_BMV, axis=-1, keepdims=True)}


def _masked(model: LoadedModel, text: str, mask: int) -> tuple[Example, np.ndarray]:
    """The text as the model frames it, and where its masks are. UserError where there are none, or no room."""
    if model.head == "causal_lm":
        before, behind = framing(model)
        tokens = {"input_ids": [*before, *model.tokenizer(text, add_special_tokens=False)["input_ids"], *behind]}
    else:
        tokens = model.tokenizer(text)
    ids = tokens["input_ids"]
    at = np.flatnonzero(np.array(ids) == mask)
    shown = repr(text if len(text) <= 60 else f"{text[:59]}…")
    if not len(at):
        raise UserError(f"no {MASK} in {shown}; write one where a word is to be found")
    if len(ids) > model.longest:
        raise UserError(f"{shown} has {len(ids):,} tokens, and at most {model.longest:,} are read; shorten it")
    return Example(ids, tokens.get("token_type_ids", [0] * len(ids))), at.astype(np.int32)


def _filled(model: LoadedModel, text: str, tokens: Sequence[str]) -> str:
    """The text with tokens in the place of its masks; one that goes on with a word stands right behind it."""
    first, *rest = text.split(str(model.tokenizer.mask_token))
    for token, part in zip(tokens, rest, strict=True):
        joined = token.startswith("##")
        before = first.rstrip(" ") if joined or token.startswith(" ") else first
        first = before + token.removeprefix("##" if joined else "") + part
    return first


FILL = Use(
    name="fill",
    takes=f"text with {MASK} in it (and top_k, the candidates of each)",
    reads=read,
    answers=fill,
    example={"text": f"Paris is the {MASK} of France."},
)
