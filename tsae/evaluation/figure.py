"""eval_results.png: one glance at how well a dictionary reconstructs, how smooth its splits are, how often latents fire."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tsae.evaluation.measures import FVE
from tsae.plotting import PALETTE, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SPLITS = (("all", PALETTE[6]), ("high-level", PALETTE[0]), ("low-level", PALETTE[1]))
MEASURES = {
    "lipschitz_cont": "Lipschitz",
    "fft": "FFT",
    "wavelet": "wavelet",
    "multiscale": "multiscale",
    "relative_tv": "rel. variation",
}


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the content of eval_results.json to the PNG `path`."""
    with figure(path, columns=3, size=(11, 2.9), width_ratios=(1, 2, 1.3)) as (drawn, (explained, smooth, firing)):
        drawn.set_layout_engine("constrained", wspace=0.06)
        _draw_explained(explained, results)
        _draw_smoothness(smooth, results)
        _draw_firing(firing, results)


def _draw_explained(axes: Axes, results: dict[str, Any]) -> None:
    """Pooled FVE of the whole code and of each split alone, and the recovered loss, with intervals."""
    name = f"{FVE}_pooled"
    bars = [(name, "all", 0), (f"{name}_high", "high\nonly", 1), (f"{name}_low", "low\nonly", 2)]
    if "frac_recovered" in results:
        bars.append(("frac_recovered", "CE\nrecovered", 0))
    bars = [bar for bar in bars if results[bar[0]] is not None]
    names = [name for name, _, _ in bars]
    values, errors = _numbers(results, names), np.nan_to_num(_numbers(results["half_width_95"], names))
    colours = [SPLITS[split][1] for _, _, split in bars]
    axes.bar(range(len(bars)), values, yerr=errors, color=colours, width=0.7, capsize=2.5, error_kw={"elinewidth": 1.1})
    for position, (value, error) in enumerate(zip(values, errors, strict=True)):
        axes.annotate(
            f"{value:.2f}",
            (position, max(value + error, 0)),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    axes.set_xticks(range(len(bars)), [label for _, label, _ in bars])
    lowest = min(value - error for value, error in zip(values, errors, strict=True))
    axes.set_ylim(min(0.0, 1.1 * lowest), 1.12 * max(1.0, *values))
    axes.axhline(0, color="#666666", linewidth=0.8)
    axes.grid(visible=False, axis="x")
    axes.set_title("Explained and recovered")


def _draw_smoothness(axes: Axes, results: dict[str, Any]) -> None:
    """Each measure of each split over the measure of all latents (whose value stands below the name), or, without
    splits, the values themselves."""
    whole = _numbers(results, [f"{name}_tot" for name in MEASURES])
    several = len(results["group_sizes"]) > 1
    scale, width = (whole, 0.25) if several else (np.ones_like(whole), 0.6)
    for place, (suffix, (label, colour)) in enumerate(zip(("tot", "h", "l"), SPLITS, strict=True)):
        if place and not several:
            break
        names = [f"{name}_{suffix}" for name in MEASURES]
        positions = np.arange(len(names)) + (place - 1) * 0.27 * several
        ratio = _numbers(results, names) / scale
        error = np.nan_to_num(_numbers(results["half_width_95"], names) / scale)
        axes.bar(
            positions, ratio, width, yerr=error, color=colour, label=label, capsize=2, error_kw={"elinewidth": 1.0}
        )
    labels = [f"{label}\n({value:.3g})" for label, value in zip(MEASURES.values(), whole, strict=True)]
    axes.set_xticks(range(len(labels)), labels)
    axes.grid(visible=False, axis="x")
    axes.set_title("Smoothness (smaller is smoother)")
    if several:
        axes.set_ylabel("relative to all latents")
        axes.margins(y=0.22)
        axes.legend(ncols=3, loc="upper right")


def _numbers(results: dict[str, Any], names: list[str]) -> np.ndarray:
    """Values of `results` with NaN for null."""
    return np.array([np.nan if results[name] is None else results[name] for name in names])


def _draw_firing(axes: Axes, results: dict[str, Any]) -> None:
    """Histogram of the share of tokens on which each latent fires, high-level and low-level."""
    rates = results["firing_rates"]
    groups = np.array(rates["latents_group"])
    edges = 10.0 ** np.array(rates["log10_edges"])
    alive, several = results["frac_alive"], len(groups) > 1
    parts = [groups[0], groups[1:].sum(0)] if several else [groups.sum(0)]
    for counts, (label, colour) in zip(parts, SPLITS[1:] if several else SPLITS[:1], strict=True):
        axes.stairs(counts, edges, fill=True, color=colour, alpha=0.45)
        axes.stairs(counts, edges, color=colour, linewidth=1.3, label=label)
    axes.set_xscale("log")
    used = np.flatnonzero(groups.sum(0))
    if len(used):
        axes.set_xlim(edges[max(used[0] - 1, 0)], edges[min(used[-1] + 2, len(edges) - 1)])
    axes.set_xlabel("share of tokens on which a latent fires")
    axes.set_ylabel("latents")
    axes.set_title(f"Firing rates ({alive:.0%} alive)")
    axes.legend()
