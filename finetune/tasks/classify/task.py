"""Classification of texts or pairs: maximise Σ log p(label | text) over the examples of a batch.

Encoders read the label off their first token or the mean of all, causal models off their last (models.heads).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from espalier.data.examples import LabelledBatches, fitting_row
from espalier.data.tokenizer import special_ids
from espalier.errors import UserError
from espalier.models.config import Execution, ModelConfig
from espalier.models.heads import sequence_logits
from espalier.models.transformer import apply, init_params
from espalier.task import Evaluation
from espalier.training.step import Objective
from finetune.config import max_length
from finetune.task import Labelled
from finetune.tasks.classify.examples import Part, describe_examples, read_examples, read_validation
from finetune.tasks.classify.metrics import confusion, majority_accuracy, metrics, one_class, predictions
from sharding.mesh import BATCH_AXES, host_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from espalier.predict.loaded import LoadedModel
    from finetune.tasks.classify.record import ClassifyConfig, ClassifyData


class Classification(Labelled):
    """The examples and classes of labelled files."""

    def __init__(self, config: ClassifyConfig, model: ModelConfig, tokenizer: PreTrainedTokenizerFast, mesh: Mesh):
        self._execution = config.execution
        self._examples = read_examples(config.data, tokenizer, model)
        lengths = [len(example.ids) for example in self._examples.train.encoded]
        parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES) * config.accumulation
        per_row = config.data.examples_per_row or fitting_row(lengths, config.batch_size, parts)
        if config.batch_size % (per_row * parts):
            raise UserError(
                f"data.examples_per_row={per_row}: {config.batch_size} examples do not make {parts} equal parts of "
                f"such rows, one for each device and micro-batch; try --data.examples-per-row 1"
            )
        self.data = dataclasses.replace(config.data, examples_per_row=per_row)
        self._rows = host_rows(config.batch_size // per_row, mesh)
        self._names = self._examples.names
        self.model = dataclasses.replace(model, labels=tuple(self._names), problem_type=None)
        self.settings = {"labels": self._names}
        self.fingerprints = self._examples.fingerprints
        self.facts: Sequence[str] = self._examples.facts
        self._batches, held_out = (
            LabelledBatches(
                part.encoded,
                config.batch_size,
                config.seed,
                pad_id=special_ids(tokenizer).pad,
                max_length=max_length(config.data, model),
                examples_per_row=per_row,
            )
            for part in (self._examples.train, self._examples.validation)
        )
        self.eval_batches: Sequence[dict] = held_out.fixed(self._rows)
        self.examples = len(self._batches)
        self.tokens_per_row = sum(lengths) / self.examples
        self.about = describe_examples(config.data, self._examples)
        if per_row > 1:
            filled = f"{self._batches.fill:.0%}".replace("%", " %")
            self.about["rows"] = f"{per_row} examples each, {filled} of the places hold a token"
        self.objective = classification_objective(self.model, execution=config.execution)

    def init_params(self, key: jax.Array) -> dict:
        return init_params(self.model, key, heads=("sequence_classification",))

    def batch(self, step: int) -> dict:
        return self._batches.batch(step, self._rows)

    def evaluate(self, model: LoadedModel) -> Evaluation:
        """accuracy, majority, f1, macro_f1, matthews; predictions.jsonl and confusion.json."""
        return measured(model, self._examples.validation, self._examples.names, self._examples.train.labels)


def class_logits(model: ModelConfig, params, batch: dict, execution: Execution, key: jax.Array | None = None):
    """Class scores, float32 [B, C], or [B, E, C] of rows of E examples; a key turns dropout on."""
    weights = batch["example_weights"]
    body_key, head_key = (None, None) if key is None else jax.random.split(key)
    x_BTD = apply(model, params, batch, execution=execution, key=body_key)
    examples = weights.shape[1] if weights.ndim == 2 else None
    return sequence_logits(model, params, x_BTD, batch["segment_ids"], head_key, examples)


def classification_objective(model: ModelConfig, *, execution: Execution) -> Objective:
    """The two pure functions of the objective; metrics: loss (nats an example), accuracy.

    batch: also `labels` int32 [B] and `example_weights` float32 [B], 0 for rows that count nothing; both [B, E] where
    rows hold E examples (data.examples.LabelledBatches).
    """

    def prepare(batch, key, step, train):
        return batch, jnp.maximum(jnp.sum(batch["example_weights"]), 1.0)

    def loss(params, batch, key, norms, train):
        logits_BC = class_logits(model, params, batch, execution, key if train else None)
        labels_B, weights_B = batch["labels"], batch["example_weights"]
        logprob_B = jnp.take_along_axis(jax.nn.log_softmax(logits_BC), labels_B[..., None], axis=-1)[..., 0]
        correct_B = (jnp.argmax(logits_BC, axis=-1) == labels_B).astype(jnp.float32)
        loss_sum, weight = -jnp.sum(weights_B * logprob_B), jnp.sum(weights_B)
        metrics = {"loss": (loss_sum, weight), "accuracy": (jnp.sum(weights_B * correct_B), weight)}
        return loss_sum / norms, jax.lax.stop_gradient(metrics)

    return Objective(prepare, loss)


def measure(model: LoadedModel, data: ClassifyData) -> Evaluation:
    """A classifier on a labelled file whose labels it knows."""
    return measured(model, *read_validation(data, model), None)


def measured(
    model: LoadedModel, part: Part, names: Sequence[str], train_labels: Sequence[int] | None = None
) -> Evaluation:
    """train_labels: whose most frequent one is the baseline `majority`; None = that of the file itself."""
    labels_N = np.array(part.labels)
    probability_NC = np.array(jax.nn.softmax(np.stack(model.outputs_of_head(part.encoded)), axis=-1))
    predictions_N = probability_NC.argmax(1)
    warning = one_class(labels_N, predictions_N, names)
    found = metrics(labels_N, predictions_N, len(names))
    return Evaluation(
        found | {"majority": majority_accuracy(labels_N if train_labels is None else train_labels, labels_N)},
        list(predictions(part.texts, labels_N, probability_NC, names)),
        {"confusion.json": confusion(labels_N, predictions_N, names)},
        [warning] if warning else [],
    )
