"""The picture and the table of `tsae align`."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tsae import plotting
from tsae.runtime import files, tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BARS = 16
COLOURS = {
    "beyond length": plotting.PALETTE[0],
    "length-driven": plotting.PALETTE[1],
    "undecided": plotting.PALETTE[4],
    "not significant": "#B5B5B5",
}


def draw_figure(results: dict[str, Any], path: Path) -> None:
    """The largest differences; effect against correlation with length; and two latents pair by pair."""
    rows = results["table"][:BARS]
    with plotting.figure(path, 1, 3, (12.5, 4.8), gridspec_kw={"width_ratios": [1.25, 1, 1]}) as (drawn, axes):
        if results["about_the_pairs"]:
            drawn.supxlabel(f"These pairs are {results['about_the_pairs']}.", fontsize=8, color="#555555")
        _draw_differences(axes[0], rows, results)
        _draw_effects(axes[1], results)
        _draw_pairs(axes[2], results["scatter"])
        axes[2].set_title(f"Pair by pair ({results['pairs']})")


def write_table(results: dict[str, Any], path: Path) -> None:
    """The table without its examples, as CSV."""
    names = [name for name in (results["table"] or [{}])[0] if name != "examples"]
    rows = ([row.get(name, "") for name in names] for row in results["table"])
    files.write_text(path, tables.as_csv([names, *rows]))


def _draw_differences(axes: Axes, rows: list[dict[str, Any]], results: dict[str, Any]) -> None:
    rows = sorted(rows, key=lambda row: row["mean_difference"])
    for place, row in enumerate(rows):
        axes.barh(place, row["mean_difference"], color=COLOURS[row["label"]], height=0.72)
        axes.plot([row["low"], row["high"]], [place, place], color="#222222", linewidth=1)
    axes.set_yticks(range(len(rows)), [_name(row) for row in rows], fontsize=7)
    axes.axvline(0, color="#666666", linewidth=0.8)
    axes.set_xlabel("mean activation on responses, rejected − chosen")
    about = results["subject"]
    axes.set_title(f"{about['run']}, {results['split']}: largest differences")
    shown = [label for label in COLOURS if any(row["label"] == label for row in rows)]
    for label in shown:
        axes.barh([np.nan], [np.nan], color=COLOURS[label], label=label)
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.12), ncols=3, handlelength=1, columnspacing=1)


def _draw_effects(axes: Axes, results: dict[str, Any]) -> None:
    latents = [row.split(maxsplit=6) for row in results["all_tested"]["rows"]]
    for label in reversed(COLOURS):
        own = [(float(row[4]), float(row[2])) for row in latents if row[6] == label]
        if own:
            x, y = zip(*own, strict=True)
            axes.scatter(x, y, s=9, color=COLOURS[label], linewidth=0, alpha=0.7, label=f"{label} ({len(own)})")
    axes.axhline(0, color="#666666", linewidth=0.8)
    axes.axvline(0, color="#666666", linewidth=0.8)
    axes.set_xlabel("correlation with the length difference")
    axes.set_ylabel("effect size (mean / standard deviation)")
    lengths = results["response_tokens"]
    sides = ", ".join(f"{side} {lengths[side]:.1f}" for side in ("rejected", "chosen"))
    axes.set_title(f"Tokens: {sides}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, handletextpad=0.1, columnspacing=0.8)


def _draw_pairs(axes: Axes, scatter: list[dict[str, Any]]) -> None:
    for series, shown in enumerate(scatter):
        x = np.array(shown["length_difference"].split(), float)
        y = np.array(shown["difference"].split(), float)
        colour = COLOURS[shown["label"]]
        label = f"latent {shown['latent']}, {shown['label']}"
        axes.scatter(x, y, s=7, marker=plotting.MARKERS[series], color=colour, alpha=0.35, linewidth=0, label=label)
        if len(np.unique(x)) > 2:
            low, high = np.quantile(x, [0.02, 0.98]).tolist()
            at = np.linspace(low, high, 50)
            axes.plot(at, np.polyval(np.polyfit(x, y, 2), at), color=colour)
    axes.axhline(0, color="#666666", linewidth=0.8)
    axes.axvline(0, color="#666666", linewidth=0.8)
    axes.set_xlabel("response length in tokens, rejected − chosen")
    axes.set_ylabel("difference of the pair")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), markerscale=2, handletextpad=0.1)


def _name(row: dict[str, Any]) -> str:
    explanation = textwrap.shorten(row["explanation"] or "", 38, placeholder="…")
    return f"{explanation} ({row['latent']})" if explanation else str(row["latent"])
