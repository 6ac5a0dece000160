"""synthetic.png: where a dictionary keeps slow and fast features, beside its controls, and what each latent is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tsae.plotting import MARKERS, PALETTE, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CODES = {
    "dictionary": "dictionary",
    "post_hoc": "re-split by\nautocorrelation",
    "random": "random\ndirections",
    "oracle": "oracle",
}
BARS = (
    ("slow_high", "slow, high-level group", PALETTE[0]),
    ("slow_low", "slow, the rest", PALETTE[5]),
    ("fast_low", "fast, the rest", PALETTE[1]),
    ("fast_high", "fast, high-level group", PALETTE[4]),
)


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the content of synthetic.json to the PNG `path`."""
    with figure(path, columns=2, size=(10, 3.1), width_ratios=(1.4, 1)) as (_, (bars, latents)):
        _draw_recovery(bars, results)
        _draw_latents(latents, results["latents"])


def _draw_recovery(axes: Axes, results: dict[str, Any]) -> None:
    width = 0.8 / len(BARS)
    for place, (measure, label, colour) in enumerate(BARS):
        positions = np.arange(len(CODES)) + (place - (len(BARS) - 1) / 2) * width
        heights = [results[code][measure] or 0.0 for code in CODES]
        axes.bar(positions, heights, width * 0.92, color=colour, label=label)
    names = [f"{label}\n({_figure(results[code]['disentanglement'])})" for code, label in CODES.items()]
    axes.set_xticks(range(len(CODES)), names)
    axes.set_ylim(0, 1)
    axes.grid(visible=False, axis="x")
    axes.set_ylabel("correlation with matches")
    axes.set_title("Recovery of true features (disentanglement)")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_latents(axes: Axes, latents: dict[str, Any]) -> None:
    kinds, group = np.array(latents["kind"]), np.array(latents["group"])
    x = np.array([np.nan if value is None else value for value in latents["autocorrelation"]], float)
    y = np.array(latents["correlation"], float)
    for number, kind in enumerate(sorted(set(kinds.tolist()), key=lambda kind: (kind == "fast", kind))):
        for high in (True, False):
            chosen = (kinds == kind) & ((group == 0) == high)
            colour = PALETTE[number]
            where = "high-level" if high else "rest"
            axes.scatter(
                x[chosen],
                y[chosen],
                s=16,
                marker=MARKERS[number],
                facecolors=colour if high else "none",
                edgecolors=colour,
                linewidths=0.9,
                label=f"{kind.replace('_', ' ')}, {where}",
            )
    axes.set_xlabel("autocorrelation from token to token")
    axes.set_ylabel("best correlation")
    axes.set_title("Latents by the feature they are closest to")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
