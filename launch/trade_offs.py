"""Trade-offs: one measure against another, and the settings that no other setting beats in both."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from axis import SweptAxis
from measures import Chart, label
from points import short_names
from summary import Group, Summary
from sweepfile import shown

from tsae import plotting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_NAMED = 10
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
    known = [(pair, groups) for pair in TRADE_OFFS if len(groups := _with_both(summary, pair)) >= LEAST_GROUPS]
    if not known:
        return []
    path = folder / "trade_offs.png"
    with plotting.figure(path, columns=len(known), size=(4.6 * len(known), 3.5)) as (_, panels):
        for axes, (pair, groups) in zip(panels, known, strict=True):
            _draw(axes, summary, pair, groups)
    text = (
        "Each mark is one setting with its 95 % intervals; the step line joins those that no other setting beats in both "
        "measures. Smoothness: to the left is better; elsewhere to the right. Up is better."
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


def _draw(axes: Axes, summary: Summary, pair: TradeOff, groups: list[Group]) -> None:
    colours = _colours(summary, groups)
    places = []
    for group in groups:
        (x, x_half), (y, y_half) = group.interval(pair.x), group.interval(pair.y)
        places.append((x, y))
        number = colours.get(shown(group.value(summary.x)), 0)
        few = len(groups) <= 4 * MOST_NAMED
        axes.errorbar(
            x,
            y,
            xerr=x_half if few and x_half == x_half else None,
            yerr=y_half if few and y_half == y_half else None,
            color=plotting.PALETTE[number % len(plotting.PALETTE)],
            marker=plotting.MARKERS[number % len(plotting.MARKERS)],
            markersize=5 if few else 3,
            markeredgecolor="white",
            markeredgewidth=0.5,
            elinewidth=0.8,
            linestyle="none",
        )
    best = front(places, pair.x_sign)
    axes.step(
        *zip(*best, strict=True), where="post" if pair.x_sign > 0 else "pre", color="#777777", linewidth=0.9, zorder=0
    )
    if len(groups) <= MOST_NAMED:
        short = short_names(summary.telling)
        for group, place in zip(groups, places, strict=True):
            name = ", ".join(f"{short[key].replace('_', ' ')} {shown(group.value(key))}" for key in summary.telling)
            axes.annotate(name, place, xytext=(5, 4), textcoords="offset points", fontsize=7, color="#333333")
    elif colours:
        for value, number in colours.items():
            marker = plotting.MARKERS[number % len(plotting.MARKERS)]
            axes.plot([], [], marker=marker, linestyle="none", color=plotting.PALETTE[number], label=value)
        axes.legend(title=SweptAxis(summary.x, []).label, loc="best", fontsize=7, title_fontsize=7)
    axes.set_xlabel(f"{label(pair.x)} ({'more' if pair.x_sign > 0 else 'less'} is better)")
    axes.set_ylabel(label(pair.y))
    axes.margins(0.12)


def _colours(summary: Summary, groups: list[Group]) -> dict[str, int]:
    """Swept value → number of its colour; nothing where there are more values than colours."""
    values = list(dict.fromkeys(shown(group.value(summary.x)) for group in groups))
    return {value: number for number, value in enumerate(values)} if len(values) <= len(plotting.PALETTE) else {}
