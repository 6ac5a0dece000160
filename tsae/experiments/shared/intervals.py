"""Means over repetitions with intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def over_seeds(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half-width of its 95 % t interval over repetitions; None for the latter where there is one alone."""
    from scipy.stats import t

    if len(values) < 2:
        return float(np.mean(values)), None
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), float(t.ppf(0.975, len(values) - 1) * error)
