"""Success and coherence of every condition, means over concepts with intervals, and what follows from them.

Shapes: N conditions, P prompts, C concepts, K strengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tsae.config.experiments import SteerConfig
from tsae.experiments.shared.bootstrap import mean_interval, plain
from tsae.experiments.steer.generation import Condition
from tsae.experiments.steer.measures import area, pareto_front, usable_interval


class Curve(NamedTuple):
    """One method over strengths of one kind, per concept."""

    method: str
    kind: str
    """`multiple` or `strength`."""
    strengths: tuple[float, ...]
    """[K]"""
    success: np.ndarray
    """[C, K] mean probability of the concept over prompts."""
    coherence: np.ndarray
    """[C, K]"""
    loss: np.ndarray
    """[C, K] in nats."""
    distinct_2: np.ndarray
    """[C, K]"""


def curves(conditions: Sequence[Condition], measures: dict[str, np.ndarray]) -> list[Curve]:
    """The conditions sorted into curves; `measures` has success, coherence, loss and distinct_2, each [N, P]."""
    places: dict[tuple[str, str], dict[tuple[int, float], int]] = {}
    for index, condition in enumerate(conditions):
        if condition.direction is None:
            continue
        kind = "strength" if condition.multiple is None else "multiple"
        value = condition.strength if condition.multiple is None else condition.multiple
        own = places.setdefault((condition.direction.method, kind), {})
        own[condition.direction.concept, value] = index
    found = []
    for (method, kind), own in places.items():
        strengths = tuple(dict.fromkeys(value for _, value in own))
        count = 1 + max(concept for concept, _ in own)
        table = np.array([[own[concept, value] for value in strengths] for concept in range(count)])
        found.append(
            Curve(method, kind, strengths, **{name: values.mean(1)[table] for name, values in measures.items()})
        )
    return found


def curve_results(curve: Curve, settings: SteerConfig) -> dict[str, Any]:
    """A curve as results have it."""
    points = list(zip(curve.success.mean(0).tolist(), curve.coherence.mean(0).tolist(), strict=True))
    front = pareto_front(points)
    half = _area_half_width(curve, settings)
    return {
        "method": curve.method,
        "kind": curve.kind,
        "points": [
            {
                curve.kind: strength,
                "success": plain(mean_interval(curve.success[:, place], settings.bootstrap, settings.seed)),
                "coherence": plain(mean_interval(curve.coherence[:, place], settings.bootstrap, settings.seed)),
                "perplexity": float(np.exp(curve.loss[:, place].mean())),
                "distinct_2": float(curve.distinct_2[:, place].mean()),
                "on_front": place in front,
            }
            for place, strength in enumerate(curve.strengths)
        ],
        "area": area(points),
        "area_half_width_95": half,
        "usable": _usable(curve, settings),
    }


def doublings(curve: Curve, settings: SteerConfig) -> np.ndarray:
    """[C] width of each concept's usable interval, in doublings of the strength; 0 without one."""
    intervals = (interval for interval in _usable(curve, settings)["by_concept"])
    return np.array([0.0 if interval is None else np.log2(interval[1] / interval[0]) for interval in intervals])


def _usable(curve: Curve, settings: SteerConfig) -> dict[str, Any]:
    """The interval of strengths in which text is both steered and coherent: of the means, and of each concept."""
    limits = (settings.success, settings.coherence)
    positive = np.array(curve.strengths) > 0
    strengths = np.array(curve.strengths)[positive]
    if not len(strengths):
        return {"of_means": None, "by_concept": [None] * len(curve.success)}

    def interval(success: np.ndarray, coherence: np.ndarray) -> tuple[float, float] | None:
        return usable_interval(strengths, success[positive], coherence[positive], limits)

    pairs = zip(curve.success, curve.coherence, strict=True)
    return {
        "of_means": interval(curve.success.mean(0), curve.coherence.mean(0)),
        "by_concept": [interval(success, coherence) for success, coherence in pairs],
    }


def _area_half_width(curve: Curve, settings: SteerConfig) -> float:
    """Half of the 95 % bootstrap interval of the area under the front, over draws of concepts."""
    random, count = np.random.default_rng(settings.seed), len(curve.success)
    drawn = []
    for _ in range(settings.bootstrap):
        chosen = random.integers(count, size=count)
        means = curve.success[chosen].mean(0), curve.coherence[chosen].mean(0)
        drawn.append(area(list(zip(*(values.tolist() for values in means), strict=True))))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(high - low) / 2
