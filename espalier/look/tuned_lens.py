"""The tuned lens: an affine map for each layer, by which the head understands its stream (Belrose et al. 2023).

The model stays as it is. Each layer's map is trained so that what the head says of it comes near to what the model says
in the end: KL(end ‖ here), equation 5 there. A few hundred steps on states that are computed anyway: minutes, so that
there is nothing to resume and one file to keep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from espalier.data.examples import Example
from espalier.errors import UserError
from espalier.models.config import Execution, ModelConfig
from espalier.models.heads import LANGUAGE_MODELS
from espalier.models.logits import of_states
from espalier.models.taps import Taps
from espalier.models.transformer import apply, normed
from espalier.predict.loaded import LoadedModel

BATCH = 8
"""Rows of a step."""
LEARNING_RATE = 1e-3
"""Adam's, falling to 0; at this rate a map that is not needed stays near 0."""
HELD_OUT = 0.1
"""The part of the rows that the maps are measured on."""


class TunedLens(NamedTuple):
    """x + x kernel + bias before the final norm, for each of L layers: what enters layer 0, 1, … L - 1."""

    kernel_LDD: jax.Array
    bias_LD: jax.Array


class Tuned(NamedTuple):
    lens: TunedLens
    before_L: np.ndarray
    """KL of the logit lens on held-out rows, nats a place, for what enters each layer."""
    after_L: np.ndarray
    """And of the tuned lens."""


def untrained(config: ModelConfig) -> TunedLens:
    """All zeros, which is the logit lens."""
    layers, width = config.num_hidden_layers, config.hidden_size
    return TunedLens(jnp.zeros((layers, width, width), jnp.float32), jnp.zeros((layers, width), jnp.float32))


def translated(lens: TunedLens | None, layer: int, x: jax.Array) -> jax.Array:
    """The stream [..., D] that enters a layer, as the lens has it."""
    if lens is None:
        return x
    return (x + x @ lens.kernel_LDD[layer].astype(x.dtype) + lens.bias_LD[layer].astype(x.dtype)).astype(x.dtype)


def tune(
    model: LoadedModel,
    rows: Sequence[Example],
    steps: int,
    seed: int = 0,
    said: Callable[[str], None] = lambda words: None,
) -> Tuned:
    """Train the maps on rows of text (look.rows.text_rows). UserError where there are too few, or no language model."""
    if model.head not in LANGUAGE_MODELS:
        raise UserError(f"a lens is trained on a language model, and this one has the head {model.head!r}")
    held = max(BATCH, round(HELD_OUT * len(rows)))
    if len(rows) < held + BATCH:
        raise UserError(f"{len(rows)} rows of text are too few; at least {held + BATCH} are needed: give more text")
    import optax

    learnt, measured = rows[:-held], rows[-held:]
    lens = untrained(model.config)
    optimizer = optax.adam(optax.linear_schedule(LEARNING_RATE, 0.0, steps))
    state = optimizer.init(lens)

    @jax.jit
    def step(params: Any, lens: TunedLens, state: Any, batch: dict) -> Any:
        loss, grads = jax.value_and_grad(
            lambda lens: divergence(model.config, model.head, model.execution, params, lens, batch).sum()
        )(lens)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grads, state)
            return optax.apply_updates(lens, updates), state, loss

    before_L = _measured(model, lens, measured)
    random = np.random.default_rng(seed)
    for number in range(steps):
        batch = _batch([learnt[at] for at in random.choice(len(learnt), BATCH, replace=False)])
        lens, state, loss = step(model.params, lens, state, batch)
        if number % 10 == 0:
            said(f"step {number} of {steps}, {float(loss) / len(before_L):.3f} nats a layer")
    return Tuned(lens, before_L, _measured(model, lens, measured))


def divergence(
    config: ModelConfig, head: str, execution: Execution, params: Any, lens: TunedLens, batch: dict
) -> jax.Array:
    """KL(what is said in the end ‖ what is said of each layer), mean over the `places` of the rows, nats [L]."""
    batch = dict(batch)
    places_BM = batch.pop("places")
    x_BTD, seen = apply(config, params, batch, execution=execution, taps=Taps(read=("stream",)))

    def logprobs(x_BMD: jax.Array) -> jax.Array:
        segments_BM = jnp.ones(x_BMD.shape[:2], jnp.int32)
        return jax.nn.log_softmax(of_states(config, head, params, x_BMD, segments_BM, execution))

    def at_places(x_BTD: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x_BTD, places_BM[..., None], axis=1)

    end_BMV = jax.lax.stop_gradient(logprobs(at_places(x_BTD)))

    # One layer after the other, and anew for the gradient: the vocabulary is large.
    @jax.checkpoint
    def of_layer(inputs: Any) -> jax.Array:
        x_BMD, kernel_DD, bias_D = inputs
        x_BMD = jax.lax.stop_gradient(x_BMD)
        one = TunedLens(kernel_DD[None], bias_D[None])
        here_BMV = logprobs(normed(config, params, translated(one, 0, x_BMD)))
        return (jnp.exp(end_BMV) * (end_BMV - here_BMV)).sum(-1).mean()

    return jax.lax.map(of_layer, (jax.vmap(at_places)(seen["stream"]), *lens))


def save(path: Path, lens: TunedLens) -> None:
    """As safetensors: kernel [L, D, D], bias [L, D]."""
    from safetensors.numpy import save as written

    from espalier.files import replacing

    arrays = {"kernel": np.asarray(lens.kernel_LDD), "bias": np.asarray(lens.bias_LD)}
    with replacing(path, "wb") as file:
        file.write(written(arrays, {"format": "espalier tuned lens"}))


def load(path: str, config: ModelConfig) -> TunedLens:
    """UserError where there is no lens, or one of another model."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(path)
        kernel, bias = arrays["kernel"], arrays["bias"]
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{path} holds no lens ({error}); `look lens` writes one") from None
    wanted = (config.num_hidden_layers, config.hidden_size)
    if bias.shape != wanted or kernel.shape != (*wanted, config.hidden_size):
        raise UserError(
            f"{path} is the lens of a model of {bias.shape[0]} layers, {bias.shape[-1]} wide, and this one has "
            f"{wanted[0]}, {wanted[1]} wide; train one for it by `look lens`"
        )
    return TunedLens(jnp.asarray(kernel), jnp.asarray(bias))


def _measured(model: LoadedModel, lens: TunedLens, rows: Sequence[Example]) -> np.ndarray:
    found = [
        np.asarray(
            _divergence(model.config, model.head, model.execution, model.params, lens, _batch(rows[at:][:BATCH]))
        )
        for at in range(0, len(rows) - BATCH + 1, BATCH)
    ]
    return np.array(found, np.float64).mean(0)


_divergence = jax.jit(divergence, static_argnums=(0, 1, 2))


def _batch(rows: Sequence[Example]) -> dict[str, np.ndarray]:
    ids_BT = np.array([row.ids for row in rows], np.int32)
    return {
        "input_ids": ids_BT,
        "segment_ids": np.ones_like(ids_BT),
        "positions": np.broadcast_to(np.arange(ids_BT.shape[1], dtype=np.int32), ids_BT.shape),
        "places": np.array([row.of_row["places"] for row in rows], np.int32),
    }
