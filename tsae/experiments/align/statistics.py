"""Paired differences of sparse feature activations, tested, and separated from what a difference in length explains.

Shapes: P pairs, F latents. Differences [P, F] are sparse and are never made dense.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class PairedTest(NamedTuple):
    """The paired t-test of each latent [F]; NaN where a latent never differs."""

    mean: np.ndarray
    effect: np.ndarray
    """Mean over standard deviation."""
    p: np.ndarray


class LengthTest(NamedTuple):
    """What is left of each latent's difference [F] once length is accounted for."""

    correlation: np.ndarray
    """Pearson's r of the difference with the difference in length."""
    correlation_p: np.ndarray
    intercept: np.ndarray
    """Expected difference of two responses of one length, from a regression on the length difference and its square."""
    p: np.ndarray
    """Of the intercept being 0, by White's standard errors: longer responses have less noise."""


def paired_test(difference: Any) -> PairedTest:
    """The paired t-test of sparse differences [P, F]."""
    from scipy.stats import t

    n = difference.shape[0]
    mean = np.asarray(difference.sum(0)).ravel() / n
    square = np.asarray(difference.multiply(difference).sum(0)).ravel()
    deviation = np.sqrt(np.maximum(square - n * mean**2, 0) / max(n - 1, 1))
    effect = np.divide(mean, deviation, out=np.full(len(mean), np.nan), where=deviation > 0)
    return PairedTest(mean, effect, 2 * t.sf(np.abs(effect) * np.sqrt(n), max(n - 1, 1)))


def length_test(difference: Any, length: np.ndarray, block: int = 512) -> LengthTest:
    """Regress each column of sparse differences [P, F] on the length differences [P]; `block` latents at a time."""
    from scipy.stats import norm

    columns = difference.tocsc()
    n, latents = columns.shape
    scale = length.std() or 1.0
    x = length / scale
    design = np.stack([np.ones(n), x, x**2], 1)
    weights = np.linalg.pinv(design)  # [3, P]
    intercept, error, correlation = (np.full(latents, np.nan) for _ in range(3))
    centred = (x - x.mean()) / (np.linalg.norm(x - x.mean()) or np.nan)
    for start in range(0, latents, block):
        part = slice(start, min(start + block, latents))
        y = columns[:, part].toarray()
        fitted = weights @ y
        intercept[part] = fitted[0]
        residual = y - design @ fitted
        error[part] = np.sqrt((weights[0] ** 2) @ residual**2 * n / max(n - design.shape[1], 1))
        norms = np.linalg.norm(y - y.mean(0), axis=0)
        correlation[part] = np.divide(centred @ y, norms, out=np.full(y.shape[1], np.nan), where=norms > 0)
    ratio = np.divide(intercept, error, out=np.full(latents, np.nan), where=error > 0)
    return LengthTest(correlation, _correlation_p(correlation, n), intercept, 2 * norm.sf(np.abs(ratio)))


def _correlation_p(r: np.ndarray, n: int) -> np.ndarray:
    from scipy.stats import t

    return np.asarray(2 * t.sf(np.abs(r) * np.sqrt((n - 2) / np.maximum(1 - r**2, 1e-300)), n - 2))


def false_discovery(p: np.ndarray, tested: np.ndarray) -> np.ndarray:
    """[F]: Benjamini and Hochberg's q-values over the latents where `tested` is true and p is defined; NaN elsewhere."""
    from scipy.stats import false_discovery_control

    q = np.full(len(p), np.nan)
    known = tested & ~np.isnan(p)
    if known.any():
        q[known] = false_discovery_control(p[known], method="bh")
    return q


def bootstrap_means(values: np.ndarray, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile interval of the column means of values [P, T] over draws of pairs: low [T], high [T]."""
    random, n = np.random.default_rng(seed), len(values)
    means = np.stack([np.bincount(random.integers(n, size=n), minlength=n) @ values / n for _ in range(draws)])
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return low, high
