"""How good predicted labels are, how sure that is, and the rows that show them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from espalier.data.labelled import Labelled
from espalier.intervals import SAMPLES, draws, interval
from finetune.correlations import pearson, spearman, with_intervals


def metrics(labels_N: np.ndarray, predictions_N: np.ndarray, classes: int) -> dict[str, float]:
    """accuracy, f1, macro_f1 and matthews.

    f1 is that of label 1 where there are two classes (as GLUE defines it), else the same as macro_f1, the mean over
    the classes. matthews: Matthews correlation (for more than two classes: Gorodkin 2004).
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    # scikit-learn has no types, and pyright guesses them from the defaults.
    settings: Any = {"labels": range(classes), "average": None, "zero_division": 0}
    f1_C = np.asarray(f1_score(labels_N, predictions_N, **settings))
    macro = float(np.mean(f1_C))
    # Undefined where one class is all there is; scikit-learn says 0 too, with a warning.
    several = len(np.union1d(labels_N, predictions_N)) > 1
    return {
        "accuracy": float(accuracy_score(labels_N, predictions_N)),
        "f1": float(f1_C[1]) if classes == 2 else macro,
        "macro_f1": macro,
        "matthews": float(matthews_corrcoef(labels_N, predictions_N)) if several else 0.0,
    }


def metric_intervals(
    labels_N: np.ndarray, predictions_N: np.ndarray, classes: int, samples: int = SAMPLES
) -> dict[str, list[float]]:
    """95 % intervals of accuracy, f1, macro_f1 and matthews as `accuracy_interval` …, from the same draws."""
    right_SC, true_SC, said_SC = (np.empty((samples, classes)) for _ in range(3))
    for number, drawn in enumerate(draws(len(labels_N), samples)):
        true_N, said_N = labels_N[drawn], predictions_N[drawn]
        for counts_SC, chosen in ((right_SC, true_N[true_N == said_N]), (true_SC, true_N), (said_SC, said_N)):
            counts_SC[number] = np.bincount(chosen, minlength=classes)
    total_S, right_S = np.full(samples, float(len(labels_N))), right_SC.sum(1)
    f1_SC = 2 * right_SC / np.maximum(true_SC + said_SC, 1)
    # Gorodkin 2004, equation 8.
    above_S = right_S * total_S - (true_SC * said_SC).sum(1)
    below_S = np.sqrt((total_S**2 - (said_SC**2).sum(1)) * (total_S**2 - (true_SC**2).sum(1)))
    values = {
        "accuracy": right_S / total_S,
        "f1": f1_SC[:, 1] if classes == 2 else f1_SC.mean(1),
        "macro_f1": f1_SC.mean(1),
        "matthews": np.where(below_S > 0, above_S / np.where(below_S > 0, below_S, 1), 0.0),
    }
    return {f"{name}_interval": list(interval(value_S)) for name, value_S in values.items()}


def majority_accuracy(train_labels: Sequence[int] | np.ndarray, labels_N: np.ndarray) -> float:
    """Accuracy of giving every example the most frequent training label (of equals, the one that is named first)."""
    return float(np.mean(labels_N == np.bincount(train_labels).argmax()))


def number_metrics(labels_N: np.ndarray, predictions_N: np.ndarray) -> dict[str, Any]:
    """pearson, spearman and rmse, with 95 % intervals. A correlation is 0 where one side does not vary."""
    measures = {"pearson": pearson, "spearman": spearman, "rmse": _root_of_mean_square}
    return with_intervals(measures, labels_N, predictions_N)


def list_metrics(labels_NC: np.ndarray, predictions_NC: np.ndarray) -> dict[str, Any]:
    """f1 (micro: of all labels together), macro_f1, accuracy (of whole sets), with 95 % intervals."""
    right_NC, either_NC = labels_NC & predictions_NC, labels_NC + predictions_NC
    exact_N = (labels_NC == predictions_NC).all(1)

    def measured(drawn: Any = slice(None)) -> tuple[float, float, float]:
        right_C, either_C = right_NC[drawn].sum(0), either_NC[drawn].sum(0)
        macro = (2 * right_C / np.maximum(either_C, 1)).mean()
        return 2 * right_C.sum() / max(either_C.sum(), 1), macro, exact_N[drawn].mean()

    names = ("f1", "macro_f1", "accuracy")
    values_SM = np.array([measured(drawn) for drawn in draws(len(labels_NC))])
    found: dict[str, Any] = dict(zip(names, map(float, measured()), strict=True))
    return found | {f"{name}_interval": list(interval(values_SM[:, at])) for at, name in enumerate(names)}


def most_frequent_set(labels_NC: np.ndarray) -> np.ndarray:
    """The set of labels that most examples have [C]; of equals, the first."""
    sets, counts = np.unique(labels_NC, axis=0, return_counts=True)
    return sets[counts.argmax()]


def one_class(labels_N: np.ndarray, predictions_N: np.ndarray, names: Sequence[str]) -> str | None:
    """A warning, in one line, where all examples were given one label though they have several; else None."""
    if len(np.unique(predictions_N)) > 1 or len(np.unique(labels_N)) < 2:
        return None
    return (
        f"warning: every validation example is taken for {names[predictions_N[0]]!r}, so nothing was learnt that tells "
        "them apart; try more --epochs, another --optimizer.learning-rate (a third, or three times as much), or more "
        "pretraining"
    )


def confusion(labels_N: np.ndarray, predictions_N: np.ndarray, names: Sequence[str]) -> dict:
    """confusion.json: counts, rows are true labels and columns predicted ones."""
    from sklearn.metrics import confusion_matrix

    matrix = confusion_matrix(labels_N, predictions_N, labels=range(len(names)))
    return {"labels": list(names), "matrix": matrix.tolist()}


def predictions(texts: Labelled, labels_N, probability_NC, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of predictions.jsonl: text (and text_b), label, prediction and its probability, in the order of the file."""
    for row, (label, probability_C) in enumerate(zip(labels_N, probability_NC, strict=True)):
        best = int(np.argmax(probability_C))
        found = {"label": names[label], "prediction": names[best], "probability": float(probability_C[best])}
        yield texts_of(texts, row) | found


def texts_of(texts: Labelled, row: int) -> dict[str, Any]:
    """text, and text_b of a pair."""
    return {"text": texts.texts_a[row]} | ({} if texts.texts_b is None else {"text_b": texts.texts_b[row]})


def _root_of_mean_square(a_N: np.ndarray, b_N: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a_N - b_N) ** 2)))
