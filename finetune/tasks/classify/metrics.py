"""How good predicted labels are, and the rows that show them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from espalier.data.labelled import Labelled


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


def majority_accuracy(train_labels: Sequence[int] | np.ndarray, labels_N: np.ndarray) -> float:
    """Accuracy of giving every example the most frequent training label (of equals, the one that is named first)."""
    return float(np.mean(labels_N == np.bincount(train_labels).argmax()))


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
        record = {"text": texts.texts_a[row]} | ({} if texts.texts_b is None else {"text_b": texts.texts_b[row]})
        yield record | {"label": names[label], "prediction": names[best], "probability": float(probability_C[best])}
