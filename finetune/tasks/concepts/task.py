"""Classification by a bottleneck of concepts (Koh et al. 2020; of texts, Sun et al. 2024): the head scores K named
concepts, and a linear layer makes the class of their scores alone.

    loss = -Σ log p(class | s) + weight · mean_k (s_k - c_k)² + sparsity · ‖W‖₁,   p = softmax(s W + b)

c: what the columns say, or how near an embedding of the text is to that of the concept in words; both with mean 0 and
variance 1 over the training file. The class does not change what the concepts say (its gradient ends at s), unless
`joint` is set: otherwise scores come to hold what the concepts do not (leakage, Mahinpei et al. 2021).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from espalier import progress
from espalier.data.tables import read_text
from espalier.errors import UserError
from espalier.models.config import Execution, ModelConfig
from espalier.models.heads import sequence_logits
from espalier.models.transformer import apply, init_params
from espalier.predict.concepts import BOTTLENECK, class_scores, concept_scores
from espalier.predict.embed import unit
from espalier.predict.outputs import softmax
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
    from finetune.tasks.concepts.record import ConceptConfig, ConceptData, ConceptSettings

FEWEST = 2


class Concepts(OfExamples):
    """The examples, classes and concepts of labelled files."""

    def __init__(self, config: ConceptConfig, model: ModelConfig, tokenizer: PreTrainedTokenizerFast, mesh: Mesh):
        self._examples = read_examples(config.data, tokenizer, model, config.seed)
        if self._examples.kind != "classes":
            raise UserError(f"{config.data.train}: labels are {self._examples.kind}; concepts are for classes alone")
        names, train_NK, held_NK = targets_of(config, self._examples.train, self._examples.validation)
        middle_K, spread_K = train_NK.mean(0), train_NK.std(0)
        if (spread_K == 0).any():
            same = names[int(np.flatnonzero(spread_K == 0)[0])]
            raise UserError(f"{config.data.train}: the concept {same!r} is the same for every text; leave it out")
        scaled = [((found - middle_K) / spread_K).astype(np.float32) for found in (train_NK, held_NK)]
        # The head of a regression to several numbers, which are the concepts.
        self.model = dataclasses.replace(model, labels=tuple(names), problem_type="regression")
        self.settings = {
            "labels": self._examples.names,
            "concept_mean": middle_K.tolist(),
            "concept_spread": spread_K.tolist(),
        }
        self.fingerprints = self._examples.fingerprints
        self.facts: Sequence[str] = self._examples.facts
        train, validation = (
            [
                example._replace(of_row={**example.of_row, "concepts": row})
                for example, row in zip(part.encoded, found, strict=True)
            ]
            for part, found in zip((self._examples.train, self._examples.validation), scaled, strict=True)
        )
        self.take(config, tokenizer, mesh, train, validation)
        self.about = describe_examples(config.data, self._examples)
        self.about["concepts"] = f"{len(names)}: {', '.join(names)}"
        self._held_NK = scaled[1]
        self.objective = concept_objective(
            self.model, len(self._examples.names), config.concepts, execution=config.execution
        )

    def init_params(self, key: jax.Array) -> dict:
        params = init_params(self.model, key, heads=("sequence_classification",))
        layer = init_bottleneck(len(self.model.labels), len(self.settings["labels"]))
        return params | {"head": params["head"] | {BOTTLENECK: layer}}

    def evaluate(self, model: LoadedModel) -> Evaluation:
        return measured(model, self._examples.validation, self._held_NK, self._examples.train.labels)


def init_bottleneck(concepts: int, classes: int) -> dict:
    """The linear layer from K concepts to C classes, float32: zeros, for nothing is known of them yet."""
    return {
        "kernel": jnp.zeros((concepts, classes), jnp.float32),
        "bias": jnp.zeros((classes,), jnp.float32),
    }


def concept_objective(
    model: ModelConfig, classes: int, settings: ConceptSettings, *, execution: Execution
) -> Objective:
    """The two pure functions of the objective; metrics: loss (nats an example), accuracy, concept_error (mean square,
    in variances of the training file)."""

    def prepare(batch, key, step, train):
        return batch, jnp.maximum(jnp.sum(batch["example_weights"]), 1.0)

    def loss(params, batch, key, norms, train):
        body_key, head_key = jax.random.split(key) if train else (None, None)
        x_BTD = apply(model, params, batch, execution=execution, key=body_key)
        score_BK = sequence_logits(model, params, x_BTD, batch["segment_ids"], head_key)
        layer = params["head"][BOTTLENECK]
        seen_BK = score_BK if settings.joint else jax.lax.stop_gradient(score_BK)
        logits_BC = class_scores(layer, seen_BK)
        weights_B, labels_B = batch["example_weights"], batch["labels"]
        nats_B = -jnp.take_along_axis(jax.nn.log_softmax(logits_BC), labels_B[:, None], axis=-1)[:, 0]
        error_B = jnp.mean(jnp.square(score_BK - batch["concepts"]), axis=-1)
        right_B = (jnp.argmax(logits_BC, axis=-1) == labels_B).astype(jnp.float32)
        nats, error, weight = jnp.sum(weights_B * nats_B), jnp.sum(weights_B * error_B), jnp.sum(weights_B)
        total = nats + settings.weight * error
        if settings.sparsity:
            # Of micro-batches each pays its part.
            total += settings.sparsity * weight * jnp.sum(jnp.abs(layer["kernel"]))
        found = {
            "loss": (nats, weight),
            "accuracy": (jnp.sum(weights_B * right_B), weight),
            "concept_error": (error, weight),
        }
        return total / norms, jax.lax.stop_gradient(found)

    return Objective(prepare, loss)


def targets_of(config: ConceptConfig, *parts: Part) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The names of the concepts, and what is said of each example of both files, [N, K] each."""
    data, scorer = config.data, config.concepts.scorer
    if data.concepts:
        names, found = list(data.concepts), [columns_of(data, part, path) for part, path in
                                             zip(parts, (data.train, data.validation), strict=True)]  # fmt: skip
    elif data.concept_file and scorer:
        names = lines_of(data.concept_file, data.encoding)
        found = scored(names, scorer, parts)
    else:
        raise UserError(
            "no concepts given: name columns with --data.concepts, or a file with a concept a line with "
            "--data.concept-file and a model that scores them with --concepts.scorer"
        )
    if len(names) < FEWEST:
        raise UserError(f"{len(names)} concept; give {FEWEST} at least")
    return names, found[0], found[1]


