"""How well explanations predict: scores of single latents, and their means over the latents of a dictionary.

A score is balanced accuracy: the mean of the shares that are right among the active (right) texts and among the inactive
(wrong) ones. Whoever cannot tell them apart scores 1/2, however many there are of either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tsae.evaluation.statistics import NORMAL_95, student_quantile
from tsae.experiments.explain.examples import DECADES, stratum

CHANCE = 0.5
SCORERS = ("detection", "fuzzing")
BIN_EDGES = np.linspace(-0.025, 1.025, 22)
"""Bins around the scores that ten texts of either kind can give."""


def balanced_accuracy(truth: Sequence[bool], verdicts: Sequence[bool | None]) -> dict[str, Any]:
    """Score, recall and specificity over the texts that have a verdict; None where one kind of text has no verdict."""
    judged = [(is_true, said) for is_true, said in zip(truth, verdicts, strict=True) if said is not None]
    positive = [said for is_true, said in judged if is_true]
    negative = [not said for is_true, said in judged if not is_true]
    recall = sum(positive) / len(positive) if positive else None
    specificity = sum(negative) / len(negative) if negative else None
    score = None if recall is None or specificity is None else (recall + specificity) / 2
    return {
        "score": score,
        "recall": recall,
        "specificity": specificity,
        "texts": len(judged),
        "unanswered": len(truth) - len(judged),
    }


def summarise(about: Sequence[dict[str, Any]], scores: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Means over latents; `about` has a record of every latent, `scores` of those that were scored.

    Latents are drawn evenly over strata of firing rates and groups, so a mean weights each stratum by the share of
    the dictionary's testable latents in it.
    """
    testable = [record for record in about if "failure" not in record]
    several = max(record["group"] for record in about) > 0
    splits = {"all": testable}
    if several:
        splits["high"] = [record for record in testable if record["group"] == 0]
        splits["low"] = [record for record in testable if record["group"] > 0]
    results: dict[str, Any] = {"chance": CHANCE}
    for scorer in SCORERS:
        results[scorer] = {split: _stratified(records, scores, scorer) for split, records in splits.items()}
        for part in ("recall", "specificity"):
            results[scorer][part] = _mean(testable, scores, scorer, part)
        if several:
            results[scorer]["high_minus_low_at_equal_rate"] = _matched_difference(splits, scores, scorer)
        results[scorer]["histogram"] = {
            split: np.histogram(_values(records, scores, scorer), BIN_EDGES)[0].tolist()
            for split, records in splits.items()
        }
    results["by_rate"] = [
        {"split": split, "stratum": _name(level), **{scorer: _mean(here, scores, scorer) for scorer in SCORERS}}
        for split, records in splits.items()
        for level in range(len(DECADES) + 1)
        if (here := _in(records, level))
    ]
    return results


def headline(results: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """The numbers that a sweep's report shows, and their half-widths."""
    shown, half = {}, {}
    for scorer in SCORERS:
        for split in ("all", "high", "low", "high_minus_low_at_equal_rate"):
            found = results[scorer].get(split)
            if found and found["mean"] is not None:
                name = scorer if split == "all" else f"{scorer}_{split}"
                shown[name], half[name] = found["mean"], found["half_width_95"]
    return shown, {name: width for name, width in half.items() if width is not None}


def _in(records: Sequence[dict[str, Any]], level: int) -> list[dict[str, Any]]:
    return [record for record in records if stratum(record["rate"]) == level]


def _name(level: int) -> str:
    edges = ["0", *(f"{edge:g}" for edge in DECADES), "1"]
    return f"{edges[level]} to {edges[level + 1]}"


def _values(
    records: Sequence[dict[str, Any]], scores: dict[int, dict[str, Any]], scorer: str, part: str = "score"
) -> np.ndarray:
    found = [scores.get(record["latent"], {}).get(scorer, {}).get(part) for record in records]
    return np.array([value for value in found if value is not None], dtype=np.float64)


def _mean(
    records: Sequence[dict[str, Any]], scores: dict[int, dict[str, Any]], scorer: str, part: str = "score"
) -> dict[str, Any]:
    """Mean of a few latents with Student's interval."""
    values = _values(records, scores, scorer, part)
    if len(values) < 2:
        return _plain(values.mean() if len(values) else np.nan, np.nan) | {"latents": len(values)}
    wider = student_quantile(len(values) - 1) / NORMAL_95
    return _plain(values.mean(), wider**2 * values.var(ddof=1) / len(values)) | {"latents": len(values)}


def _stratified(records: Sequence[dict[str, Any]], scores: dict[int, dict[str, Any]], scorer: str) -> dict[str, Any]:
    """Mean over the testable latents of a split, each stratum with its own weight."""
    strata = {(record["group"], stratum(record["rate"])) for record in records}
    mean = variance = weight = count = 0.0
    for group, level in strata:
        here = [record for record in _in(records, level) if record["group"] == group]
        values = _values(here, scores, scorer)
        if len(values):
            weight += len(here)
            count += len(values)
            mean += len(here) * values.mean()
            # A stratum of one latent has no spread of its own; it is given the largest one a score can have.
            variance += len(here) ** 2 * (values.var(ddof=1) if len(values) > 1 else 0.25) / len(values)
    if not weight:
        return _plain(np.nan, np.nan) | {"latents": 0}
    return _plain(mean / weight, variance / weight**2) | {"latents": int(count)}


def _matched_difference(
    splits: dict[str, list[dict[str, Any]]], scores: dict[int, dict[str, Any]], scorer: str
) -> dict[str, Any]:
    """High-level minus low-level, mean over the strata of firing rates in which both have two latents."""
    differences, variances = [], []
    for level in range(len(DECADES) + 1):
        high, low = (_values(_in(splits[split], level), scores, scorer) for split in ("high", "low"))
        if min(len(high), len(low)) > 1:
            differences.append(high.mean() - low.mean())
            variances.append(high.var(ddof=1) / len(high) + low.var(ddof=1) / len(low))
    if not differences:
        return _plain(np.nan, np.nan) | {"strata": 0}
    return _plain(np.mean(differences), np.sum(variances) / len(variances) ** 2) | {"strata": len(differences)}


def _plain(mean: float, variance: float) -> dict[str, Any]:
    """A mean with the half-width of its 95 % interval; None for what is not defined."""
    half = NORMAL_95 * np.sqrt(variance)
    return {
        "mean": None if np.isnan(mean) else float(mean),
        "half_width_95": None if np.isnan(half) else float(half),
    }
