"""Tagging of words: maximise Σ log p(tag | sentence) over the words of a batch, each read off its first piece."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from espalier.models.config import Execution, ModelConfig
from espalier.models.heads import token_logits
from espalier.models.transformer import apply, init_params
from espalier.predict.tag import answer, of_windows
from espalier.task import Evaluation
from espalier.training.step import Objective
from finetune.task import OfExamples
from finetune.tasks.tag.counts import Counts, entity_counts
from finetune.tasks.tag.examples import Part, describe_examples, read_examples, read_validation
from finetune.tasks.tag.metrics import MostFrequent, intervals, metrics, one_tag

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from espalier.predict.loaded import LoadedModel
    from finetune.tasks.tag.record import TagConfig, TagData


class Tagging(OfExamples):
    """The sentences and tags of two files."""

    def __init__(self, config: TagConfig, model: ModelConfig, tokenizer: PreTrainedTokenizerFast, mesh: Mesh):
        self._examples = read_examples(config.data, tokenizer, model)
        self.model = dataclasses.replace(model, labels=tuple(self._examples.names), problem_type=None)
        self.settings = {"labels": self._examples.names, "scheme": self._examples.scheme}
        self.fingerprints = self._examples.fingerprints
        self.facts: Sequence[str] = self._examples.facts
        train, validation = self._examples.train, self._examples.validation
        self.take(config, tokenizer, mesh, train.examples, validation.examples)
        self.about = describe_examples(config.data, self._examples)
        entities = self._examples.scheme is not None
        self.objective = tagging_objective(self.model, execution=config.execution, entities=entities)

    def init_params(self, key: jax.Array) -> dict:
        return init_params(self.model, key, heads=("token_classification",))

    def finalize_eval(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """f1 of entities, where there are some, from the counts of the objective."""
        counts = [metrics.pop(f"entities_{name}", None) for name in Counts._fields]
        if None in counts:
            return metrics
        hit, predicted, right = counts
        return metrics | {"f1": 2 * hit / max(predicted + right, 1)}

    def evaluate(self, model: LoadedModel) -> Evaluation:
        """The metrics of `measured`; predictions.jsonl and types.json."""
        train = self._examples.train.file
        baseline = MostFrequent(train.words, train.tags)
        return measured(model, self._examples.validation, self._examples.scheme, baseline)


def tagging_objective(model: ModelConfig, *, execution: Execution, entities: bool = False) -> Objective:
    """The two pure functions of the objective; metrics: loss (nats a word), accuracy.

    batch: also `labels` int32 [B, T] and `loss_weights` float32 [B, T], 1 at the first piece of a word, else 0.
    entities: evaluations also count those of each row (tag.counts): one that reaches over two windows counts as two.
    """

    def prepare(batch, key, step, train):
        return batch, jnp.maximum(jnp.sum(batch["loss_weights"]), 1.0)

    def loss(params, batch, key, norms, train):
        body_key, head_key = jax.random.split(key) if train else (None, None)
        x_BTD = apply(model, params, batch, execution=execution, key=body_key)
        logits_BTC = token_logits(model, params, x_BTD, head_key)
        labels_BT, weights_BT = batch["labels"], batch["loss_weights"]
        logprob_BT = jnp.take_along_axis(jax.nn.log_softmax(logits_BTC), labels_BT[..., None], axis=-1)[..., 0]
        best_BT = jnp.argmax(logits_BTC, axis=-1)
        correct_BT = (best_BT == labels_BT).astype(jnp.float32)
        loss_sum, weight = -jnp.sum(weights_BT * logprob_BT), jnp.sum(weights_BT)
        metrics = {"loss": (loss_sum, weight), "accuracy": (jnp.sum(weights_BT * correct_BT), weight)}
        if entities and not train:
            counts = entity_counts(model.labels, labels_BT, best_BT, weights_BT > 0)
            metrics |= {f"entities_{name}": (count, None) for name, count in counts._asdict().items()}
        return loss_sum / norms, jax.lax.stop_gradient(metrics)

    return Objective(prepare, loss)


def measure(model: LoadedModel, data: TagData) -> Evaluation:
    """A tagger on a file of tagged sentences."""
    return measured(model, *read_validation(data, model), None)


def measured(model: LoadedModel, part: Part, scheme: str | None, baseline: MostFrequent | None) -> Evaluation:
    """The metrics and intervals of finetune.tasks.tag.metrics, with `baseline_f1` (of entities) or `baseline_accuracy`
    where there is one.

    Rows: tokens, tags, prediction and, of entities, the predicted spans. types.json: figures of each type or tag.
    """
    score_WC = of_windows(model, part.windows, [len(sentence.words) for sentence in part.sentences])
    names = model.config.labels
    found = [answer(sentence, scores, names) for sentence, scores in zip(part.sentences, score_WC, strict=True)]
    predicted = [result["tags"] for result in found]
    known, rows = metrics(part.file.tags, predicted, scheme)
    figures: dict[str, Any] = known | intervals(part.file.tags, predicted, scheme)
    if baseline is not None:
        headline = "accuracy" if scheme is None else "f1"
        guessed, _ = metrics(part.file.tags, baseline.tags(part.file.words), scheme)
        figures[f"baseline_{headline}"] = guessed[headline]
    lines: list[dict[str, Any]] = []
    for result, tags in zip(found, part.file.tags, strict=True):
        spans = {"spans": result["spans"]} if scheme is not None else {}
        lines.append({"tokens": result["tokens"], "tags": tags, "prediction": result["tags"], **spans})
    warning = one_tag(part.file.tags, predicted)
    return Evaluation(figures, lines, {"types.json": {"scheme": scheme, "types": rows}}, [warning] if warning else [])
