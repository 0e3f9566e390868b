"""The objective of a sparse autoencoder, and how it is measured: with the language model around it.

Tokens take part where there is text, but for the first of each document: on it models put what no word needs, with
norms far above all others (Sun et al. 2024). Measured over the whole held-out text:

    l0                          features a token
    variance_explained          1 − Σ‖x − x̂‖² / Σ‖x − mean‖², the mean that of the held-out text
    cross_entropy_recovered     (H_mean − H_x̂) / (H_mean − H), nats: the model's own loss H; with x̂ in the place of x;
                                with the mean of the training text (…_zero: with 0) in its place
    dead                        the part of the features that never fired
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from espalier.features import autoencoder as sparse
from espalier.models.heads import causal_lm_head, masked_lm_head
from espalier.models.taps import Taps
from espalier.models.transformer import apply
from espalier.models.vocabulary import token_logprobs
from espalier.pretraining.objective import Setup
from espalier.training.step import Objective

NAME = "autoencoder"
"""Its parameters in the tree, beside those of the language model."""


def takes_part(batch: dict) -> jax.Array:
    """bool [B, T]"""
    return (batch["segment_ids"] > 0) & (batch["positions"] > 0)


def stream(setup: Setup, params: dict, batch: dict, layer: int) -> tuple[jax.Array, jax.Array]:
    """What enters the layer, and what leaves the model; both [B, T, D].

    Where only the first is used, XLA leaves out the layers above it if layers are not in a loop
    (--execution.no-scan-layers).
    """
    x_BTD, seen = apply(setup.model, params, batch, execution=setup.execution, taps=Taps(read=("stream",)))
    return seen["stream"][layer], x_BTD


def autoencoder_objective(setup: Setup, prepare: Any, layer: int) -> Objective:
    """The objective. prepare: that of the model's pretraining, which hides tokens of an encoder."""
    settings = setup.config.autoencoder

    def prepared(batch, key, step, train):
        return prepare(batch, key, step, train)[0], jnp.maximum(takes_part(batch).sum(dtype=jnp.float32), 1.0)

    def loss(params, batch, key, norms, train):
        x_BTD, end_BTD = stream(setup, params, batch, layer)
        if not train:
            sums = measured(setup, params, batch, layer, x_BTD, end_BTD)
            return sums["loss"][0] / norms, sums
        part_BT = takes_part(batch)
        said = sparse.learnt(params[NAME], x_BTD, part_BT, settings)
        sums = {
            "loss": (said.loss, norms),
            "variance_explained": (said.second - said.loss, said.second),
            "aux": (said.aux, jnp.float32(1)),
            "dead": (said.dead_F.sum(dtype=jnp.float32), jnp.float32(said.dead_F.size)),
            "fired": ((said.f_BTF > 0).sum((0, 1), dtype=jnp.float32), None),
            "smallest": (said.smallest, None),
        }
        return said.loss / norms + settings.aux_coefficient * said.aux, jax.lax.stop_gradient(sums)

    def after(before, params, sums, step):
        tokens, fired, smallest = sums["loss"][1], sums["fired"][0], sums["smallest"][0]
        new = sparse.after_step(before[NAME], params[NAME], fired, tokens, smallest, step, settings.dead_after)
        return params | {NAME: new}

    return Objective(prepared, loss, divisible=False, after=after)


def measured(
    setup: Setup, params: dict, batch: dict, layer: int, x_BTD: jax.Array, end_BTD: jax.Array
) -> dict[str, tuple[Any, Any]]:
    """Sums over a batch, of which `concluded` makes the metrics. x_BTD, end_BTD: of `stream`."""
    own, part_BT = params[NAME], takes_part(batch)
    part_BT1, tokens = part_BT[..., None], part_BT.sum(dtype=jnp.float32)
    width = x_BTD.shape[-1]
    f_BTF = jnp.where(part_BT1, sparse.features(own, x_BTD), 0.0)
    instead_BTD = sparse.reconstructed(own, f_BTF)
    known = own["statistics"]
    # In units of `scale`, and from the mean, so that float32 does.
    error_BTD = jnp.where(part_BT1, (x_BTD - instead_BTD) / known["scale"], 0.0)
    away_BTD = jnp.where(part_BT1, (x_BTD - known["mean"]) / known["scale"], 0.0)
    residual = jnp.sum(error_BTD**2)
    fired_F = (f_BTF > 0).sum((0, 1), dtype=jnp.float32)

    def nats_with(new: jax.Array) -> jax.Array:
        def change(x_BTD, here):
            return jnp.where(part_BT1 & here, new.astype(x_BTD.dtype), x_BTD)

        layers = jnp.arange(setup.model.num_hidden_layers) == layer
        taps = Taps(change={"stream": change}, given={"stream": layers})
        return nats(setup, params, batch, apply(setup.model, params, batch, execution=setup.execution, taps=taps)[0])[0]

    whole, words = nats(setup, params, batch, end_BTD)
    return {
        "loss": (residual / width, tokens),
        "l0": (fired_F.sum(), tokens),
        "cross_entropy": (whole, words),
        "cross_entropy_reconstructed": (nats_with(instead_BTD), words),
        "cross_entropy_mean": (nats_with(known["mean"]), words),
        "cross_entropy_zero": (nats_with(jnp.zeros(())), words),
        "fired": (fired_F, None),
        "residual": (residual, None),
        "second": (jnp.sum(away_BTD**2), None),
        "first": (away_BTD.sum((0, 1)), None),
        "tokens": (tokens, None),
    }


def nats(setup: Setup, params: dict, batch: dict, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Σ −log p of the words to be predicted, and their number."""
    model, execution = setup.model, setup.execution
    logprobs = partial(token_logprobs, vocab_size=model.vocab_size, softcap=model.final_logit_softcapping)
    if model.causal:
        labels, weights = batch["labels"], batch["loss_weights"]
        logprob, _ = logprobs(*causal_lm_head(model, params, x_BTD, execution), labels)
    else:
        labels, weights = batch["masked_labels"], batch["masked_weights"]
        hidden_BMD = jnp.take_along_axis(x_BTD, batch["masked_positions"][:, :, None], axis=1)
        logprob, _ = logprobs(*masked_lm_head(model, params, hidden_BMD, execution), labels)
    return -jnp.sum(weights * logprob), jnp.sum(weights)


def concluded(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics of the whole held-out text, of the sums of `measured`."""
    sums = {name: metrics.pop(name) for name in ("fired", "residual", "second", "first", "tokens")}
    variance = sums["second"] - np.sum(sums["first"] ** 2) / max(sums["tokens"], 1.0)
    own, whole = metrics["cross_entropy_reconstructed"], metrics["cross_entropy"]
    found = {
        "variance_explained": 1.0 - float(sums["residual"]) / max(float(variance), 1e-30),
        "dead": float(np.mean(sums["fired"] == 0)),
    }
    for name, without in (("", "mean"), ("_zero", "zero")):
        gap = metrics[f"cross_entropy_{without}"] - whole
        found[f"cross_entropy_recovered{name}"] = (metrics[f"cross_entropy_{without}"] - own) / gap if gap else 0.0
    return metrics | found
