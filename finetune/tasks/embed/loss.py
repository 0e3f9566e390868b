"""What bi-encoders minimise, over the embeddings of a whole batch, and its gradient when the batch is cut.

InfoNCE (van den Oord et al. 2018): a query finds its positive among the documents of the batch, of all devices.

    loss = - Σ_i log softmax_j(cos(q_i, d_j) / temperature)[i]

Documents that are known to belong to the query are no negatives of it. Pairs with scores: CoSENT (Su 2022), which wants
the cosines in the order of the scores, or the square error of the cosine (Reimers and Gurevych 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from espalier.models.config import Execution, ModelConfig
from espalier.models.sentence_transformers import Pooling
from espalier.predict.embed import pooled
from espalier.training.step import Objective, Sums, micro_batches
from sharding.mesh import constrain

SIDES = ("texts", "queries", "documents")
"""Names in a batch of what holds tokens; the texts of an example stand in this order."""
HIGHEST = jax.lax.Precision.HIGHEST
"""Accelerators multiply float32 with fewer bits unless they are asked."""


def embedding_objective(
    model: ModelConfig,
    *,
    pooling: Pooling,
    temperature: float,
    symmetric: bool,
    sizes: Sequence[int],
    scored: Literal["cosent", "cosine"],
    execution: Execution,
) -> Objective:
    """Metrics: loss; accuracy, of queries whose positive is the nearest document, where there are no scores.

    batch: as finetune.tasks.embed.batches says. sizes: to which embeddings are cut, the loss is summed over them; the
    first is the whole. Rows of a batch meet each other: micro-batches go through the encoder one by one, and the loss
    sees all of their embeddings.
    """

    def embeddings(params, sides: dict, key) -> jax.Array:
        """float32 [B, S, D]."""
        found = []
        for at, name in enumerate(name for name in SIDES if name in sides):
            B, S, T = sides[name]["input_ids"].shape
            flat = {array: constrain(x.reshape(B * S, T), "batch", None) for array, x in sides[name].items()}
            side_key = None if key is None else jax.random.fold_in(key, at)
            x_RD = pooled(model, pooling, execution, params, flat, side_key)
            found.append(x_RD.reshape(B, S, x_RD.shape[-1]))
        return constrain(jnp.concatenate(found, axis=1), "batch", None, None)

    def whole(e_BSD, batch: dict, norms) -> tuple[jax.Array, Sums]:
        """The loss over the embeddings of a batch."""
        if "scores" not in batch:
            total, sums = contrastive(e_BSD, batch, temperature, symmetric, sizes)
        elif scored == "cosine":
            total, sums = square_error(e_BSD, batch, sizes)
        else:
            total, sums = cosent(e_BSD, batch, temperature, sizes)
        return total / norms, jax.lax.stop_gradient(sums)

    def prepare(batch, key, step, train):
        return batch, jnp.maximum(jnp.sum(batch["example_weights"]), 1.0)

    def loss(params, batch, key, norms, train):
        return whole(embeddings(params, sides_of(batch), key if train else None), batch, norms)

    return Objective(prepare, loss, divisible=False, gradient=cached_gradient(embeddings, whole))


def cached_gradient(embeddings: Callable[..., jax.Array], whole: Callable[..., tuple[jax.Array, Sums]]):
    """`Objective.gradient` by caching representations (Gao et al. 2021).

    Every micro-batch is embedded without its activations being kept; the loss over all embeddings gives the gradient of
    each; then every micro-batch is embedded again, with the same dropout, and pulls its part back to the parameters.
    """

    def gradient(complete, params, batch, key, norms, accumulation):
        parts = micro_batches(sides_of(batch), accumulation)
        numbers = jnp.arange(accumulation)

        def embedded(params, number, part):
            return embeddings(complete(params), part, jax.random.fold_in(key, number))

        cache_AbSD = jax.lax.map(lambda numbered: embedded(params, *numbered), (numbers, parts))
        A, b, S, D = cache_AbSD.shape
        # Micro-batch i holds the rows i, i + A, …
        e_BSD = constrain(cache_AbSD.swapaxes(0, 1).reshape(b * A, S, D), "batch", None, None)
        (loss, sums), pull_BSD = jax.value_and_grad(whole, has_aux=True)(e_BSD, batch, norms)
        pull_AbSD = constrain(pull_BSD.reshape(b, A, S, D).swapaxes(0, 1), None, "batch", None, None)

        def add(total, numbered):
            number, part, pull_bSD = numbered
            _, pull_back = jax.vjp(lambda params: embedded(params, number, part), params)
            return jax.tree.map(jnp.add, total, pull_back(pull_bSD)[0]), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        return (loss, sums), jax.lax.scan(add, zeros, (numbers, parts, pull_AbSD))[0]

    return gradient


def sides_of(batch: dict) -> dict:
    """What of a batch holds tokens."""
    return {name: batch[name] for name in SIDES if name in batch}


def contrastive(
    e_BSD: jax.Array, batch: dict, temperature: float, symmetric: bool, sizes: Sequence[int]
) -> tuple[jax.Array, Sums]:
    """(Σ over examples and sizes, metrics). Candidates C = B · (S - 1): the documents of all examples."""
    weights_B, (B, S, _) = batch["example_weights"], e_BSD.shape
    own_BC = jnp.arange(B)[:, None] * (S - 1) == jnp.arange(B * (S - 1))[None, :]
    negative_BC = negatives(batch["text_ids"], batch["known"])
    total, correct_B = jnp.float32(0), None
    for size in sizes:
        e_BSd = unit(e_BSD[..., :size])
        # Every device compares its queries with the documents of all.
        d_Cd = constrain(e_BSd[:, 1:].reshape(B * (S - 1), size), None, None)
        scores_BC = jnp.einsum("Bd,Cd->BC", e_BSd[:, 0], d_Cd, precision=HIGHEST) / temperature
        scores_BC = constrain(scores_BC, "batch", None)
        own_B = jnp.sum(jnp.where(own_BC, scores_BC, 0.0), axis=1)
        forward_BC = jnp.where(own_BC | negative_BC, scores_BC, -jnp.inf)
        loss_B = jax.nn.logsumexp(forward_BC, axis=1) - own_B
        if correct_B is None:
            correct_B = (jnp.argmax(forward_BC, axis=1) == jnp.argmax(own_BC, axis=1)).astype(jnp.float32)
        if symmetric:
            # Column by column: the queries for which this positive is a negative.
            real_B1 = weights_B[:, None] > 0
            own_BB, negative_BB = own_BC[:, :: S - 1], negative_BC[:, :: S - 1] & real_B1
            backward_BB = jnp.where(own_BB | negative_BB, scores_BC[:, :: S - 1], -jnp.inf)
            loss_B = (loss_B + jax.nn.logsumexp(backward_BB, axis=0) - own_B) / 2
        total += jnp.sum(weights_B * loss_B)
    assert correct_B is not None
    weight = jnp.sum(weights_B)
    return total, {"loss": (total, weight), "accuracy": (jnp.sum(weights_B * correct_B), weight)}


def negatives(ids_BS: jax.Array, known_BP: jax.Array) -> jax.Array:
    """Which candidates are negatives of a query, bool [B, C].

    Not so what is not there, the query itself, and every copy of a text that belongs to the query (its own included).
    """
    ids_1C = ids_BS[:, 1:].reshape(1, -1)
    right_BC = jnp.any(known_BP[:, :, None] == ids_1C[:, None, :], axis=1)
    return (ids_1C >= 0) & ~right_BC & (ids_1C != ids_BS[:, :1])


def cosent(e_BSD: jax.Array, batch: dict, temperature: float, sizes: Sequence[int]) -> tuple[jax.Array, Sums]:
    """log(1 + Σ exp((cos_j - cos_i) / temperature)) over the pairs i, j of the batch where i has the greater score.

    One value a batch, which counts as often as the batch has examples.
    """
    weights_B, scores_B = batch["example_weights"], batch["scores"]
    real_BB = (weights_B[:, None] > 0) & (weights_B[None, :] > 0)
    ordered_BB = real_BB & (scores_B[:, None] > scores_B[None, :])
    total = jnp.float32(0)
    for size in sizes:
        cosine_B = cosines(e_BSD, size) / temperature
        margins_BB = jnp.where(ordered_BB, cosine_B[None, :] - cosine_B[:, None], -jnp.inf)
        total += jax.nn.logsumexp(jnp.append(margins_BB.reshape(-1), 0.0))
    weight = jnp.sum(weights_B)
    return total * weight, {"loss": (total * weight, weight)}


def square_error(e_BSD: jax.Array, batch: dict, sizes: Sequence[int]) -> tuple[jax.Array, Sums]:
    """Σ (cosine - score)², the score between 0 and 1."""
    weights_B = batch["example_weights"]
    errors = [jnp.sum(weights_B * jnp.square(cosines(e_BSD, size) - batch["scores"])) for size in sizes]
    total = jnp.sum(jnp.stack(errors))
    return total, {"loss": (total, jnp.sum(weights_B))}


def cosines(e_BSD: jax.Array, size: int) -> jax.Array:
    """Of the two texts of each example, float32 [B]."""
    e_BSd = unit(e_BSD[..., :size])
    return jnp.sum(e_BSd[:, 0] * e_BSd[:, 1], axis=-1)


def unit(x: Any) -> jax.Array:
    """Along the last axis of length 1; zeros stay, and have no gradient."""
    return x / jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))
