"""Figures for sweeps of several settings: heat maps of two, and each setting's effect where there are more."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axis import SweptAxis
from measures import Chart, figures, label
from points import short_names
from summary import Group, Summary
from sweepfile import shown

from tsae import plotting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_NUMBERED_CELLS = 80
EFFECTS = (
    "frac_variance_explained",
    "lipschitz_cont_h",
    "truth_disentanglement",
    "truth_slow",
    "probing_chunk0/semantics",
    "frac_alive",
)
"""Rows of the figure of effects, where a sweep has them."""
MOST_EFFECTS, MOST_SETTINGS = 4, 6


def draw_heat_map(summary: Summary, chart: Chart, lines: list[tuple[str, str]], path: Path) -> None:
    """One panel for each measure of `chart`: the swept value against the second one, other settings averaged."""
    x, y = (SweptAxis(key, [group.value(key) for group in summary.groups]) for key in summary.telling[:2])
    size = (max(3.4, 0.5 * len(x.values) + 1.6) * len(lines), max(2.8, 0.34 * len(y.values) + 1.3))
    with plotting.figure(path, columns=len(lines), size=size) as (_, panels):
        for axes, (measure, name) in zip(panels, lines, strict=True):
            _heat_map(axes, summary, measure, x, y)
            axes.set_title(f"{chart.title}: {name}" if len(lines) > 1 else chart.title)


def _heat_map(axes: Axes, summary: Summary, measure: str, x: SweptAxis, y: SweptAxis) -> None:
    cells = [[_mean(_chosen(summary, {x.key: a, y.key: b}), measure) for a in x.values] for b in y.values]
    image = axes.imshow(cells, cmap="viridis", aspect="auto", origin="lower")
    axes.grid(visible=False)
    for ticks, axis in ((axes.set_xticks, x), (axes.set_yticks, y)):
        ticks(range(len(axis.values)), [shown(_as_setting(value)) for value in axis.values])
    axes.set_xlabel(x.label)
    axes.set_ylabel(y.label)
    assert axes.figure is not None
    axes.figure.colorbar(image, ax=axes, shrink=0.9)
    if len(x.values) * len(y.values) <= MOST_NUMBERED_CELLS:
        known = [value for row in cells for value in row if value == value]
        middle = (min(known) + max(known)) / 2 if known else 0.0
        for j, row in enumerate(cells):
            for i, value in enumerate(row):
                colour = "white" if value < middle else "black"
                axes.text(i, j, figures(value, 2), ha="center", va="center", fontsize=7, color=colour)


def draw_effects(summary: Summary, path: Path) -> None:
    """A panel for each measure and setting: every group as a dot, and the mean over the groups that share a value."""
    measures = [name for name in EFFECTS if name in summary.measures][:MOST_EFFECTS]
    keys = summary.telling[:MOST_SETTINGS]
    size = (2.6 * len(keys) + 0.6, 2.1 * len(measures) + 0.4)
    with plotting.figure(path, len(measures), len(keys), size=size, sharey="row") as (_, panels):
        for index, axes in enumerate(panels):
            row, column = divmod(index, len(keys))
            _effect(axes, summary, measures[row], keys[column])
            if column == 0:
                axes.set_ylabel(label(measures[row]))
            if row < len(measures) - 1:
                axes.set_xlabel("")


def _effect(axes: Axes, summary: Summary, measure: str, key: str) -> None:
    axis = SweptAxis(key, [group.value(key) for group in summary.groups])
    dots = [(axis.position(group.value(key)), group.interval(measure)[0]) for group in summary.groups]
    axes.plot(*zip(*dots, strict=True), linestyle="none", marker="o", markersize=2.6, color="#9A9A9A", alpha=0.5)
    means = [(axis.position(value), _mean(_chosen(summary, {key: value}), measure)) for value in axis.values]
    line = "-" if axis.is_ordered else "none"
    axes.plot(*zip(*means, strict=True), linestyle=line, marker="D", color=plotting.PALETTE[0], markeredgecolor="white")
    axis.apply(axes)


def _chosen(summary: Summary, values: dict[str, Any]) -> list[Group]:
    return [
        group
        for group in summary.groups
        if all(shown(group.value(key)) == shown(_as_setting(value)) for key, value in values.items())
    ]


def _as_setting(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _mean(groups: list[Group], measure: str) -> float:
    """Mean over groups that have the measure; NaN without any."""
    found = [mean for group in groups if not math.isnan(mean := group.interval(measure)[0])]
    return sum(found) / len(found) if found else math.nan


def effects_caption(summary: Summary) -> str:
    """What the figure of effects shows."""
    names = short_names(summary.telling)
    return (
        f"{len(summary.groups)} settings: each grey dot is one of them, each diamond the mean over those that share a value "
        f"of {', '.join(names[key].replace('_', ' ') for key in summary.telling[:MOST_SETTINGS])}."
    )
