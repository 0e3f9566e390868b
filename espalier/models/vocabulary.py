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

    def one(x, labels):
        return _chunk_logprobs(x, table_VD, bias_V, labels, vocab_size, softcap)

    return _in_chunks(one, features_BTD, labels_BT, table_VD.shape[0], chunk_elements)


def drawn_tokens(
    features_BTD: jax.Array,
    table_VD: jax.Array,
    bias_V: jax.Array | None,
    keys_B: jax.Array,
    *,
    vocab_size: int,
    softcap: float | None = None,
    chunk_elements: int = 2**24,
) -> jax.Array:
    """A token for each place, int32 [B, T], drawn from the softmax of its scores; without a gradient.

    keys_B: a random key for each row. What is drawn depends on it and on the place alone, however rows and scores are
    split. The other arguments as in `token_logprobs`.
    """

    def one(x, places):
        scores_BTV = _real_scores(x, table_VD, bias_V, vocab_size, softcap)
        keys_BT = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))(keys_B, places)
        noise_BTV = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, scores_BTV.shape[-1:], jnp.float32)))(keys_BT)
        # The largest of scores with Gumbel noise is a draw from their softmax (Maddison et al. 2014).
        return jnp.argmax(scores_BTV + noise_BTV, axis=-1).astype(jnp.int32)

    batch, length, _ = features_BTD.shape
    places_BT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.uint32), (batch, length))
    features_BTD, table_VD, bias_V = jax.lax.stop_gradient((features_BTD, table_VD, bias_V))
    return _in_chunks(one, features_BTD, places_BT, table_VD.shape[0], chunk_elements)


def _in_chunks(function: Any, features_BTD: jax.Array, inputs_BT: jax.Array, size: int, chunk_elements: int) -> Any:
    """function(features, inputs) → arrays [B, T], on so many tokens at a time that a device holds chunk_elements scores
    of `size` each; formed anew in the backward pass."""
    batch, length, _ = features_BTD.shape
    mesh = jax.sharding.get_abstract_mesh()
    devices, split = (1, 1) if mesh.empty else (mesh.size, mesh.shape["sequence"])
    most = max(1, chunk_elements * devices // (batch * size))
    fewest = -(-length // most)
    # A few more chunks rather than padding.
    chunks = next((n for n in range(fewest, 2 * fewest) if length % (n * split) == 0), fewest)
    chunk = -(-length // (chunks * split)) * split
    padding = chunks * chunk - length
    if chunks == 1 and not padding:
        return function(features_BTD, inputs_BT)

    def by_chunk(x):
        # Interleaved, so that of a row whose tokens are split over devices every chunk has some on each.
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, chunk, chunks, *x.shape[2:]), 2, 0)

    one = jax.checkpoint(function, prevent_cse=False)
    results = jax.lax.map(lambda inputs: one(*inputs), (by_chunk(features_BTD), by_chunk(inputs_BT)))
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


def _real_scores(features_BTD, table_VD, bias_V, vocab_size, softcap):
    """Those of padding rows far below all others."""
    scores_BTV = _scores(features_BTD, table_VD, bias_V, softcap)
    if vocab_size == len(table_VD):
        return scores_BTV
    entry_V = jnp.arange(table_VD.shape[0], dtype=jnp.int32)[None, None]
    return jnp.where(entry_V < vocab_size, scores_BTV, jnp.float32(-1e30))


def _chunk_logprobs(features_BTD, table_VD, bias_V, labels_BT, vocab_size, softcap):
    scores_BTV = _real_scores(features_BTD, table_VD, bias_V, vocab_size, softcap)
    entry_V = jnp.arange(table_VD.shape[0], dtype=jnp.int32)[None, None]
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
