"""The picture of `tsae steer`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsae import plotting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METHODS = ("latent", "random latent", "difference of means")


def draw_figure(results: dict[str, Any], path: Path) -> None:
    """Success against coherence, both against the strength, and the usable strengths of each concept."""
    kind = results["curves"][0]["kind"]
    curves = [curve for curve in results["curves"] if curve["kind"] == kind]
    with plotting.figure(path, 2, 2, (9.5, 7.2)) as (_, axes):
        _draw_front(axes[0], curves, results)
        _draw_usable(axes[1], curves, results)
        for place, measure in ((2, "success"), (3, "coherence")):
            _draw_measure(axes[place], curves, measure, results)


def _draw_front(axes: Axes, curves: list[dict[str, Any]], results: dict[str, Any]) -> None:
    """One line per method in the order of the strengths; the points on its Pareto front are filled."""
    for curve in curves:
        series, points = METHODS.index(curve["method"]), curve["points"]
        colour, marker = plotting.PALETTE[series], plotting.MARKERS[series]
        x = [point["success"]["mean"] for point in points]
        y = [point["coherence"]["mean"] for point in points]
        axes.plot(x, y, color=colour, linewidth=1, alpha=0.7)
        for point, at in zip(points, zip(x, y, strict=True), strict=True):
            fill = colour if point["on_front"] else "white"
            axes.plot(*at, marker=marker, color=colour, markerfacecolor=fill, linestyle="none")
            if series == 0:
                axes.annotate(f"{point[curve['kind']]:g}", at, xytext=(4, 4), textcoords="offset points", fontsize=7)
        axes.plot([], [], color=colour, marker=marker, label=f"{curve['method']} ({curve['area']:.2f})")
    control = results["control"]
    mean = sum(control["success"]) / len(control["success"])
    axes.plot(
        mean, control["coherence"], marker="*", markersize=11, color="#222222", linestyle="none", label="unsteered"
    )
    axes.axvline(results["settings"]["success"], color="#999999", linewidth=0.8, linestyle=":")
    axes.axhline(results["settings"]["coherence"], color="#999999", linewidth=0.8, linestyle=":")
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("success: probability of the concept")
    axes.set_ylabel("coherence")
    about = results["subject"]
    axes.set_title(f"{about['run']}, {results['split']}, {results['settings']['mode']}: Pareto fronts (area)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, columnspacing=1)


def _draw_measure(axes: Axes, curves: list[dict[str, Any]], measure: str, results: dict[str, Any]) -> None:
    for curve in curves:
        found = [point[measure] for point in curve["points"]]
        half = [(entry["high"] - entry["low"]) / 2 if entry["low"] is not None else float("nan") for entry in found]
        plotting.draw_interval(
            axes,
            [point[curve["kind"]] for point in curve["points"]],
            [entry["mean"] for entry in found],
            half,
            series=METHODS.index(curve["method"]),
        )
    _set_strengths(axes, curves)
    axes.axhline(results["settings"][measure], color="#999999", linewidth=0.8, linestyle=":")
    axes.set_ylim(0, 1.02)
    axes.set_title(measure.capitalize() + ", 95 % intervals over concepts")


def _draw_usable(axes: Axes, curves: list[dict[str, Any]], results: dict[str, Any]) -> None:
    """One bar per concept and method from the first to the last usable strength."""
    concepts = results["concepts"]
    for curve in curves:
        series = METHODS.index(curve["method"])
        for row, interval in enumerate(curve["usable"]["by_concept"]):
            if interval is not None:
                height = -row - 0.22 * (series - 1)
                axes.plot(
                    interval, [height, height], color=plotting.PALETTE[series], linewidth=3.2, solid_capstyle="butt"
                )
                axes.plot(interval, [height, height], color=plotting.PALETTE[series], marker="|", linestyle="none")
    names = [f"{concept['concept']} ({concept['latent']})" for concept in concepts]
    axes.set_yticks([-row for row in range(len(names))], names)
    axes.set_ylim(-len(names) + 0.5, 0.5)
    _set_strengths(axes, curves)
    axes.set_title("Usable strengths: success and coherence")


def _set_strengths(axes: Axes, curves: list[dict[str, Any]]) -> None:
    kind = curves[0]["kind"]
    strengths = sorted({point[kind] for curve in curves for point in curve["points"] if point[kind] > 0})
    axes.set_xscale("log")
    axes.set_xticks(strengths, [f"{strength:g}" for strength in strengths])
    axes.set_xticks([], minor=True)
    axes.set_xlim(strengths[0] / 1.25, strengths[-1] * 1.25)
    axes.set_xlabel("strength / 99.9th percentile of the latent" if kind == "multiple" else "strength")
