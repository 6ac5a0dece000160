"""A figure for settings that were named one by one: a row for each, its measures with their intervals side by side."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from tsae import plotting
from tsae.config.points import shown
from tsae.report.axis import SweptAxis
from tsae.report.grids import EFFECTS, MOST_EFFECTS
from tsae.report.measures import label, shown_of
from tsae.report.summary import Group, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_ROWS = 40


def suits(summary: Summary, series: dict[str, list[Group]]) -> bool:
    """Whether the settings are a list: neither a grid nor drawn, which can be looked at one setting at a time."""
    if summary.compared.drawn:
        return False
    cells = math.prod(len({shown(group.value(key)) for group in summary.groups}) for key in summary.telling)
    return len(series) <= MOST_ROWS and len(summary.groups) < cells


def draw_forest(summary: Summary, series: dict[str, list[Group]], path: Path) -> str:
    """Write the figure: a panel for each measure, a colour for each swept value; returns its caption."""
    measures = shown_of(EFFECTS, summary.measures)[:MOST_EFFECTS]
    first = _first(summary)
    rows = sorted(series.values(), key=lambda members: first not in members)
    axis = SweptAxis(summary.x, [group.value(summary.x) for group in summary.groups])
    size = (2.5 * len(measures) + 2.6, 0.24 * len(rows) + 1.2)
    with plotting.figure(path, columns=len(measures), size=size, sharey=True) as (drawn, panels):
        for axes, measure in zip(panels, measures, strict=True):
            _panel(axes, rows, axis, measure)
            axes.set_xlabel(label(measure))
        panels[0].set_yticks(range(len(rows)), [_difference(summary, members[0]) for members in rows])
        panels[0].set_ylim(len(rows) - 0.5, -0.5)
        if len(axis.values) > 1:
            drawn.legend(*panels[0].get_legend_handles_labels(), title=axis.label, loc="outside right upper")
    return (
        f"Each row is one setting, named by what tells it from the first ({summary.name(first, summary.telling[1:])}); "
        "marks are means with their 95 % intervals."
    )


def _panel(axes: Axes, rows: list[list[Group]], axis: SweptAxis, measure: str) -> None:
    for number, value in enumerate(axis.values):
        name = shown(list(value) if isinstance(value, tuple) else value)
        members = [
            (row, group.interval(measure))
            for row, groups in enumerate(rows)
            for group in groups
            if shown(group.value(axis.key)) == name
        ]
        shift = 0.5 * ((number + 0.5) / len(axis.values) - 0.5)
        axes.errorbar(
            [mean for _, (mean, _) in members],
            [row + shift for row, _ in members],
            xerr=[0.0 if half != half else half for _, (_, half) in members],
            color=plotting.PALETTE[number % len(plotting.PALETTE)],
            marker=plotting.MARKERS[number % len(plotting.MARKERS)],
            markersize=4,
            markeredgecolor="white",
            markeredgewidth=0.5,
            elinewidth=1.0,
            linestyle="none",
            label=name,
        )


def _first(summary: Summary, like: Group | None = None) -> Group:
    """What others are named after: a group of the report's baseline, else the first; with the swept value of `like`."""
    wanted = dict(summary.compared.settings.baseline)
    if like is not None:
        wanted.setdefault(summary.x, like.value(summary.x))
    agreeing = (
        group
        for group in summary.groups
        if all(shown(group.value(key)) == shown(value) for key, value in wanted.items())
    )
    return next(agreeing, summary.groups[0] if like is None else _first(summary))


def _difference(summary: Summary, group: Group) -> str:
    """The settings that were given, for one of the two, and differ; what only follows from a preset is left out."""
    first = _first(summary, group)
    given = dict.fromkeys([*group.axes, *first.axes])
    keys = [key for key in given if key != summary.x and shown(group.value(key)) != shown(first.value(key))]
    own = [key for key in summary.compared.settings.baseline if key in summary.telling and key != summary.x]
    return summary.name(group, keys) or summary.name(group, own) or "(the first)"
