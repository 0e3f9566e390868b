"""Correlations of predicted with true numbers, by SciPy."""

from __future__ import annotations

import numpy as np


def pearson(a_N: np.ndarray, b_N: np.ndarray) -> float:
    """Pearson's correlation; 0 where one of the two does not vary."""
    from scipy.stats import pearsonr

    return float(pearsonr(a_N, b_N)[0]) if _vary(a_N, b_N) else 0.0


def spearman(a_N: np.ndarray, b_N: np.ndarray) -> float:
    """That of the ranks, where equal values share their mean rank."""
    from scipy.stats import spearmanr

    return float(spearmanr(a_N, b_N)[0]) if _vary(a_N, b_N) else 0.0


def _vary(*sides: np.ndarray) -> bool:
    return all(np.ptp(side_N) > 0 for side_N in sides)
