"""How often the right choice is the most likely one, beside chance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from espalier.intervals import mean_interval
from espalier.predict.choose import NORMALIZE
from espalier.predict.outputs import softmax
from espalier.task import Evaluation
from finetune.tasks.choose import blimp
from finetune.tasks.choose.files import Questions


def measured(questions: Questions, scores: Sequence[np.ndarray], normalize: str) -> Evaluation:
    """scores: of each question, float64 [3, C] (predict.choose.scores). normalize: by which it is predicted.

    `accuracy` of these predictions with its 95 % interval, `accuracy_by_sum`, `accuracy_by_tokens`, `accuracy_by_bytes`
    by each kind of score and `baseline_accuracy` (chance). Where a folder was read, the accuracies of blimp.summary and
    `accuracy_over_paradigms`, their mean, if some have more pairs. A choice as likely as the right one makes it wrong.
    """
    answered = zip(scores, questions.labels, strict=True)
    right_N3 = np.array([[_is_right(score_C, label) for score_C in found] for found, label in answered])
    at = NORMALIZE.index(normalize)  # type: ignore[arg-type]
    metrics: dict[str, Any] = {"accuracy": float(right_N3[:, at].mean())}
    metrics["accuracy_interval"] = list(mean_interval(right_N3[:, at]))
    metrics |= zip(
        ("accuracy_by_sum", "accuracy_by_tokens", "accuracy_by_bytes"), map(float, right_N3.mean(0)), strict=True
    )
    metrics["baseline_accuracy"] = float(np.mean([1 / len(asked.choices) for asked in questions.asked]))
    files: dict[str, Any] = {}
    if questions.paradigms:
        names = np.array(questions.paradigms)
        paradigms = []
        for name in dict.fromkeys(questions.paradigms):
            own = right_N3[names == name, at]
            paradigms.append(blimp.Paradigm(name, int(own.sum()), len(own)))
        if len({one.pairs for one in paradigms}) > 1:
            metrics["accuracy_over_paradigms"] = blimp.accuracy(paradigms)
            metrics["accuracy_over_paradigms_interval"] = blimp.accuracy_interval(paradigms)
        # From the whole to its parts.
        metrics |= dict(reversed(blimp.summary(paradigms).items()))
        files["paradigms.json"] = {one.name: blimp.accuracy([one]) for one in paradigms}
    rows = []
    for number, (asked, label, found) in enumerate(zip(questions.asked, questions.labels, scores, strict=True)):
        best = int(found[at].argmax())
        rows.append(
            ({"paradigm": questions.paradigms[number]} if questions.paradigms else {})
            | {"question": asked.question, "choices": list(asked.choices), "label": label, "prediction": best}
            | {"probability": float(softmax(found[at])[best]), "log_likelihoods": list(map(float, found[0]))}
        )
    return Evaluation(metrics, rows, files, _warnings(questions, rows))


def _is_right(score_C: np.ndarray, label: int) -> bool:
    return bool(score_C[label] > np.delete(score_C, label).max())


def _warnings(questions: Questions, rows: Sequence[dict]) -> list[str]:
    places = {row["prediction"] for row in rows}
    if len(places) > 1 or len({*questions.labels}) < 2 or len(rows) < 10:
        return []
    return [
        f"warning: choice {places.pop() + 1} is taken every time, whatever is asked; try more --epochs, another "
        "--optimizer.learning-rate or --data.normalize"
    ]
