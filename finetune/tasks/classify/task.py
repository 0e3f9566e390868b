"""Classification of texts or pairs: maximise Σ log p(label | text) over the examples of a batch.

Several labels a text are decisions of their own (log p of each, its mean over the labels); numbers are learnt by their
squared error. Both are the losses of transformers, so that `problem_type` means the same there. Encoders read the label
off their first token or the mean of all, causal models off their last (models.heads).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from espalier.data.description import listed
from espalier.errors import UserError
from espalier.models.attention_settings import SupervisedAttention
from espalier.models.attention_terms import MARKED, divergence, entropy, looks, marked_shares, states
from espalier.models.config import Execution, ModelConfig
from espalier.models.heads import sequence_logits
from espalier.models.transformer import init_params
from espalier.task import Evaluation
from espalier.training.run import TUNED
from espalier.training.step import Objective
from finetune.task import OfExamples, row_words, shared_row
from finetune.tasks.classify.examples import LABELS, Examples, describe_examples, read_examples, read_validation
from finetune.tasks.classify.labels import PROBLEMS
from finetune.tasks.classify.measured import measured, tuned

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from espalier.predict.loaded import LoadedModel
    from finetune.tasks.classify.record import ClassifyConfig, ClassifyData


class Classification(OfExamples):
    """The examples and classes of labelled files."""

    def __init__(self, config: ClassifyConfig, model: ModelConfig, tokenizer: PreTrainedTokenizerFast, mesh: Mesh):
        self._execution = config.execution
        self._examples = read_examples(config.data, tokenizer, model, config.seed)
        lengths = [len(example.ids) for example in self._examples.train.encoded]
        per_row = shared_row(config.data.examples_per_row, lengths, config, mesh, "data.examples_per_row")
        self.data = dataclasses.replace(config.data, examples_per_row=per_row)
        self._names = self._examples.names
        problem = PROBLEMS[self._examples.kind]
        self.model = dataclasses.replace(model, labels=tuple(self._names), problem_type=problem)
        # Which examples are apart decides what is learnt: earlier versions drew them whatever their label.
        self.settings = {"labels": self._names} | ({"apart": "by label"} if self._examples.apart is not None else {})
        self.fingerprints = self._examples.fingerprints
        self.facts: Sequence[str] = self._examples.facts
        train, validation = self._examples.train, self._examples.validation
        self.take(config, tokenizer, mesh, train.encoded, validation.encoded, per_row)
        self.about = describe_examples(config.data, self._examples)
        if per_row > 1:
            self.about["rows"] = row_words(self.batches, f"{per_row} examples")
        if config.data.class_weights == "balanced" and self._examples.kind == "numbers":
            raise UserError("data.class_weights=balanced: numbers have no classes; leave it out")
        weights = class_weights(self._examples) if config.data.class_weights == "balanced" else None
        if weights is not None:
            shown = [f"{name} {weight:.3g}" for name, weight in zip(self._names, weights, strict=True)]
            self.about["class weights"] = listed(shown, LABELS)
        heads = config.attention.entropy != 0 or config.data.rationale is not None
        config.attention.check(model.num_hidden_layers, heads)
        self.objective = classification_objective(
            self.model,
            execution=config.execution,
            weights=weights,
            attention=config.attention if heads else None,
            middle=float(np.mean(train.labels)) if self._examples.kind == "numbers" else 0.0,
        )

    def init_params(self, key: jax.Array) -> dict:
        return init_params(self.model, key, heads=("sequence_classification",))

    def evaluate(self, model: LoadedModel) -> Evaluation:
        """The metrics of `measured`; predictions.jsonl and, of classes, confusion.json; tuned.json."""
        chosen = {} if self._examples.apart is None else tuned(model, self._examples.apart)
        if chosen:
            model = dataclasses.replace(model, saved={**model.saved, "tuned": chosen})
        found = measured(model, self._examples.validation, self._examples.train.labels)
        return found._replace(files={**found.files, TUNED: chosen} if chosen else found.files)

    def finalize_eval(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """pearson of numbers and f1 of lists, from their counts."""
        return metrics | finalized(metrics)


def class_logits(
    model: ModelConfig,
    params,
    batch: dict,
    execution: Execution,
    key: jax.Array | None = None,
    attention: SupervisedAttention | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """(class scores, float32 [B, C], or [B, E, C] of rows of E examples; what `attention` reads of the heads).

    A key turns dropout on.
    """
    weights = batch["example_weights"]
    body_key, head_key = (None, None) if key is None else jax.random.split(key)
    x_BTD, p_LBNTS = states(attention, model, params, batch, execution, body_key)
    examples = weights.shape[1] if weights.ndim == 2 else None
    return sequence_logits(model, params, x_BTD, batch["segment_ids"], head_key, examples), p_LBNTS


def class_weights(examples: Examples) -> np.ndarray:
    """How much each class counts [C], so that all together count alike: N / (C × its examples), as scikit-learn's
    `balanced`. Of lists: how much a label that is right counts, (examples without it) / (examples with it), both at
    least 1."""
    labels = np.array(examples.train.labels)
    if examples.kind == "lists":
        with_it = labels.sum(0)
        return (np.maximum(len(labels) - with_it, 1) / np.maximum(with_it, 1)).astype(np.float32)
    counts = np.bincount(labels, minlength=len(examples.names))
    return (len(labels) / (len(counts) * np.maximum(counts, 1))).astype(np.float32)


def classification_objective(
    model: ModelConfig,
    *,
    execution: Execution,
    weights: np.ndarray | None = None,
    attention: SupervisedAttention | None = None,
    middle: float = 0.0,
) -> Objective:
    """The two pure functions of the objective; metrics: loss (nats an example, or squared error), and accuracy.

    batch: also `labels` int32 [B] (float32 of numbers, int32 [B, C] of lists) and `example_weights` float32 [B], 0 for
    rows that count nothing; [B, E] where rows hold E examples (data.examples.LabelledBatches). weights: of the classes
    [C], in training; the loss is then the weighted mean, as in PyTorch. attention: what is read of the heads and what
    that costs; metrics are then also attention_entropy (nats, mean over tokens, heads and layers) and, where the batch
    has `marked`, rationale_kl (nats) and rationale_mass (the part of the look that is on marked words), means over the
    examples in which anything is marked. middle: about which numbers vary, so that float32 holds how much (years, say).
    """
    problem = model.problem_type

    def weighed(batch, train):
        if weights is None or not train or problem is not None:
            return batch["example_weights"]
        return batch["example_weights"] * jnp.asarray(weights)[batch["labels"]]

    def prepare(batch, key, step, train):
        total = jnp.sum(weighed(batch, train))
        total = jnp.where(total > 0, total, 1.0)
        if attention is None:
            return batch, total
        _, explained_BE = _marked(batch)
        tokens = jnp.sum(batch["segment_ids"] > 0).astype(jnp.float32)
        return batch, (total, jnp.maximum(tokens, 1.0), jnp.maximum(jnp.sum(explained_BE), 1.0))

    def loss(params, batch, key, norms, train):
        logits_BC, p_LBNTS = class_logits(model, params, batch, execution, key if train else None, attention)
        labels_B, weights_B = batch["labels"], weighed(batch, train)
        real_B = batch["example_weights"]
        counts = {}
        if problem == "regression":
            nats_B = jnp.square(logits_BC[..., 0] - labels_B)
            counts["moments"] = _moments(logits_BC[..., 0] - middle, labels_B - middle, real_B)
            right_B = None
        elif problem == "multi_label_classification":
            positive = jnp.asarray(weights) if weights is not None and train else 1.0
            targets_BC = labels_B.astype(jnp.float32)
            nats_BC = -positive * targets_BC * jax.nn.log_sigmoid(logits_BC)
            nats_BC -= (1 - targets_BC) * jax.nn.log_sigmoid(-logits_BC)
            nats_B, said_BC = jnp.mean(nats_BC, axis=-1), (logits_BC > 0).astype(jnp.float32)
            right_B = jnp.all(said_BC == targets_BC, axis=-1).astype(jnp.float32)
            both, either = jnp.sum(said_BC * targets_BC, -1), jnp.sum(said_BC + targets_BC, -1)
            counts["hits"] = jnp.stack([jnp.sum(real_B * both), jnp.sum(real_B * either)])
        else:
            nats_B = -jnp.take_along_axis(jax.nn.log_softmax(logits_BC), labels_B[..., None], axis=-1)[..., 0]
            right_B = (jnp.argmax(logits_BC, axis=-1) == labels_B).astype(jnp.float32)
        loss_sum = jnp.sum(weights_B * nats_B)
        metrics = {"loss": (loss_sum, jnp.sum(weights_B))}
        if right_B is not None:
            metrics["accuracy"] = (jnp.sum(real_B * right_B), jnp.sum(real_B))
        metrics |= {name: (count, None) for name, count in counts.items()}
        if attention is None:
            return loss_sum / norms, jax.lax.stop_gradient(metrics)
        assert p_LBNTS is not None
        total, tokens, explained = norms
        nats, here = entropy(p_LBNTS, batch["segment_ids"])
        metrics["attention_entropy"] = (nats, here)
        added = attention.entropy * nats / tokens
        if MARKED in batch:
            r_BES, explained_BE = _marked(batch)
            a_BES, count = looks(model, p_LBNTS, batch["segment_ids"], r_BES.shape[1]), jnp.sum(explained_BE)
            kl = jnp.sum(explained_BE * divergence(r_BES, a_BES))
            metrics["rationale_kl"] = (kl, count)
            metrics["rationale_mass"] = (jnp.sum(jnp.where(r_BES > 0, a_BES, 0.0)), count)
            added += attention.supervision * kl / explained
        return loss_sum / total + added, jax.lax.stop_gradient(metrics)

    return Objective(prepare, loss)


def _marked(batch: dict) -> tuple[jax.Array, jax.Array]:
    """What is marked of each example (models.attention_terms.marked_shares); nothing where the batch does not say."""
    segments_BT, examples = (
        batch["segment_ids"],
        1 if batch["example_weights"].ndim == 1 else batch["example_weights"].shape[1],
    )
    marked_BT = batch.get(MARKED, jnp.zeros(segments_BT.shape, jnp.float32))
    return marked_shares(marked_BT, segments_BT, examples)


def _moments(x_B: jax.Array, y_B: jax.Array, weights_B: jax.Array) -> jax.Array:
    """Sums of 1, x, y, x², y², xy, float32 [6]: what a correlation is made of."""
    terms = (jnp.ones_like(x_B), x_B, y_B, x_B * x_B, y_B * y_B, x_B * y_B)
    return jnp.stack([jnp.sum(weights_B * term) for term in terms])


def finalized(metrics: dict[str, Any]) -> dict[str, float]:
    """pearson of the moments, f1 of the hits, where an evaluation has counted them."""
    found = {}
    if "moments" in metrics:
        n, x, y, xx, yy, xy = metrics["moments"]
        below = max(n * xx - x * x, 0.0) * max(n * yy - y * y, 0.0)
        found["pearson"] = float((n * xy - x * y) / math.sqrt(below)) if below > 0 else 0.0
    if "hits" in metrics:
        both, either = metrics["hits"]
        found["f1"] = float(2 * both / max(either, 1.0))
    return found


def measure(model: LoadedModel, data: ClassifyData) -> Evaluation:
    """A classifier on a labelled file whose labels it knows."""
    return measured(model, read_validation(data, model))
