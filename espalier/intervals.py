"""How sure a figure of an evaluation is: 95 % intervals by the bootstrap (Efron 1979), of any metric."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

Numbers = Sequence[float] | np.ndarray
SAMPLES = 1000
LEVEL = 0.95


def bootstrap(
    measure: Callable[[np.ndarray], np.ndarray | float], count: int, *, samples: int = SAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The interval of a metric over `count` examples drawn anew, with replacement.

    measure: the numbers of the examples drawn [count] → the metric; where it cannot be computed (NaN), the draw is left
    out. The same seed gives the same interval.
    """
    values = np.array([measure(drawn) for drawn in draws(count, samples, seed)], np.float64)
    return interval(values)


def mean_interval(values: Numbers, *, samples: int = SAMPLES, seed: int = 0) -> tuple[float, float]:
    """The interval of a mean over examples (accuracy, reciprocal rank)."""
    values_N = np.asarray(values, np.float64)
    return bootstrap(lambda drawn: values_N[drawn].mean(), len(values_N), samples=samples, seed=seed)


def ratio_interval(sums: Numbers, weights: Numbers, *, samples: int = SAMPLES, seed: int = 0) -> tuple[float, float]:
    """The interval of Σ sums / Σ weights over N parts of different weight (the loss of texts, a token)."""
    sums_N, weights_N = np.asarray(sums, np.float64), np.asarray(weights, np.float64)
    return bootstrap(
        lambda drawn: sums_N[drawn].sum() / weights_N[drawn].sum(), len(sums_N), samples=samples, seed=seed
    )


def interval(values: np.ndarray) -> tuple[float, float]:
    """What holds LEVEL of the values in its middle; NaN where there are none."""
    values = values[np.isfinite(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def draws(count: int, samples: int = SAMPLES, seed: int = 0) -> Iterator[np.ndarray]:
    """Numbers of `count` examples drawn with replacement, `samples` times."""
    random = np.random.default_rng(seed)
    for _ in range(samples):
        yield random.integers(0, count, count)
