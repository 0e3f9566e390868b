"""Classification by few words: minimise -Σ log p(label | words behind open gates), with a price on open gates.

    loss = nats(z) + λ (C - rate),  z ~ HardKuma,  C = Σ P(z ≠ 0) / words

λ is Lagrange's multiplier (Bastings et al. 2019, section 5): it rises by gradient ascent while the part C of the gates
that are expected to be open is above `rate`. It is a parameter among the others, so that it is saved and goes on with
them: λ = price · e^(speed · m), where the gradient of m is that of ascent, -(C - rate). In evaluations z is 1 where it
is likelier above 1/2, else 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from espalier.errors import UserError
from espalier.models import gates
from espalier.models.config import Execution, ModelConfig
from espalier.models.rationale import seen_through, selector, spread, words_of
from espalier.models.transformer import init_params
from espalier.predict.classify import encoded
from espalier.predict.outputs import softmax
from espalier.predict.rationale import selected, token_kinds, words_in
from espalier.task import Evaluation
from espalier.training.step import Objective
from finetune.task import OfExamples
from finetune.tasks.classify.examples import Part, describe_examples, read_examples, read_validation
from finetune.tasks.classify.metrics import (
    confusion,
    majority_accuracy,
    metric_intervals,
    metrics,
    one_class,
    predictions,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from espalier.predict.loaded import LoadedModel
    from finetune.tasks.classify.record import ClassifyData
    from finetune.tasks.rationale.record import RationaleConfig, SelectionConfig


class Rationales(OfExamples):
    """The examples and classes of labelled files."""

    def __init__(self, config: RationaleConfig, model: ModelConfig, tokenizer: PreTrainedTokenizerFast, mesh: Mesh):
        self._examples = read_examples(config.data, tokenizer, model, config.seed)
        if self._examples.kind != "classes":
            raise UserError(
                f"{config.data.train}: labels are {self._examples.kind}; words are selected for classes alone"
            )
        self.model = dataclasses.replace(model, labels=tuple(self._examples.names), problem_type=None)
        self.settings = {"labels": self._examples.names}
        self.fingerprints = self._examples.fingerprints
        self.facts: Sequence[str] = self._examples.facts
        self.take(config, tokenizer, mesh, self._examples.train.encoded, self._examples.validation.encoded)
        self.about = describe_examples(config.data, self._examples)
        self.about["selection"] = f"{config.selection.rate:.0%} of the words".replace("%", " %")
        kinds_V = token_kinds(tokenizer, model.padded_vocab_size)
        self.objective = rationale_objective(self.model, config.selection, kinds_V, execution=config.execution)

    def init_params(self, key: jax.Array) -> dict:
        params = init_params(self.model, key, heads=("sequence_classification", "rationale"))
        return params | {"head": params["head"] | {"price": {"multiplier": jnp.zeros((), jnp.float32)}}}

    def evaluate(self, model: LoadedModel) -> Evaluation:
        return measured(model, self._examples.validation, self._examples.train.labels)


def rationale_objective(
    model: ModelConfig, selection: SelectionConfig, kinds_V: np.ndarray, *, execution: Execution
) -> Objective:
    """The two pure functions of the objective.

    Metrics: loss (nats an example, of the gated text), accuracy, selected (the part of the words whose gate is open; in
    training it is expected to be), and in training price (λ).
    """

    def prepare(batch, key, step, train):
        total = jnp.maximum(jnp.sum(batch["example_weights"]), 1.0)
        return batch, (total, jnp.maximum(jnp.sum(words_of(kinds_V, batch).starts_BT), 1.0))

    def loss(params, batch, key, norms, train):
        total, count = norms
        words = words_of(kinds_V, batch)
        select_key, gate_key, read_key = jax.random.split(key, 3)
        a_BT, b_BT = selector(model, params, batch, execution, select_key if train else None)
        if train:
            z_BT = gates.sample(a_BT, b_BT, jax.random.uniform(gate_key, a_BT.shape))
            open_BT = 1.0 - gates.closed(a_BT, b_BT)
        else:
            z_BT = open_BT = (gates.likely_open(a_BT, b_BT) > 0.5).astype(jnp.float32)
        gated_BT = spread(words, z_BT)
        logits_BC = seen_through(model, params, batch, gated_BT, execution, read_key if train else None)
        labels_B, weights_B = batch["labels"], batch["example_weights"]
        nats_B = -jnp.take_along_axis(jax.nn.log_softmax(logits_BC), labels_B[:, None], axis=-1)[:, 0]
        right_B = (jnp.argmax(logits_BC, axis=-1) == labels_B).astype(jnp.float32)
        nats, opened, here = jnp.sum(weights_B * nats_B), jnp.sum(open_BT * words.starts_BT), jnp.sum(words.starts_BT)
        weight = jnp.sum(weights_B)
        found = {
            "loss": (nats, weight),
            "accuracy": (jnp.sum(weights_B * right_B), weight),
            "selected": (opened, here),
        }
        multiplier = params["head"]["price"]["multiplier"]
        price = jax.lax.stop_gradient(selection.price * jnp.exp(selection.speed * multiplier))
        if train:
            found["price"] = (price * weight, weight)
        above = (opened - selection.rate * here) / count
        # Of the multiplier, the gradient is that of ascent; the value is the same either way.
        climbing = (jax.lax.stop_gradient(multiplier) - multiplier) * jax.lax.stop_gradient(above)
        return nats / total + price * above + climbing, jax.lax.stop_gradient(found)

    return Objective(prepare, loss)


def measured(model: LoadedModel, part: Part, train_labels: Sequence[int] | None = None) -> Evaluation:
    """accuracy, f1, macro_f1, matthews of the selected words alone with their intervals, `majority`, `selected` (the
    part of the words), `accuracy_whole` by the whole text and `accuracy_rest` by the words that were left out."""
    names, labels_N = model.config.labels, np.array(part.labels)
    texts_b = part.texts.texts_b or [None] * len(part.labels)
    inputs = list(zip(part.texts.texts_a, texts_b, strict=True))
    examples = encoded(model, inputs, offsets=True)
    results = selected(model, examples, compared=True)
    chance_NC, whole_NC, rest_NC = (
        softmax(np.stack([result[name] for result in results])) for name in ("scores", "whole", "rest")
    )
    said_N = chance_NC.argmax(1)
    found: dict[str, Any] = metrics(labels_N, said_N, len(names)) | metric_intervals(labels_N, said_N, len(names))
    found["majority"] = majority_accuracy(labels_N if train_labels is None else train_labels, labels_N)
    opened, words = (
        sum(float(result[name][: len(example.ids)].sum()) for result, example in zip(results, examples, strict=True))
        for name in ("selected", "starts")
    )
    found["selected"] = opened / max(words, 1.0)
    found |= {f"accuracy_{name}": float((chances.argmax(1) == labels_N).mean()) for name, chances in
              (("whole", whole_NC), ("rest", rest_NC))}  # fmt: skip
    rows = [
        row | {"words": words_in(texts, example, result)}
        for row, texts, example, result in zip(
            predictions(part.texts, labels_N, chance_NC, names), inputs, examples, results, strict=True
        )
    ]
    warnings = [warning] if (warning := one_class(labels_N, said_N, names)) else []
    if not opened:
        warnings.append("warning: no word is selected; try a higher --selection.rate or a lower --selection.price")
    return Evaluation(found, rows, {"confusion.json": confusion(labels_N, said_N, names)}, warnings)


def measure(model: LoadedModel, data: ClassifyData) -> Evaluation:
    """A classifier by few words on a labelled file whose labels it knows."""
    return measured(model, read_validation(data, model))
