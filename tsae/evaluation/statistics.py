"""Every interval there is: 95 %, by what counts as one independent draw.

ratio_interval, mean_interval     contexts, of which those of one document resemble each other: Student's t, clustered
over_seeds, student_interval      a few repetitions, such as seeds or splits: Student's t
median_interval                   a median over contexts: percentiles over draws of documents
bootstrap_mean, bootstrap_means   draws of any distribution, such as texts, pairs or concepts: percentiles
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

NORMAL_95 = 1.959963984540054


def ratio_interval(numerator: np.ndarray, denominator: np.ndarray, documents: np.ndarray) -> tuple[float, float]:
    """Ratio of two sums over contexts [S] and the half-width of its 95 % interval.

    Contexts of one document resemble each other, so documents, not contexts, count as independent draws (the
    linearised, cluster-robust variance; Student's t with a degree of freedom less than documents). Contexts of which
    either is not finite are left out; NaN where nothing is defined.
    """
    known = np.isfinite(numerator) & np.isfinite(denominator)
    numerator, denominator = numerator[known].astype(np.float64), denominator[known].astype(np.float64)
    total = denominator.sum()
    if total == 0:
        return float("nan"), float("nan")
    ratio = numerator.sum() / total
    _, cluster = np.unique(documents[known], return_inverse=True)
    influence = np.bincount(cluster, weights=(numerator - ratio * denominator) / total)
    clusters = len(influence)
    if clusters < 2:
        return float(ratio), float("nan")
    variance = np.square(influence).sum() * clusters / (clusters - 1)
    return float(ratio), float(student_quantile(clusters - 1) * np.sqrt(variance))


def mean_interval(values: np.ndarray, documents: np.ndarray) -> tuple[float, float]:
    """Mean over contexts [S] and the half-width of its 95 % interval, as in `ratio_interval`."""
    return ratio_interval(values, np.ones_like(values), documents)


def median_interval(values: np.ndarray, documents: np.ndarray, draws: int = 1000) -> tuple[float, float]:
    """Median over contexts [S] and the half-width of its 95 % interval: percentiles over draws of documents.

    Values that are not finite are left out; NaN where nothing is defined.
    """
    known = np.isfinite(values)
    if not known.any():
        return float("nan"), float("nan")
    values, (_, cluster) = values[known], np.unique(documents[known], return_inverse=True)
    clusters, order = int(cluster.max()) + 1, np.argsort(values)
    if clusters < 2:
        return float(np.median(values)), float("nan")
    random, medians = np.random.default_rng(0), np.empty(draws)
    for draw in range(draws):
        weights = np.bincount(random.integers(clusters, size=clusters), minlength=clusters)[cluster[order]]
        half = np.cumsum(weights)
        medians[draw] = values[order][np.searchsorted(half, half[-1] / 2)]
    low, high = percentiles(medians)
    return float(np.median(values)), float(high - low) / 2


@cache
def student_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t."""
    from scipy.special import stdtrit  # scipy.stats has the same function, and takes a second to import

    return float(stdtrit(degrees, 0.975))


def student_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean of at least two values and the half-width of its 95 % interval (Student's t)."""
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return mean, student_quantile(len(values) - 1) * deviation / math.sqrt(len(values))


def over_seeds(values: Sequence[float]) -> tuple[float, float | None]:
    """As `student_interval`; None for the half-width where there is one repetition alone."""
    if len(values) < 2:
        return float(np.mean(values)), None
    # Added up as numpy does (`student_interval` adds in turn): the last digits of results on disk hang on it.
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), float(student_quantile(len(values) - 1) * error)


class Interval(NamedTuple):
    """A mean and its 95 % percentile interval."""

    mean: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half of the interval's length."""
        return (self.high - self.low) / 2

    def plain(self) -> dict[str, float | None]:
        """The interval as JSON has it: null where something is undefined."""
        return {name: None if np.isnan(value) else value for name, value in self._asdict().items()}


def bootstrap_mean(values: np.ndarray, draws: int = 1000, seed: int = 0) -> Interval:
    """Mean of values [n] over independent draws; NaN values are undefined and left out.

    All NaN if nothing is defined; an interval of NaN for a single value.
    """
    known = np.asarray(values, np.float64)
    known = known[~np.isnan(known)]
    if len(known) < 2:
        return Interval(float(known[0]) if len(known) else np.nan, np.nan, np.nan)
    chosen = np.random.default_rng(seed).integers(len(known), size=(draws, len(known)))
    low, high = percentiles(known[chosen].mean(1))
    return Interval(float(known.mean()), float(low), float(high))


def bootstrap_means(values: np.ndarray, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Interval of the column means of values [n, T] over draws of rows: low [T], high [T]; one draw at a time."""
    random, n = np.random.default_rng(seed), len(values)
    means = np.stack([np.bincount(random.integers(n, size=n), minlength=n) @ values / n for _ in range(draws)])
    low, high = percentiles(means)
    return low, high


def percentiles(drawn: np.ndarray | Sequence[float]) -> np.ndarray:
    """The bounds of the 95 % percentile interval over draws [draws, ...]: [2, ...]."""
    return np.asarray(np.quantile(drawn, [0.025, 0.975], axis=0))
