"""Which attention heads a model needs, and what is left of it without the others (Michel et al. 2019)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from espalier.data.examples import Example
from espalier.data.tokenizer import special_ids
from espalier.errors import UserError
from espalier.look.rows import losses
from espalier.models.config import Execution, ModelConfig
from espalier.models.heads import LANGUAGE_MODELS
from espalier.predict.loaded import LoadedModel
from espalier.predict.outputs import outputs

PARTS = 10
"""In how many steps all heads are taken out."""
ORDERS = {"least": "the least important first", "random": "at random", "most": "the most important first"}


class Pruned(NamedTuple):
    """What is left as heads are taken out one after the other, in one order."""

    removed_S: np.ndarray
    """How many."""
    nats_S: np.ndarray
    """The mean loss."""
    right_S: np.ndarray
    """The part that is right."""


def importance(model: LoadedModel, rows: Sequence[Example]) -> np.ndarray:
    """E over the rows of |∂ loss / ∂ gate| of each head, a gate of 1 before its output [L, N] (equation 2)."""
    check(model)
    found = _outputs(gradients, model, model.params, rows)
    return np.mean([np.asarray(one, np.float64) for one in found], axis=0)


def within_layers(importance_LN: np.ndarray) -> np.ndarray:
    """Divided by the length of its layer's row, as heads are compared across layers (section 4.1)."""
    return importance_LN / np.maximum(np.linalg.norm(importance_LN, axis=1, keepdims=True), 1e-30)


def pruned(
    model: LoadedModel,
    rows: Sequence[Example],
    importance_LN: np.ndarray,
    said: Callable[[str], None] = lambda words: None,
) -> dict[str, Pruned]:
    """The curve of each of ORDERS, from the whole model to one without any head."""
    check(model)
    ascending = np.argsort(within_layers(importance_LN), axis=None, kind="stable")
    random = np.random.default_rng(0).permutation(ascending.size)
    orders = {"least": ascending, "random": random, "most": ascending[::-1]}
    removed_S = np.unique(np.round(np.linspace(0, ascending.size, PARTS + 1)).astype(int))
    curves = {}
    for name, order in orders.items():
        found = []
        for count in removed_S:
            said(f"{count} of {ascending.size} heads taken out, {ORDERS[name]}")
            gates = np.ones(ascending.size, np.float32)
            gates[order[:count]] = 0
            pairs = _outputs(gated, model, (model.params, gates.reshape(importance_LN.shape)), rows)
            found.append(np.mean([(nats, right) for nats, right in pairs], axis=0))
        nats_S, right_S = np.array(found, np.float64).T
        curves[name] = Pruned(removed_S, nats_S, right_S)
    return curves


def check(model: LoadedModel) -> None:
    """UserError where the loss of a head is not known here."""
    problem = model.config.problem_type
    classes = model.head == "sequence_classification" and problem in (None, "single_label_classification")
    if not (classes and len(model.config.labels) > 1 or model.head in LANGUAGE_MODELS):
        raise UserError(
            "heads are judged by the loss of a classifier (one label a text) or of a language model, and this one has "
            f"the head {model.head!r}{f' for {problem}' if problem else ''}"
        )


def gradients(config: ModelConfig, head: str, execution: Execution, params: Any, batch: dict) -> jax.Array:
    """|∂ loss of a row / ∂ its gates|, [B, L, N]."""
    rows = batch["input_ids"].shape[0]
    ones_LBN = jnp.ones((config.num_hidden_layers, rows, config.num_attention_heads), jnp.float32)
    slope = jax.grad(lambda gates: losses(config, head, execution, params, batch, gates).nats_B.sum())(ones_LBN)
    return jnp.abs(slope).swapaxes(0, 1)


def gated(config: ModelConfig, head: str, execution: Execution, both: Any, batch: dict) -> Any:
    """(loss, right), [B] each. both: parameters, and gates [L, N] for all rows."""
    params, gates_LN = both
    gates_LBN = jnp.repeat(gates_LN[:, None], batch["input_ids"].shape[0], axis=1)
    return losses(config, head, execution, params, batch, gates_LBN)


def _outputs(function: Callable[..., Any], model: LoadedModel, params: Any, rows: Sequence[Example]) -> list[Any]:
    return outputs(
        function,
        (model.config, model.head, model.execution),
        params,
        rows,
        pad_id=special_ids(model.tokenizer).pad,
        longest=model.config.max_length,
        of_row=tuple(rows[0].of_row),
    )
