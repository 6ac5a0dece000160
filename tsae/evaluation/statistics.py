"""Means and ratios over contexts with 95 % intervals."""

from __future__ import annotations

import numpy as np

NORMAL_95 = 1.959963984540054


def ratio_interval(numerator: np.ndarray, denominator: np.ndarray, documents: np.ndarray) -> tuple[float, float]:
    """Ratio of two sums over contexts [S] and the half-width of its 95 % normal interval.

    Contexts of one document resemble each other, so documents, not contexts, count as independent draws (the
    linearised, cluster-robust variance). Contexts with a NaN are left out; NaN where nothing is defined.
    """
    known = ~(np.isnan(numerator) | np.isnan(denominator))
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
    return float(ratio), float(NORMAL_95 * np.sqrt(variance))


def mean_interval(values: np.ndarray, documents: np.ndarray) -> tuple[float, float]:
    """Mean over contexts [S] and the half-width of its 95 % interval, as in `ratio_interval`."""
    return ratio_interval(values, np.ones_like(values), documents)
