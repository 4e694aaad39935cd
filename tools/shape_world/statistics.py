"""Intervals for comparisons on the same clips."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Interval(NamedTuple):
    """An estimate with the bounds of its 95 % confidence interval."""

    estimate: float
    low: float
    high: float


STATISTICS = {
    "ratio_of_means": np.divide,
    "difference_of_means": np.subtract,
}


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, statistic: str = "ratio_of_means", n: int = 10_000, seed: int = 0
) -> Interval:
    """mean(a) / mean(b) or mean(a) - mean(b), with a 95 % percentile interval over `n` resamples.

    a, b: (N,) measurements of two methods on the same N clips; a pair is drawn as a whole.
    Raises ValueError for unequal lengths, no pairs, or a measurement that is not finite.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or a.size == 0:
        raise ValueError(f"expected two lists of equal, non-zero length, got shapes {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("a measurement is not finite; leave its clip out of both lists")
    compare = STATISTICS[statistic]
    weights = np.random.default_rng(seed).multinomial(a.size, np.full(a.size, 1 / a.size), size=n) / a.size  # (n, N)
    low, high = np.percentile(compare(weights @ a, weights @ b), [2.5, 97.5])
    return Interval(float(compare(a.mean(), b.mean())), float(low), float(high))
