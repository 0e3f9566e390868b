"""A classifier on examples: metrics with their 95 % intervals and a baseline, rows that show it, warnings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from espalier.predict.classify import probabilities, threshold_of
from espalier.task import Evaluation
from finetune.calibration import best_threshold, calibration_error, fitted_temperature
from finetune.tasks.classify.examples import Part
from finetune.tasks.classify.metrics import (
    confusion,
    list_metrics,
    majority_accuracy,
    metric_intervals,
    metrics,
    most_frequent_set,
    number_metrics,
    one_class,
    predictions,
    texts_of,
)

if TYPE_CHECKING:
    from espalier.predict.loaded import LoadedModel

SAME = "warning: every validation example gets the same {}, so nothing was learnt that tells them apart"


def measured(model: LoadedModel, part: Part, train_labels: Sequence[Any] | None = None) -> Evaluation:
    """Of classes: accuracy, f1, macro_f1, matthews, `majority`; of lists: f1, macro_f1, accuracy, `majority` and
    `majority_f1` of the most frequent set; of both the calibration error, where the model has a temperature also
    without it; of numbers: pearson, spearman, rmse, and `baseline_rmse` of the mean.

    train_labels: by which the baseline is chosen; None = those of the file itself.
    """
    known = np.array(part.labels if train_labels is None else train_labels)
    scores_NC = np.stack(model.outputs_of_head(part.encoded))
    if model.config.problem_type == "regression":
        return _numbers(scores_NC[:, 0].astype(np.float64), part, known)
    several = model.config.problem_type == "multi_label_classification"
    return (_lists if several else _classes)(model, scores_NC, part, known)


def tuned(model: LoadedModel, part: Part) -> dict[str, float]:
    """What is fitted on examples that were not learnt from: a temperature; for several labels a text a threshold."""
    scores_NC, labels = np.stack(model.outputs_of_head(part.encoded)), np.array(part.labels)
    if model.config.problem_type != "multi_label_classification":
        return {"temperature": fitted_temperature(scores_NC, labels)}
    alone_M2 = np.stack([np.zeros(scores_NC.size), scores_NC.reshape(-1)], axis=1)
    temperature = fitted_temperature(alone_M2, labels.reshape(-1))
    chance_NC = 0.5 + 0.5 * np.tanh(scores_NC.astype(np.float64) / temperature / 2)
    return {"temperature": temperature, "threshold": best_threshold(chance_NC, labels)}


def _classes(model: LoadedModel, scores_NC: np.ndarray, part: Part, known: np.ndarray) -> Evaluation:
    names, labels_N = model.config.labels, np.array(part.labels)
    chance_NC = probabilities(model, scores_NC)
    predictions_N = chance_NC.argmax(1)
    found: dict[str, Any] = metrics(labels_N, predictions_N, len(names))
    found |= metric_intervals(labels_N, predictions_N, len(names))
    found["majority"] = majority_accuracy(known, labels_N)
    for name, chances in _chances(model, scores_NC, chance_NC):
        found[name] = calibration_error(chances.max(1), predictions_N == labels_N)
    warning = one_class(labels_N, predictions_N, names)
    return Evaluation(
        found,
        list(predictions(part.texts, labels_N, chance_NC, names)),
        {"confusion.json": confusion(labels_N, predictions_N, names)},
        [warning] if warning else [],
    )


def _lists(model: LoadedModel, scores_NC: np.ndarray, part: Part, known: np.ndarray) -> Evaluation:
    names, labels_NC = model.config.labels, np.array(part.labels)
    chance_NC = probabilities(model, scores_NC)
    said_NC, usual_C = (chance_NC >= threshold_of(model)).astype(int), most_frequent_set(known)
    found = list_metrics(labels_NC, said_NC) | {
        "majority": float((labels_NC == usual_C).all(1).mean()),
        "majority_f1": float(2 * (labels_NC & usual_C).sum() / max((labels_NC + usual_C).sum(), 1)),
    }
    if "tuned" in model.saved:
        found["threshold"] = threshold_of(model)
    for name, chances in _chances(model, scores_NC, chance_NC):
        found[name] = calibration_error(chances.reshape(-1), labels_NC.reshape(-1))

    def chosen(row_C: np.ndarray) -> list[str]:
        return [name for name, is_it in zip(names, row_C, strict=True) if is_it]

    rows = [
        texts_of(part.texts, row)
        | {
            "labels": chosen(labels_C),
            "predictions": chosen(said_C),
            "probabilities": dict(zip(names, map(float, chance_C), strict=True)),
        }
        for row, (labels_C, said_C, chance_C) in enumerate(zip(labels_NC, said_NC, chance_NC, strict=True))
    ]
    same = len(np.unique(said_NC, axis=0)) == 1 and len(np.unique(labels_NC, axis=0)) > 1
    return Evaluation(found, rows, {}, [SAME.format("labels")] if same else [])


def _numbers(predictions_N: np.ndarray, part: Part, known: np.ndarray) -> Evaluation:
    labels_N = np.array(part.labels, np.float64)
    found = number_metrics(labels_N, predictions_N)
    found["baseline_rmse"] = float(np.sqrt(np.mean((labels_N - known.mean()) ** 2)))
    rows = [
        texts_of(part.texts, row) | {"label": label, "prediction": float(prediction)}
        for row, (label, prediction) in enumerate(zip(part.labels, predictions_N, strict=True))
    ]
    flat = np.ptp(predictions_N) < 1e-3 * max(float(np.ptp(labels_N)), 1e-9)
    return Evaluation(found, rows, {}, [SAME.format("number")] if flat else [])


def _chances(model: LoadedModel, scores_NC: np.ndarray, chance_NC: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """The probabilities whose calibration error is told; where there is a temperature, also those without it."""
    found = [("calibration_error", chance_NC)]
    if "tuned" in model.saved:
        plain = dataclasses.replace(model, saved={})
        found.append(("calibration_error_before", probabilities(plain, scores_NC)))
    return found
