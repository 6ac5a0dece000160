"""The report's figures: measures against the swept value, with intervals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measures import CHARTS, Chart
from points import short_names
from summary import Group, Summary
from sweepfile import shown

from tsae import plotting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDE_RATIO = 20.0
"""Swept values that span more than this factor are spread evenly or logarithmically."""
MOST_TICKS = 10
LONG_LABEL = 32
"""Characters of a legend's entry that leave too little room for the axes beside it."""


class SweptAxis:
    """Where the swept values stand on the horizontal axis."""

    def __init__(self, key: str, values: list[Any]) -> None:
        self.key = key
        self.values = list(dict.fromkeys(tuple(v) if isinstance(v, list) else v for v in values))
        numbers = [v for v in self.values if isinstance(v, (int, float)) and not isinstance(v, bool)]
        self.scale = "category"
        if len(numbers) == len(self.values) > 1:
            self.values.sort()
            smallest = min((abs(v) for v in numbers if v), default=1.0)
            wide = max(numbers) / smallest > WIDE_RATIO
            self.scale = "linear" if not wide else "log" if min(numbers) > 0 else "category"

    def position(self, value: Any) -> float:
        """Where `value` stands."""
        value = tuple(value) if isinstance(value, list) else value
        return float(self.values.index(value)) if self.scale == "category" else float(value)

    @property
    def is_ordered(self) -> bool:
        """Whether a line between neighbours means something."""
        return all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in self.values)

    def apply(self, axes: Axes) -> None:
        """Set scale, ticks and label of `axes`."""
        if self.scale == "log":
            axes.set_xscale("log")
        if len(self.values) <= MOST_TICKS:
            labels = [shown(value) for value in self.values]
            long = max(map(len, labels)) * len(labels) > 44
            axes.set_xticks([self.position(v) for v in self.values], labels, rotation=30 if long else 0)
            axes.minorticks_off()
        if self.scale == "category":
            axes.set_xlim(-0.5, len(self.values) - 0.5)
            axes.grid(visible=False, axis="x")
        axes.set_xlabel(short_names([self.key])[self.key].replace("_", " "))


def draw_charts(summary: Summary, folder: Path) -> list[tuple[Chart, Path]]:
    """Write every chart that has data as a PNG into `folder`."""
    axis = SweptAxis(summary.x, [row.point.value(summary.x) for row in summary.rows])
    series = series_of(summary)
    drawn = []
    for chart in CHARTS:
        known = [line for line in chart.lines if line[0] in summary.measures]
        if known:
            path = folder / f"{chart.name}.png"
            _draw(chart, known, axis, series, path)
            drawn.append((chart, path))
    return drawn


def series_of(summary: Summary) -> dict[str, list[Group]]:
    """Groups that differ in the swept value alone, by what they share (with one series, that is nothing)."""
    keys = dict.fromkeys(key for group in summary.groups for key in group.axes if key != summary.x)
    telling: list[str] = []
    for key in keys:
        # A value that follows from those named already would only make the names longer.
        if _distinct(summary, [*telling, key]) > _distinct(summary, telling):
            telling.append(key)
    short = short_names([*keys, summary.x])
    series: dict[str, list[Group]] = {}
    for group in summary.groups:
        name = ", ".join(f"{short[key].replace('_', ' ')} {shown(group.value(key))}" for key in telling)
        series.setdefault(name, []).append(group)
    return series


def _distinct(summary: Summary, keys: list[str]) -> int:
    """How many groups of points the swept value and `keys` tell apart."""
    return len({tuple(shown(group.value(key)) for key in (summary.x, *keys)) for group in summary.groups})


def _draw(
    chart: Chart, lines: list[tuple[str, str]], axis: SweptAxis, series: dict[str, list[Group]], path: Path
) -> None:
    """One panel with a line for each measure; with several series, one panel for each measure."""
    if len(series) == 1:
        panels = [(chart.title, [(label, groups, measure) for groups in series.values() for measure, label in lines])]
    else:
        panels = [
            (f"{chart.title}: {label}", [(name, groups, measure) for name, groups in series.items()])
            for measure, label in lines
        ]
    labels = [label for label, _, _ in panels[0][1]]
    below = len(labels) > 1 and max(map(len, labels)) > LONG_LABEL
    width = 4.4 if len(panels) == 1 else 3.4 * len(panels)
    size = (width, 2.9 + (0.19 * len(labels) if below else 0.0))
    with plotting.figure(path, columns=len(panels), size=size, sharey=True) as (drawn, all_axes):
        for axes, (title, curves) in zip(all_axes, panels, strict=True):
            for number, (label, groups, measure) in enumerate(curves):
                _curve(axes, axis, groups, measure, number, len(curves), label)
            axes.set_title(title)
            axis.apply(axes)
            axes.margins(y=0.12)
        all_axes[0].set_ylabel(chart.axis)
        if below:
            drawn.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower left")
        elif len(labels) > 1:
            all_axes[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _curve(
    axes: Axes, axis: SweptAxis, groups: list[Group], measure: str, number: int, curves: int, label: str
) -> None:
    at = sorted((axis.position(group.value(axis.key)), group.interval(measure)) for group in groups)
    if all(math.isnan(mean) for _, (mean, _) in at):
        return
    # Side by side where several series share a category, so that intervals do not hide each other.
    shift = 0.0 if axis.is_ordered else min(0.12, 0.8 / curves) * (number - (curves - 1) / 2)
    plotting.draw_interval(
        axes,
        [position + shift for position, _ in at],
        [mean for _, (mean, _) in at],
        [half for _, (_, half) in at],
        series=number,
        label=label,
        connected=axis.is_ordered,
    )