def columns_of(data: ConceptData, part: Part, path: Any) -> np.ndarray:
    """The numbers of the columns, float64 [N, K]; UserError for what is none."""
    texts = part.texts
    if missing := [name for name in data.concepts if name not in texts.others]:
        raise UserError(f"{path} has no column {missing[0]!r}; its columns are {', '.join(map(repr, texts.columns))}")
    found = np.zeros((len(part.labels), len(data.concepts)))
    for at, name in enumerate(data.concepts):
        for row, value in enumerate(texts.others[name]):
            try:
                found[row, at] = float(value)
            except (TypeError, ValueError):
                found[row, at] = np.nan
            if not np.isfinite(found[row, at]):
                raise UserError(
                    f"{texts.places[row]}: {value!r} under {name!r} is no number; a concept is 0 or 1, or any"
                )
    return found


def lines_of(path: str, encoding: str) -> list[str]:
    """The concepts of a file, a line each."""
    lines = [line.strip() for line in read_text(path, encoding).text.splitlines()]
    names = list(dict.fromkeys(line for line in lines if line))
    if not names:
        raise UserError(f"{path} names no concept; write one a line, in words")
    return names


def scored(names: Sequence[str], scorer: str, parts: Sequence[Part]) -> list[np.ndarray]:
    """How near each text is to each concept, cosines [N, K]; of a pair its two texts behind each other."""
    from espalier.loading import load

    with progress.waiting(f"scoring {len(names)} concepts by {scorer}"):
        model = load(scorer)
        concept_KD = unit(model.embed(list(names)))
        found = []
        for part in parts:
            seconds = part.texts.texts_b or [""] * len(part.labels)
            texts = [f"{a} {b}".strip() for a, b in zip(part.texts.texts_a, seconds, strict=True)]
            found.append((unit(model.embed(texts)) @ concept_KD.T).astype(np.float64))
    return found


def measured(
    model: LoadedModel, part: Part, target_NK: np.ndarray | None, train_labels: Sequence[int] | None = None
) -> Evaluation:
    """accuracy, f1, macro_f1, matthews with their intervals, `majority`; of concepts whose targets are known,
    `concept_correlation` (Pearson's, mean over them) and `accuracy_given` (with the right scores in their place)."""
    names, labels_N = list(model.saved["labels"]), np.array(part.labels)
    score_NK = concept_scores(model, part.encoded)
    layer = {name: np.asarray(array) for name, array in model.params["head"][BOTTLENECK].items()}
    chance_NC = softmax(class_scores(layer, score_NK))
    said_N = chance_NC.argmax(1)
    found: dict[str, Any] = metrics(labels_N, said_N, len(names)) | metric_intervals(labels_N, said_N, len(names))
    found["majority"] = majority_accuracy(labels_N if train_labels is None else train_labels, labels_N)
    if target_NK is not None:
        pairs = [(score_NK[:, at], target_NK[:, at]) for at in range(score_NK.shape[1])]
        known = [np.corrcoef(x, y)[0, 1] for x, y in pairs if x.std() > 0 and y.std() > 0]
        found["concept_correlation"] = float(np.mean(known)) if known else 0.0
        found["accuracy_given"] = float((class_scores(layer, target_NK).argmax(1) == labels_N).mean())
    weights = {"concepts": list(model.config.labels), "classes": names, "weights": layer["kernel"].tolist()}
    rows = [
        row | {"concepts": dict(zip(model.config.labels, map(float, score_K), strict=True))}
        for row, score_K in zip(predictions(part.texts, labels_N, chance_NC, names), score_NK, strict=True)
    ]
    warning = one_class(labels_N, said_N, names)
    files = {"confusion.json": confusion(labels_N, said_N, names), "concepts.json": weights}
    return Evaluation(found, rows, files, [warning] if warning else [])


def measure(model: LoadedModel, data: ConceptData) -> Evaluation:
    """A classifier by concepts on a labelled file whose labels it knows; of concepts in columns, how right they are."""
    classes = dataclasses.replace(model.config, labels=tuple(model.saved["labels"]), problem_type=None)
    part = read_validation(data, dataclasses.replace(model, config=classes))
    target_NK = None
    if data.concepts and all(name in part.texts.others for name in data.concepts):
        middle_K, spread_K = (np.array(model.saved[f"concept_{name}"]) for name in ("mean", "spread"))
        target_NK = (columns_of(data, part, data.validation) - middle_K) / spread_K
    return measured(model, part, target_NK)
