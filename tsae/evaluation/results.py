"""From scores to the flat dictionary that eval_results.json holds.

The reference's names keep the reference's meaning: a mean over contexts of a measure of one context. They are joined
by values pooled over tokens (`_pooled`), values of each group (`_group`) and half-widths of 95 % intervals over
documents. `_h`, `_high` are group 0, `_l`, `_low` the rest. What is not defined is null and left out of means; with a
single group there are no splits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tsae.evaluation.scores import Scores
from tsae.evaluation.statistics import mean_interval, ratio_interval

SMOOTHNESS_NAMES = {
    "total_variation": "smoothness_tv",
    "lipschitz": "lipschitz_cont",
    "fft": "fft",
    "wavelet": "wavelet",
    "multiscale": "multiscale",
    "relative_variation": "relative_tv",
}
"""Measure → its name in eval_results.json, followed by _tot, _h, _l or _group."""

TOKEN_MEANS = ("l2_loss", "cossim", "l2_ratio", "relative_reconstruction_bias")
ALL, HIGH, LOW, FIRST_GROUP, SECOND_GROUP = range(5)
"""Positions in the list of ranges."""

RATE_EXPONENTS = np.linspace(-6, 0, 25)
"""Edges of the histogram of firing rates, as powers of ten."""


class Results:
    """A flat dictionary of measures and the half-widths of their intervals."""

    def __init__(self, scores: Scores) -> None:
        self.has_splits = len(scores.dictionary.group_sizes) > 1
        self.values: dict[str, Any] = {}
        self.half_widths: dict[str, float | None] = {}

    def put(self, name: str, interval: tuple[float, float]) -> None:
        """Record a value and its half-width under `name`."""
        self.values[name], self.half_widths[name] = (plain(number) for number in interval)

    def put_ranges(self, names: tuple[str, str, str, str], intervals: list[tuple[float, float]]) -> None:
        """Record R intervals under names for: all, high-level, low-level, the list of groups."""
        self.put(names[ALL], intervals[ALL])
        for position in (HIGH, LOW):
            self.put(names[position], intervals[position] if self.has_splits else (math.nan, math.nan))
        self.values[names[FIRST_GROUP]] = [plain(value) for value, _ in intervals[FIRST_GROUP:]]


def summarise(scores: Scores) -> dict[str, Any]:
    """The measures of all scored contexts; see the module's docstring for the names."""
    table, results = scores.table(), Results(scores)
    documents, tokens = scores.documents, scores.tokens
    for measure, name in SMOOTHNESS_NAMES.items():
        names = (f"{name}_tot", f"{name}_h", f"{name}_l", f"{name}_group")
        results.put_ranges(names, _means(table[measure], documents))
    for measure in ("l0", "l1_loss", "sequence_l0"):
        names = (measure, f"{measure}_high", f"{measure}_low", f"{measure}_group")
        results.put_ranges(names, _means(table[measure], documents))
    _put_variance_explained(results, "frac_variance_explained", _means(table["variance_explained"], documents))
    _put_variance_explained(results, "frac_variance_explained_pooled", _pooled_variance_explained(scores, table))
    for measure in TOKEN_MEANS:
        results.put(measure, mean_interval(table[measure], documents))
    return {
        **results.values,
        **_firing(scores),
        "half_width_95": results.half_widths,
        "reference": reference_results(scores),
        "contexts": scores.contexts,
        "documents": len(np.unique(documents)),
        "tokens": tokens,
        "group_sizes": list(scores.dictionary.group_sizes),
    }


def plain(value: float) -> float | None:
    """`value` for JSON, which has no NaN: null stands for undefined."""
    return float(value) if math.isfinite(value) else None


def _means(values: np.ndarray, documents: np.ndarray) -> list[tuple[float, float]]:
    return [mean_interval(column, documents) for column in values.T]


def _put_variance_explained(results: Results, name: str, intervals: list[tuple[float, float]]) -> None:
    results.put_ranges((name, f"{name}_high", f"{name}_low", f"{name}_group"), intervals)


def _pooled_variance_explained(scores: Scores, table: dict[str, np.ndarray]) -> list[tuple[float, float]]:
    """1 - Σ‖x - x̂‖² / Σ‖x - mean x‖² over all tokens; a split's x̂ holds the bias."""
    total = scores.squared_deviations()
    return [ratio_interval(total - error, total, scores.documents) for error in table["squared_error"].T]


def _firing(scores: Scores) -> dict[str, Any]:
    """Share of latents that fired at all, and the histogram of how often."""
    fired = scores.firings > 0
    alive = [float(fired[first:end].double().mean()) for first, end in scores.ranges]
    exponents = np.log10(np.maximum(scores.firings.numpy() / max(scores.tokens, 1), 10.0 ** RATE_EXPONENTS[0]))
    # The rates of the groups; silent latents are in frac_alive, not here.
    counts = [
        np.histogram(exponents[first:end][fired[first:end].numpy()], RATE_EXPONENTS)[0].tolist()
        for first, end in scores.ranges[FIRST_GROUP:]
    ]
    splits = len(scores.dictionary.group_sizes) > 1
    return {
        "frac_alive": alive[ALL],
        "frac_alive_high": alive[HIGH] if splits else None,
        "frac_alive_low": alive[LOW] if splits else None,
        "frac_alive_group": alive[FIRST_GROUP:],
        "firing_rates": {"log10_edges": RATE_EXPONENTS.tolist(), "latents_group": counts},
    }


def reference_results(scores: Scores) -> dict[str, float | None]:
    """What the reference's evaluate() returns for the same contexts, defects included, for comparison with its numbers.

    One context on which a measure is undefined makes its mean undefined (the reference's FFT measure raises there); the
    wavelet ratio of a silent range is 0; `_l` is group 1 alone except for total variation; with one group, all splits
    are 0 and smoothness_tv_h is the total.
    """
    table, one_group = scores.table(), len(scores.dictionary.group_sizes) == 1
    wavelet = np.where(table["sequence_l0"] == 0, 0.0, table["wavelet"])
    ratios = {**table, "wavelet": wavelet}

    def splits(measure: str) -> tuple[float, float]:
        if one_group:
            return 0.0, 0.0
        return ratios[measure][:, HIGH].mean(), ratios[measure][:, SECOND_GROUP].mean()

    out = {name: table[name].mean() for name in TOKEN_MEANS}
    out |= {name: table[name][:, ALL].mean() for name in ("l1_loss", "l0", "sequence_l0")}
    variation = table["total_variation"].mean(0)
    out |= {"smoothness_tv_h": variation[HIGH], "smoothness_tv_l": 0.0 if one_group else variation[LOW]}
    for measure in ("lipschitz", "fft", "wavelet", "multiscale"):
        name = SMOOTHNESS_NAMES[measure]
        out[f"{name}_tot"] = ratios[measure][:, ALL].mean()
        out[f"{name}_h"], out[f"{name}_l"] = splits(measure)
    explained = "frac_variance_explained"
    out[explained] = table["variance_explained"][:, ALL].mean()
    out[f"{explained}_high"], out[f"{explained}_low"] = splits("variance_explained")
    out["frac_alive"] = (scores.firings > 0).double().mean().item()
    return {name: plain(value) for name, value in out.items()}
