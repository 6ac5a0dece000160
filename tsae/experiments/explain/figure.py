"""The picture of `tsae explain`: scores by firing rate, and their distribution over latents."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsae import plotting
from tsae.experiments.explain.scores import BIN_EDGES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SERIES = {"high": "high-level split", "low": "low-level split", "all": "all latents"}
FEWEST = 3
"""Latents of a stratum without which its mean is left out; the interval of two is wider than the figure."""


def draw(results: dict[str, Any], path: Path) -> None:
    """Detection and fuzzing against the firing rate, and the share of latents that reach each detection score."""
    splits = ["high", "low"] if "high" in results["detection"] else ["all"]
    with plotting.figure(path, 1, 3, (10.2, 3.1)) as (figure, axes):
        for scorer, panel in zip(("detection", "fuzzing"), axes, strict=False):
            _by_rate(panel, results, scorer, splits)
        _distribution(axes[2], results["detection"]["histogram"], splits)
        figure.suptitle(_title(results), x=0.01, ha="left", fontsize=9, color="#444444")


def _title(results: dict[str, Any]) -> str:
    latents, subject = results["latents"], results["subject"]
    return (
        f"{subject['run']} ({subject['dict_class']}), {latents['scored']} of {latents['all']} latents, "
        f"explained by {results['explained_by']}"
    )


def _by_rate(axes: Axes, results: dict[str, Any], scorer: str, splits: list[str]) -> None:
    strata = list(dict.fromkeys(entry["stratum"] for entry in results["by_rate"] if entry["split"] in splits))
    strata.sort(key=lambda name: float(name.split()[0]))
    for series, split in enumerate(splits):
        found = {entry["stratum"]: entry[scorer] for entry in results["by_rate"] if entry["split"] == split}
        there = [index for index, name in enumerate(strata) if found.get(name, {}).get("latents", 0) >= FEWEST]
        shift = 0.08 * (series - (len(splits) - 1) / 2)
        plotting.draw_interval(
            axes,
            [index + shift for index in there],
            [found[strata[index]]["mean"] for index in there],
            [_half(found[strata[index]]) for index in there],
            series=series,
            label=SERIES[split],
        )
    axes.axhline(results["chance"], color="#888888", linewidth=1.0, linestyle="--")
    axes.text(-0.35, results["chance"] + 0.008, "chance", fontsize=7.5, color="#666666")
    axes.set_ylim(0.35, 1.02)
    axes.set_xlim(-0.4, len(strata) - 0.6)
    axes.set_xticks(range(len(strata)), [_edge(name) for name in strata])
    axes.set_xlabel("firing rate (share of tokens)")
    axes.set_ylabel("balanced accuracy")
    axes.set_title(scorer.capitalize())
    axes.legend(loc="lower left")


def _half(entry: dict[str, Any]) -> float:
    return float("nan") if entry["half_width_95"] is None else float(entry["half_width_95"])


def _edge(name: str) -> str:
    """`0.001 to 0.01` as a tick label."""
    low, _, high = name.partition(" to ")
    return f"< {high}" if float(low) == 0 else f"> {low}" if float(high) == 1 else f"{low}–\n{high}"


def _distribution(axes: Axes, histogram: dict[str, list[int]], splits: list[str]) -> None:
    for series, split in enumerate(splits):
        counts, total = histogram[split], max(1, sum(histogram[split]))
        axes.stairs(
            [count / total for count in counts],
            BIN_EDGES,
            color=plotting.PALETTE[series],
            linewidth=1.6,
            label=f"{SERIES[split]} (n = {sum(counts)})",
        )
    axes.axvline(0.5, color="#888888", linewidth=1.0, linestyle="--")
    axes.set_xlim(0.2, 1.03)
    axes.set_xlabel("detection score of a latent")
    axes.set_ylabel("share of latents")
    axes.set_title("Distribution")
    axes.set_ylim(0, 1.45 * axes.get_ylim()[1])
    axes.legend(loc="upper left")
