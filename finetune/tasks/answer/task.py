"""Question answering: maximise Σ (log p(first token) + log p(last token)) / 2 over the windows of a batch.

p is the softmax over all tokens of a row (Devlin et al. 2019, section 4.2); a window without the whole answer has both
ends at the token that stands for none (predict.answer).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from espalier.intervals import ratio_interval
from espalier.models.config import Execution, ModelConfig
from espalier.models.heads import span_logits
from espalier.models.transformer import apply, init_params
from espalier.predict.answer import Answering, find_answers, result_of
from espalier.task import Evaluation
from espalier.training.run import TUNED
from espalier.training.step import Objective
from finetune.task import OfExamples
from finetune.tasks.answer.examples import Part, facts_of, lacks, read_parts, read_validation
from finetune.tasks.answer.metrics import Unit, at_best_thresholds, baseline, metrics, scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from espalier.predict.loaded import LoadedModel
    from finetune.tasks.answer.record import AnswerConfig, AnswerData


class QuestionAnswering(OfExamples):
    """The questions of files, in windows."""

    def __init__(self, config: AnswerConfig, model: ModelConfig, tokenizer: PreTrainedTokenizerFast, mesh: Mesh):
        self._parts = read_parts(config.data, tokenizer, model)
        self.model = dataclasses.replace(model, labels=(), problem_type=None)
        self.settings = {"no_answer": self._parts.tuning is not None, "score_by": self._parts.unit}
        self.fingerprints = self._parts.fingerprints
        self.facts: Sequence[str] = self._parts.facts
        self.about = self._parts.about
        self.take(config, tokenizer, mesh, self._parts.train.rows, self._parts.validation.rows)
        self.objective = answering_objective(self.model, execution=config.execution)

    def init_params(self, key: jax.Array) -> dict:
        return init_params(self.model, key, heads=("question_answering",))

    def evaluate(self, model: LoadedModel) -> Evaluation:
        """em, f1 and so on (`measured`), with a threshold that is chosen on a part of train; predictions.jsonl."""
        how, tuned = Answering.of(model), {}
        if self._parts.tuning is not None:
            tuned = {"no_answer_threshold": chosen_threshold(model, self._parts.tuning, how, self._parts.unit)}
            how = how._replace(threshold=tuned["no_answer_threshold"])
        found = measured(model, self._parts.validation, how, self._parts.unit)
        return found._replace(files={**found.files, TUNED: tuned} if tuned else found.files)


def answering_objective(model: ModelConfig, *, execution: Execution) -> Objective:
    """The two pure functions of the objective; metrics: loss (nats an end), exact (windows with both ends right).

    batch: also `span` int32 [B, 2], first and last token of the answer, and `example_weights` float32 [B], 0 for rows
    that count nothing.
    """

    def prepare(batch, key, step, train):
        return batch, jnp.maximum(jnp.sum(batch["example_weights"]), 1.0)

    def loss(params, batch, key, norms, train):
        body_key, head_key = jax.random.split(key) if train else (None, None)
        x_BTD = apply(model, params, batch, execution=execution, key=body_key)
        scores_BT2 = span_logits(model, params, x_BTD, head_key)
        # Padding is no token of the row, whatever length the row has.
        scores_BT2 = jnp.where(batch["segment_ids"][:, :, None] != 0, scores_BT2, -jnp.inf)
        span_B2, weights_B = batch["span"], batch["example_weights"]
        # A row that fills up the batch has no tokens at all.
        scores_BT2 = jnp.where(weights_B[:, None, None] > 0, scores_BT2, 0.0)
        logprob_BT2 = jax.nn.log_softmax(scores_BT2, axis=1)
        ends_B = jnp.take_along_axis(logprob_BT2, span_B2[:, None, :], axis=1)[:, 0].sum(-1)
        exact_B = jnp.all(jnp.argmax(scores_BT2, axis=1) == span_B2, axis=-1).astype(jnp.float32)
        loss_sum, weight = -0.5 * jnp.sum(weights_B * ends_B), jnp.sum(weights_B)
        sums = {"loss": (loss_sum, weight), "exact": (jnp.sum(weights_B * exact_B), weight)}
        return loss_sum / norms, jax.lax.stop_gradient(sums)

    return Objective(prepare, loss)


def chosen_threshold(model: LoadedModel, part: Part, how: Answering, unit: Unit) -> float:
    """The one with the best F1 on these questions; 0 where only one kind of them is there, which any threshold beyond
    all of its scores would suit."""
    if lacks(part.questions):
        return 0.0
    found = find_answers(model, part.asked, how, part.windows)
    no_answer_N = np.array([each.no_answer for each in found])
    return at_best_thresholds([each.best for each in found], part.answers, no_answer_N, unit)["best_f1_threshold"]


def measure(model: LoadedModel, data: AnswerData) -> Evaluation:
    """A model on a file of questions; its threshold is that of the model."""
    how = Answering.of(model)
    how = how._replace(
        max_length=data.max_length or how.max_length,
        stride=data.stride,
        answer_tokens=data.answer_tokens,
        n_best=data.n_best,
    )
    part, unit = read_validation(data, model.tokenizer, how.max_length, model.config.causal)
    found = measured(model, part, how, unit)
    facts = facts_of(str(data.validation or data.train), part, how.max_length, how.stride, how.answer_tokens)
    return found._replace(warnings=[*facts, *found.warnings])


def measured(model: LoadedModel, part: Part, how: Answering, unit: Unit) -> Evaluation:
    """em and f1 with intervals, baseline_em, baseline_f1; with questions that have no answer also those of both kinds
    and best_…"""
    candidates = find_answers(model, part.asked, how, part.windows)
    results = [result_of(found, how) for found in candidates]
    given = [row["answer"] for row in results]
    found: dict[str, Any] = {**metrics(given, part.answers, unit), **baseline(part.asked, part.answers, unit)}
    if how.threshold is not None:
        found["threshold"] = how.threshold
    if how.threshold is not None and not all(part.answers):
        no_answer_N = np.array([each.no_answer for each in candidates])
        found |= at_best_thresholds([each.best for each in candidates], part.answers, no_answer_N, unit)
    exact_N, f1_N = scores(given, part.answers, unit)
    found |= _intervals(part, {"em": exact_N, "f1": f1_N})
    rows = [
        {
            "id": question.name,
            "question": question.question,
            "context": question.context,
            "answers": list(question.answers),
            "begins": list(question.begins),
            **result,
            "em": float(exact),
            "f1": float(f1),
        }
        for question, result, exact, f1 in zip(part.questions, results, exact_N, f1_N, strict=True)
    ]
    return Evaluation(found, rows, {}, _warnings(given, part, how))


def _intervals(part: Part, scores: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """95 % intervals by resampling contexts, whose questions are alike; none of a single context."""
    contexts, number_N = np.unique([question.context for question in part.questions], return_inverse=True)
    if len(contexts) < 2:
        return {}
    questions_C = np.bincount(number_N)
    return {
        f"{name}_interval": list(ratio_interval(np.bincount(number_N, score_N), questions_C))
        for name, score_N in scores.items()
    }


def _warnings(given: Sequence[str], part: Part, how: Answering) -> list[str]:
    """Where all answers are empty, or none can be while some should."""
    if not any(given) and any(part.answers):
        return ["warning: no question was given an answer, though some have one; train longer, or look at the data"]
    if how.threshold is None and not all(part.answers):
        none = sum(not right for right in part.answers)
        return [
            f"warning: {none:,} questions have no answer, and this model was trained on a file in which all have one: "
            "it always gives one"
        ]
    return []
