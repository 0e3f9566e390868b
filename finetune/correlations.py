"""Correlations of predicted with true numbers, by SciPy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from espalier.intervals import bootstrap


def pearson(a_N: np.ndarray, b_N: np.ndarray) -> float:
    """Pearson's correlation; 0 where one of the two does not vary."""
    from scipy.stats import pearsonr

    if not _vary(a_N, b_N):
        return 0.0
    # SciPy does not say what its results hold.
    found: Any = pearsonr(a_N, b_N)
    return float(found[0])


def spearman(a_N: np.ndarray, b_N: np.ndarray) -> float:
    """That of the ranks, where equal values share their mean rank."""
    from scipy.stats import spearmanr

    if not _vary(a_N, b_N):
        return 0.0
    found: Any = spearmanr(a_N, b_N)
    return float(found[0])


def with_intervals(
    measures: Mapping[str, Callable[[np.ndarray, np.ndarray], float]], a_N: np.ndarray, b_N: np.ndarray
) -> dict[str, Any]:
    """Each measure by its name, and its 95 % interval as `name_interval`."""
    found: dict[str, Any] = {name: measure(a_N, b_N) for name, measure in measures.items()}
    for name, measure in measures.items():
        found[f"{name}_interval"] = list(bootstrap(lambda drawn, of=measure: of(a_N[drawn], b_N[drawn]), len(a_N)))
    return found


def _vary(*sides: np.ndarray) -> bool:
    return all(np.ptp(side_N) > 0 for side_N in sides)
