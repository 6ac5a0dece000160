"""Means with 95 % bootstrap intervals, for numbers of which there is one per independent draw."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A mean and its 95 % percentile interval."""

    mean: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half of the interval's length."""
        return (self.high - self.low) / 2


def mean_interval(values: np.ndarray, draws: int = 1000, seed: int = 0) -> Interval:
    """Mean of values [n] over independent draws; NaN values are undefined and left out.

    All NaN if nothing is defined; an interval of NaN for a single value.
    """
    known = np.asarray(values, np.float64)
    known = known[~np.isnan(known)]
    if len(known) < 2:
        return Interval(float(known[0]) if len(known) else np.nan, np.nan, np.nan)
    chosen = np.random.default_rng(seed).integers(len(known), size=(draws, len(known)))
    low, high = np.quantile(known[chosen].mean(1), [0.025, 0.975])
    return Interval(float(known.mean()), float(low), float(high))


def plain(interval: Interval) -> dict[str, float | None]:
    """An interval as JSON has it: null where something is undefined."""
    return {name: None if np.isnan(value) else value for name, value in interval._asdict().items()}
