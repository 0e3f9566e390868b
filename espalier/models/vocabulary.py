"""Probabilities over the vocabulary without ever holding them for all tokens.

Scores are formed for a chunk of tokens at a time, in float32, and formed anew in the backward pass. Masked LM,
causal LM, preference losses and scoring are sums over what `token_logprobs` returns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from espalier.models.config import ModelConfig
from espalier.models.layers import float32_einsum
from sharding.mesh import constrain


def token_logprobs(
    features_BTD: jax.Array,
    table_VD: jax.Array,
    bias_V: jax.Array | None,
    labels_BT: jax.Array,
    *,
    vocab_size: int,
    softcap: float | None = None,
    chunk_elements: int = 2**24,
) -> tuple[jax.Array, jax.Array]:
    """(log p(label), 1.0 where the label has the highest score), both float32 [B, T].

    features_BTD decides the compute dtype; table rows from vocab_size on are padding and have probability 0. softcap:
    scores are squashed to ± this by tanh (Gemma 2).
    chunk_elements: how many scores one device may hold at a time (64 MiB by default). The second result has no
    gradient; a label that ties with another for the highest score counts as right.
    """
    batch, length, _ = features_BTD.shape
    mesh = jax.sharding.get_abstract_mesh()
    devices, split = (1, 1) if mesh.empty else (mesh.size, mesh.shape["sequence"])
    most = max(1, chunk_elements * devices // (batch * table_VD.shape[0]))
    fewest = -(-length // most)
    # A few more chunks rather than padding.
    chunks = next((n for n in range(fewest, 2 * fewest) if length % (n * split) == 0), fewest)
    chunk = -(-length // (chunks * split)) * split
    padding = chunks * chunk - length
    if chunks == 1 and not padding:
        return _chunk_logprobs(features_BTD, table_VD, bias_V, labels_BT, vocab_size, softcap)

    def by_chunk(x):
        # Interleaved, so that of a row whose tokens are split over devices every chunk has some on each.
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, chunk, chunks, *x.shape[2:]), 2, 0)

    def chunk_logprobs(x, labels):
        return _chunk_logprobs(x, table_VD, bias_V, labels, vocab_size, softcap)

    one = jax.checkpoint(chunk_logprobs, prevent_cse=False)
    results = jax.lax.map(lambda inputs: one(*inputs), (by_chunk(features_BTD), by_chunk(labels_BT)))
    return jax.tree.map(lambda y: jnp.moveaxis(y, 0, 2).reshape(batch, chunks * chunk)[:, :length], results)


def logits(
    features_BTD: jax.Array,
    table_VD: jax.Array,
    bias_V: jax.Array | None,
    vocab_size: int,
    softcap: float | None = None,
) -> jax.Array:
    """Scores of the real vocabulary, float32 [B, T, vocab_size]: for a few tokens, as in generation."""
    return _scores(features_BTD, table_VD, bias_V, softcap)[..., :vocab_size]


def _scores(features_BTD, table_VD, bias_V, softcap):
    # The table stays float32 up to here, so that the chunks' gradients of it are added in float32.
    scores_BTV = float32_einsum("BTD,VD->BTV", features_BTD, table_VD, features_BTD.dtype)
    scores_BTV = constrain(scores_BTV, "batch", "sequence", "tensor")
    scores_BTV = scores_BTV if bias_V is None else scores_BTV + bias_V[None, None]
    return scores_BTV if softcap is None else softcap * jnp.tanh(scores_BTV / softcap)


def _chunk_logprobs(features_BTD, table_VD, bias_V, labels_BT, vocab_size, softcap):
    scores_BTV = _scores(features_BTD, table_VD, bias_V, softcap)
    entry_V = jnp.arange(table_VD.shape[0], dtype=jnp.int32)[None, None]
    if vocab_size < table_VD.shape[0]:
        scores_BTV = jnp.where(entry_V < vocab_size, scores_BTV, jnp.float32(-1e30))
    best_BT = jax.lax.stop_gradient(scores_BTV.max(-1))
    normaliser_BT = best_BT + jnp.log(jnp.exp(scores_BTV - best_BT[..., None]).sum(-1))
    # Compared, not indexed: with the vocabulary split over devices, each looks through its own part.
    label_BT = jnp.where(entry_V == labels_BT[..., None], scores_BTV, jnp.float32(0)).sum(-1)
    correct_BT = jax.lax.stop_gradient(label_BT >= best_BT).astype(jnp.float32)
    return label_BT - normaliser_BT, correct_BT


def grown(
    config: ModelConfig, params: Mapping[str, Any], pieces: Mapping[int, Sequence[int]]
) -> tuple[ModelConfig, dict]:
    """The model with new tokens; NumPy arrays where something has changed.

    pieces: id of a new token → the tokens that it was cut into. Its rows in the embeddings, in an output matrix and in
    the bias are the means of theirs.
    """
    new = dataclasses.replace(config, vocab_size=max(config.vocab_size, *(index + 1 for index in pieces)))

    def rows(leaf: Any) -> np.ndarray:
        old = np.asarray(leaf)
        table = np.zeros((new.padded_vocab_size, *old.shape[1:]), old.dtype)
        table[: config.vocab_size] = old[: config.vocab_size]
        for index, ids in pieces.items():
            table[index] = old[list(ids)].mean(0)
        return table

    def changed(path: tuple, leaf: Any) -> Any:
        names = tuple(entry.key for entry in path)
        language = names[0] == "head" and names[1].endswith("_lm") and names[2:] in (("kernel",), ("bias",))
        return rows(leaf) if language or names == ("embeddings", "token", "embedding") else leaf

    return new, jax.tree_util.tree_map_with_path(changed, dict(params))
