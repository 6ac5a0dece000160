"""The picture of `tsae features`: how often latents fire, and how smoothly, by split."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsae import plotting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEASURES = {
    "smoothness": "smoothness (lower: smoother)",
    "persistence": "P(fires next | fires)",
}


def draw(results: dict[str, Any], path: Path) -> None:
    """Histogram of firing rates, and the median of two measures of smoothness against the rate with its quartiles."""
    edges, splits = results["rate_edges"], results["splits"]
    with plotting.figure(path, 1, 3, (10.2, 3.1)) as (figure, axes):
        for series, (name, split) in enumerate(splits.items()):
            share = [count / split["latents"] for count in split["count"]]
            label = f"{name} ({split['latents']}, {split['silent']} silent)"
            axes[0].stairs(share, edges, color=plotting.PALETTE[series], label=label, linewidth=1.6)
            for measure, panel in zip(MEASURES, axes[1:], strict=True):
                _band(panel, edges, split[measure], series, name)
        axes[0].set_ylabel("share of the split's latents")
        axes[0].set_title("How often latents fire")
        axes[0].set_ylim(0, 1.35 * axes[0].get_ylim()[1])
        axes[1].set_yscale("log")
        axes[1].yaxis.set_major_formatter("{x:g}")
        axes[1].yaxis.set_minor_formatter("{x:g}")
        axes[2].set_ylim(0, 1)
        for panel, (measure, label) in zip(axes[1:], MEASURES.items(), strict=True):
            panel.set_ylabel(label)
            panel.set_title(f"{measure.capitalize()} (median, quartiles)")
        lowest = next((edge for edge, *counts in zip(edges, *_counts(splits), strict=False) if any(counts)), edges[0])
        for panel in axes:
            panel.set_xscale("log")
            panel.set_xlim(lowest, 1)
            panel.set_xlabel("firing rate (share of tokens)")
            panel.legend(loc="upper left")
        subject = results["subject"]
        figure.suptitle(
            f"{subject['run']} ({subject['dict_class']}), {results['tokens']:,} tokens",
            x=0.01,
            ha="left",
            fontsize=9,
            color="#444444",
        )


def _counts(splits: dict[str, Any]) -> list[list[int]]:
    return [split["count"] for split in splits.values()]


def _band(axes: Axes, edges: list[float], quartiles: list[list[float] | None], series: int, name: str) -> None:
    """Median and quartiles; bins with too few latents are gaps."""
    centres = [(low * high) ** 0.5 for low, high in itertools.pairwise(edges)]
    low, median, high = zip(*(found or [math.nan] * 3 for found in quartiles), strict=True)
    colour = plotting.PALETTE[series]
    axes.plot(centres, median, color=colour, marker=plotting.MARKERS[series], markersize=3.5, label=name)
    axes.fill_between(centres, low, high, color=colour, alpha=0.18, linewidth=0)
