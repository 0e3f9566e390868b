"""Embeddings of texts: the mean of a text's states, or its first or last one, of length 1; and how alike texts are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from espalier.data.examples import Example, encode_pairs
from espalier.data.tokenizer import special_ids
from espalier.errors import UserError
from espalier.models.config import Execution, ModelConfig
from espalier.models.heads import embed_rows
from espalier.models.sentence_transformers import Pooling
from espalier.models.transformer import apply
from espalier.predict.outputs import outputs
from espalier.predict.use import Use

if TYPE_CHECKING:
    from espalier.predict.loaded import LoadedModel


def read(row: Mapping[str, Any]) -> str:
    text = row.get("text")
    if not isinstance(text, str):
        raise UserError(f"no text: a row has text, and this one {', '.join(row) or 'nothing'}")
    return text


def embed(model: LoadedModel, texts: Sequence[str], size: int | None = None) -> np.ndarray:
    """An embedding of each text, float32 [N, D], as LoadedModel.embed says."""
    width = model.config.hidden_size
    if size is not None and not 1 <= size <= width:
        raise UserError(f"size={size}: the embeddings of this model have {width} numbers; give 1 to {width}")
    if not len(texts):
        return np.zeros((0, size or width), np.float32)
    settings = (model.config, pooling_of(model), model.execution)
    rows = outputs(
        pooled,
        settings,
        model.params,
        encoded(model, texts),
        pad_id=special_ids(model.tokenizer).pad,
        longest=model.config.max_length,
    )
    x_ND = np.stack(rows)[:, :size]
    return unit(x_ND) if size or model.saved.get("normalize", True) else x_ND


def pooling_of(model: LoadedModel) -> Pooling:
    """That of its run or folder; of a model that was not tuned for it the mean, of a causal one the last token."""
    return model.saved.get("pooling") or default_pooling(model.config)


def default_pooling(model: ModelConfig) -> Pooling:
    """Only the last token of a causal model has seen the whole text."""
    return "last" if model.causal else "mean"


def encoded(model: LoadedModel, texts: Sequence[str]) -> list[Example]:
    """As fine-tuning encodes texts; those for a folder of sentence-transformers as its tokenizer does."""
    if prompt := model.saved.get("prompt"):
        texts = [prompt + text for text in texts]
    if not model.saved.get("framed"):
        return encode_pairs(model.tokenizer, texts, None, model.longest, model.config.causal)
    # Where the folder says nothing of the length, its tokenizer does.
    longest = model.saved.get("longest") or model.tokenizer.model_max_length
    longest = min(longest, model.config.max_length or model.config.max_position_embeddings)
    whole = model.tokenizer(list(texts))["input_ids"]
    if not any(len(ids) > longest for ids in whole):
        return [Example(ids, [0] * len(ids)) for ids in whole]
    kept = model.tokenizer(list(texts), truncation=True, max_length=longest)["input_ids"]
    return [Example(ids, [0] * len(ids), cut=len(before) - len(ids)) for before, ids in zip(whole, kept, strict=True)]


def pooled(
    config: ModelConfig,
    pooling: Pooling,
    execution: Execution,
    params: Any,
    batch: dict,
    key: jax.Array | None = None,
) -> jax.Array:
    """An embedding of each row, float32 [B, D], of any length. Rows hold one text each; a key turns dropout on."""
    x_BTD = apply(config, params, batch, execution=execution, key=key)
    return embed_rows(config, params, x_BTD.astype(jnp.float32), batch["segment_ids"], pooling)


def unit(x_ND: np.ndarray) -> np.ndarray:
    """Each row with length 1; a row of zeros stays."""
    return x_ND / np.maximum(np.linalg.norm(x_ND, axis=-1, keepdims=True), 1e-12)


def answers(model: LoadedModel, texts: Sequence[str]) -> list[dict[str, Any]]:
    """`embedding`, D numbers, of each."""
    return [{"embedding": row.tolist()} for row in embed(model, texts)]


EMBED = Use(name="embed", takes="text", reads=read, answers=answers, example={"text": "How far is it to the sea?"})
