"""Classification of texts or pairs: maximise Σ log p(label | text) over the examples of a batch.

Encoders read the label off their first token or the mean of all, causal models off their last (models.heads).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from espalier import progress
from espalier.data.examples import LabelledBatches
from espalier.data.tokenizer import special_ids
from espalier.files import write_json
from espalier.models.config import Execution, ModelConfig
from espalier.models.heads import sequence_logits
from espalier.models.transformer import apply, init_params
from espalier.training.run import RunDirectory
from espalier.training.step import Objective
from finetune.evaluate import confusion, majority_accuracy, metrics, one_class, write_predictions
from finetune.examples import describe_examples, max_length, read_examples
from finetune.tasks import Labelled
from sharding.mesh import host_rows, place_batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from finetune.presets import FinetuneConfig


class Classification(Labelled):
    """The examples and classes of labelled files."""

    def __init__(self, config: FinetuneConfig, model: ModelConfig, tokenizer: PreTrainedTokenizerFast, mesh: Mesh):
        self._execution = config.execution
        self._rows = host_rows(config.batch_size, mesh)
        self._examples = read_examples(config.data, tokenizer, model)
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
            )
            for part in (self._examples.train, self._examples.validation)
        )
        self.eval_batches: Sequence[dict] = held_out.fixed(self._rows)
        self.examples = len(self._batches)
        self.tokens_per_row = sum(len(example.ids) for example in self._examples.train.encoded) / self.examples
        self.about = describe_examples(config.data, self._examples)
        self.objective = classification_objective(self.model, execution=config.execution)

    def init_params(self, key: jax.Array) -> dict:
        return init_params(self.model, key, heads=("sequence_classification",))

    def batch(self, step: int) -> dict:
        return self._batches.batch(step, self._rows)

    def finish(self, run: RunDirectory, params: Any, mesh: Mesh) -> dict[str, float]:
        """accuracy, majority, f1, macro_f1, matthews; writes predictions.jsonl and confusion.json."""
        labels_N = np.array(self._examples.validation.labels)
        with progress.waiting("predicting the labels of the validation file"):
            probability_NC = class_probabilities(self.model, params, self.eval_batches, mesh, self._execution)
        predictions_N = probability_NC.argmax(1)
        if jax.process_index() == 0:
            path = run.path / "predictions.jsonl"
            write_predictions(path, self._examples.validation.texts, labels_N, probability_NC, self._names)
            write_json(run.path / "confusion.json", confusion(labels_N, predictions_N, self._names))
            if warning := one_class(labels_N, predictions_N, self._names):
                progress.say(warning)
        found = metrics(labels_N, predictions_N, len(self._names))
        return found | {"majority": majority_accuracy(self._examples.train.labels, labels_N)}


def class_logits(model: ModelConfig, params, batch: dict, execution: Execution, key: jax.Array | None = None):
    """Class scores, float32 [B, C]; a key turns dropout on."""
    body_key, head_key = (None, None) if key is None else jax.random.split(key)
    x_BTD = apply(model, params, batch, execution=execution, key=body_key)
    return sequence_logits(model, params, x_BTD, batch["segment_ids"], head_key)


def classification_objective(model: ModelConfig, *, execution: Execution) -> Objective:
    """The two pure functions of the objective; metrics: loss (nats an example), accuracy.

    batch: also `labels` int32 [B] and `example_weights` float32 [B], 0 for rows that count nothing.
    """

    def prepare(batch, key, step, train):
        return batch, jnp.maximum(jnp.sum(batch["example_weights"]), 1.0)

    def loss(params, batch, key, norms, train):
        logits_BC = class_logits(model, params, batch, execution, key if train else None)
        labels_B, weights_B = batch["labels"], batch["example_weights"]
        logprob_B = jnp.take_along_axis(jax.nn.log_softmax(logits_BC), labels_B[:, None], axis=1)[:, 0]
        correct_B = (jnp.argmax(logits_BC, axis=1) == labels_B).astype(jnp.float32)
        loss_sum, weight = -jnp.sum(weights_B * logprob_B), jnp.sum(weights_B)
        metrics = {"loss": (loss_sum, weight), "accuracy": (jnp.sum(weights_B * correct_B), weight)}
        return loss_sum / norms, jax.lax.stop_gradient(metrics)

    return Objective(prepare, loss)


def class_probabilities(
    model: ModelConfig, params: Any, batches: Sequence[dict], mesh: Mesh, execution: Execution
) -> np.ndarray:
    """Probabilities [N, C] of the examples of `batches` (this process's rows), in order; empty rows are left out."""
    everywhere = NamedSharding(mesh, PartitionSpec())

    def predict(params, batch):
        return jax.nn.softmax(class_logits(model, params, batch, execution), axis=-1), batch["example_weights"] > 0

    # On every device, so that each process can read the rows of the others too.
    predict = jax.jit(predict, out_shardings=everywhere)
    parts = []
    with jax.set_mesh(mesh):
        for batch in batches:
            probability_BC, real_B = jax.device_get(predict(params, place_batch(batch, mesh)))
            parts.append(probability_BC[real_B])
    return np.concatenate(parts)
