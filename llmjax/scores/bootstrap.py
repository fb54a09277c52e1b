"""Bootstrap confidence intervals (Efron 1979): how much a mean over questions would vary with other questions."""

from __future__ import annotations

import numpy as np

# Resampled means. A choice: the ends of an interval of 95 % are then the means of rank 25 and 975.
RESAMPLES = 1000
CONFIDENCE = 0.95


def mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high) of float64 [n] values: the percentile interval of `CONFIDENCE`, always with the same draws.

    For the difference of two runs on the same questions, give the differences question by question (a paired
    comparison): what makes a question hard for both then cancels. NaN for no values.
    """
    n = len(values)
    if not n:
        return float("nan"), float("nan"), float("nan")
    rng = np.random.default_rng(0)
    means = np.array([values[rng.integers(0, n, n)].mean() for _ in range(RESAMPLES)])
    outside = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [outside, 1 - outside])
    return float(values.mean()), float(low), float(high)
