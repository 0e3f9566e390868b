"""Whether probabilities mean what they say: the expected calibration error, and a temperature that lessens it.

Guo et al. 2017, "On Calibration of Modern Neural Networks": networks are surer than they are right; scores divided by
one number, fitted on examples that were not learnt from, mend most of it and change no prediction.
"""

from __future__ import annotations

import numpy as np

BINS = 15
"""Of the calibration error (Guo et al. 2017)."""
FEWEST = 20
"""Examples that a temperature is fitted on, at least."""


def calibration_error(confidence_N: np.ndarray, right_N: np.ndarray) -> float:
    """Expected calibration error: how far probability and frequency are apart, on average over BINS.

    confidence_N: probabilities that were given. right_N: whether what they were given to is so.
    """
    bins_N = np.clip(np.ceil(confidence_N * BINS).astype(int) - 1, 0, BINS - 1)
    gaps = [
        abs(right_N[bins_N == number].mean() - confidence_N[bins_N == number].mean()) * np.mean(bins_N == number)
        for number in np.unique(bins_N)
    ]
    return float(sum(gaps))


def fitted_temperature(scores_NC: np.ndarray, labels_N: np.ndarray) -> float:
    """The number by which scores are divided so that the labels are most probable, between 1/20 and 20.

    scores_NC: logits of classes that exclude each other. The scores of labels that stand alone are given as two
    classes each: (0, score).
    """
    from scipy.optimize import minimize_scalar

    scores_NC = np.asarray(scores_NC, np.float64)
    scores_NC = scores_NC - scores_NC.max(1, keepdims=True)
    right_N = scores_NC[np.arange(len(labels_N)), labels_N]

    def nats(log_temperature: float) -> float:
        inverse = np.exp(-log_temperature)
        return float(np.mean(np.log(np.exp(scores_NC * inverse).sum(1)) - right_N * inverse))

    return float(np.exp(minimize_scalar(nats, bounds=(-np.log(20), np.log(20)), method="bounded").x))  # type: ignore


def best_threshold(chance_NC: np.ndarray, labels_NC: np.ndarray) -> float:
    """From which probability a label is given, so that the F1 of all labels together is best; of equals nearest 0.5."""
    tried = sorted(np.arange(5, 100, 5) / 100, key=lambda threshold: abs(threshold - 0.5))

    def f1(threshold: float) -> float:
        said_NC = chance_NC >= threshold
        return 2 * float((said_NC & (labels_NC > 0)).sum()) / max(float(said_NC.sum() + labels_NC.sum()), 1.0)

    return float(max(tried, key=f1))
