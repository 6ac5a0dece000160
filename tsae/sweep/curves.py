"""The course of a training in a few characters: sparklines of what metrics.jsonl holds so far."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from tsae.runtime import metadata
from tsae.training.splits import LINE

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 12
SHOWN = ("loss", "fve")


def curves(path: Path) -> tuple[str, ...]:
    """The loss and the fraction of variance explained of all logged batches, each as a sparkline and its last value."""
    lines, _ = metadata.records(path, LINE)
    return tuple(_curve([line[name] for line in lines if math.isfinite(line.get(name, math.nan))]) for name in SHOWN)


def _curve(values: Sequence[float]) -> str:
    return f"{sparkline(values)} {values[-1]:.3g}" if values else ""


def sparkline(values: Sequence[float], width: int = WIDTH) -> str:
    """At most `width` bars from the least value to the largest, each the mean of as many neighbours."""
    bars = min(width, len(values))
    edges = [len(values) * bar // bars for bar in range(bars + 1)] if bars else [0]
    means = [sum(values[first:end]) / (end - first) for first, end in itertools.pairwise(edges)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    steps = len(BARS) - 1
    return "".join(BARS[round(steps * (mean - low) / (high - low)) if high > low else steps // 2] for mean in means)
