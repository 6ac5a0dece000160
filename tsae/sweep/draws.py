"""Random points of a sweep: the same draws for the same seed, and the first of them however many are drawn."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

from tsae.runtime.errors import TsaeError, suggestion

WAYS = ("uniform", "log_uniform", "integers")
TRIES = 100
"""Draws for each point wanted; lists of few values may not have as many combinations as were asked for."""


def draw_points(axes: Mapping[str, Any], count: int, seed: int, where: str) -> list[dict[str, Any]]:
    """`count` distinct points over `axes`: key path → a list to choose from, or a way with its bounds.

    A value depends on the seed, its axis and the number of the draw alone, so that neither a larger `count` nor another
    axis changes the values that are there. Raises TsaeError for bounds that make no sense and too few combinations.
    """
    for key, axis in axes.items():
        _refuse_impossible(axis, f"{where}.{key}")
    points: list[dict[str, Any]] = []
    for number in range(count * TRIES):
        point = {key: _value(axis, random.Random(f"{seed}/{number}/{key}")) for key, axis in axes.items()}
        if point not in points:
            points.append(point)
        if len(points) == count:
            return points
    raise TsaeError(f"{where}.n: {count} distinct points are asked for; these axes gave {len(points)}")


def _value(axis: Any, generator: random.Random) -> Any:
    if isinstance(axis, list):
        return generator.choice(axis)
    ((way, (low, high)),) = axis.items()
    if way == "integers":
        return generator.randint(low, high)
    if way == "uniform":
        return _short(generator.uniform(low, high))
    return _short(math.exp(generator.uniform(math.log(low), math.log(high))))


def _short(value: float) -> float:
    """Four significant digits, which is what a name shows."""
    return float(f"{value:.4g}")


def _refuse_impossible(axis: Any, where: str) -> None:
    if isinstance(axis, list):
        if not axis:
            raise TsaeError(f"{where}: the list is empty; at least one value is expected")
        return
    if not isinstance(axis, Mapping) or len(axis) != 1:
        raise TsaeError(f"{where}: a list of values is expected, or one of {', '.join(WAYS)} with [low, high]")
    ((way, bounds),) = axis.items()
    if way not in WAYS:
        raise TsaeError(f"{where}.{way}: unknown; {suggestion(way, WAYS)}allowed: {', '.join(WAYS)}")
    numbers = isinstance(bounds, list) and all(type(bound) in (int, float) for bound in bounds)
    if not numbers or len(bounds) != 2 or not bounds[0] < bounds[1]:
        raise TsaeError(f"{where}.{way}: [low, high] is expected, with low below high; found {bounds}")
    if way == "integers" and any(bound != int(bound) for bound in bounds):
        raise TsaeError(f"{where}.{way}: whole numbers are expected; found {bounds}")
    if way == "log_uniform" and bounds[0] <= 0:
        raise TsaeError(f"{where}.{way}: low must be greater than 0; found {bounds[0]}")
