"""Trade-offs: one measure against another, and the settings that no other setting beats in both."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tsae import plotting
from tsae.config.points import shown
from tsae.report.axis import SweptAxis
from tsae.report.measures import Chart, label, shown_of
from tsae.report.summary import Group, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize

COLOURS = "viridis"
MOST_NAMED = 10
MOST_WITH_INTERVALS = 40
LEAST_GROUPS = 3


class TradeOff(NamedTuple):
    """Two measures, and which way each is better."""

    x: str
    y: str
    x_sign: int
    """1: more of `x` is better, -1: less."""


TRADE_OFFS = (
    TradeOff("lipschitz_cont_h", "frac_variance_explained", -1),
    TradeOff("probing_chunk0/semantics", "frac_variance_explained", 1),
    TradeOff("truth_disentanglement", "frac_variance_explained", 1),
)


def draw_trade_offs(summary: Summary, folder: Path) -> list[tuple[Chart, Path]]:
    """Write a figure of every trade-off that at least three groups have both measures of."""
    pairs = [TradeOff(pair.x, y, pair.x_sign) for pair in TRADE_OFFS for y in shown_of([pair.y], summary.measures)]
    known = [(pair, groups) for pair in pairs if len(groups := _with_both(summary, pair)) >= LEAST_GROUPS]
    if not known:
        return []
    from matplotlib.cm import ScalarMappable

    path = folder / "trade_offs.png"
    axis = SweptAxis(summary.x, [group.value(summary.x) for group in summary.groups])
    named = len(known[0][1]) <= MOST_NAMED
    with plotting.figure(path, columns=len(known), size=(4.6 * len(known), 3.5)) as (drawn, panels):
        for axes, (pair, groups) in zip(panels, known, strict=True):
            _draw(axes, summary, pair, groups, axis)
        if axis.is_ordered and _is_crowded(axis):
            drawn.colorbar(ScalarMappable(_norm(axis), COLOURS), ax=panels, label=axis.label, shrink=0.9)
        elif not named and not _is_crowded(axis):
            drawn.legend(*panels[0].get_legend_handles_labels(), title=axis.label, loc="outside right upper")
    intervals = " with its 95 % intervals" if len(summary.groups) <= MOST_WITH_INTERVALS else ""
    own = ", for each kind of activations by itself" if len(summary.worlds(known[0][1])) > 1 else ""
    text = (
        f"Each mark is one setting{intervals}; the step line joins those that no other setting beats in both measures{own}. "
        "Smoothness: to the left is better; elsewhere to the right. Up is better."
    )
    return [(Chart("trade_offs", "Trade-offs", "", (), text), path)]


def front(points: list[tuple[float, float]], x_sign: int) -> list[tuple[float, float]]:
    """The points that none beats in both coordinates, from the worst x to the best; y: more is better."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (-x_sign * point[0], -point[1])):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return best[::-1]


def _with_both(summary: Summary, pair: TradeOff) -> list[Group]:
    return [
        group
        for group in summary.groups
        if not any(math.isnan(group.interval(measure)[0]) for measure in (pair.x, pair.y))
    ]


def _draw(axes: Axes, summary: Summary, pair: TradeOff, groups: list[Group], axis: SweptAxis) -> None:
    few = len(groups) <= MOST_WITH_INTERVALS
    places, labelled = [], set()
    for group in groups:
        (x, x_half), (y, y_half) = group.interval(pair.x), group.interval(pair.y)
        places.append((x, y))
        name = shown(group.value(summary.x))
        axes.errorbar(
            x,
            y,
            xerr=x_half if few and x_half == x_half else None,
            yerr=y_half if few and y_half == y_half else None,
            **_look(axis, group.value(summary.x)),
            markersize=5 if few else 4,
            markeredgecolor="white",
            markeredgewidth=0.5,
            elinewidth=0.8,
            linestyle="none",
            label=None if name in labelled else name,
        )
        labelled.add(name)
    where: Literal["post", "pre"] = "post" if pair.x_sign > 0 else "pre"
    for alike in summary.worlds(groups).values():
        best = front([place for group, place in zip(groups, places, strict=True) if group in alike], pair.x_sign)
        axes.step(*zip(*best, strict=True), where=where, color="#555555", linewidth=1.1, zorder=1)
    if len(groups) <= MOST_NAMED:
        for group, place in zip(groups, places, strict=True):
            name = summary.name(group, summary.telling)
            axes.annotate(name, place, xytext=(5, 4), textcoords="offset points", fontsize=7, color="#333333")
    axes.set_xlabel(f"{label(pair.x)} ({'more' if pair.x_sign > 0 else 'less'} is better)")
    axes.set_ylabel(label(pair.y))
    axes.locator_params(axis="x", nbins=6)
    axes.margins(0.12)


def _is_crowded(axis: SweptAxis) -> bool:
    """Whether the swept setting has more values than there are colours that can be told apart."""
    return len(axis.values) > len(plotting.PALETTE)


def _look(axis: SweptAxis, value: Any) -> dict[str, Any]:
    """Colour and marker of a swept value."""
    import matplotlib

    if not _is_crowded(axis):
        names = [shown(list(v) if isinstance(v, tuple) else v) for v in axis.values]
        number = names.index(shown(value))
        return {"color": plotting.PALETTE[number], "marker": plotting.MARKERS[number]}
    if axis.is_ordered:
        share = float(_norm(axis)(axis.position(value)))
        return {"color": matplotlib.colormaps[COLOURS](share), "marker": "o"}
    return {"color": plotting.PALETTE[0], "marker": "o"}


def _norm(axis: SweptAxis) -> Normalize:
    """Swept values as shares of the colour scale."""
    from matplotlib.colors import LogNorm, Normalize

    ends = [axis.position(value) for value in axis.values]
    return (LogNorm if axis.scale == "log" else Normalize)(min(ends), max(ends))
