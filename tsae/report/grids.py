"""Figures of sweeps over several settings: heat maps of two, a row for each that was named, the effect of each of many.

`SweptAxis` is where the values of one setting stand, in these and in all other figures.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsae import plotting
from tsae.config.points import short_names, shown
from tsae.evaluation.measures import label
from tsae.report.summary import Group, Summary
from tsae.report.text import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDE_RATIO = 20.0
"""Swept values that span more than this factor are spread evenly or logarithmically."""
MOST_TICKS = 10
MOST_NUMBERED_CELLS = 80
MOST_CELL_NAMES = 12
LARGEST_PANEL = (5.2, 4.6)
"""Inches of a heat map, however many cells it has: a larger picture would be shrunk until its labels vanish."""
MOST_LEVELS, BINS = 12, 8
"""Ordered values above which an effect is the mean over so many bins of equal counts."""
MOST_PAIRED = 30
MOST_EFFECTS, MOST_SETTINGS = 4, 6
MOST_ROWS = 40


class SweptAxis:
    """The values of one swept setting, in the order and on the scale in which they are drawn."""

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
    def label(self) -> str:
        """The setting's name for people."""
        return short_names([self.key])[self.key].replace("_", " ")

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
        axes.set_xlabel(self.label)


def draw_heat_map(
    summary: Summary, title: str, lines: Sequence[tuple[str, str]], path: Path, keys: Sequence[str] = ()
) -> None:
    """One panel for each (measure, name): two settings, by default those that tell, others averaged."""
    keys = keys or summary.telling[:2]
    x, y = (SweptAxis(key, [group.value(key) for group in summary.groups]) for key in keys)
    widest, highest = LARGEST_PANEL
    width, height = max(3.4, 0.5 * len(x.values) + 1.6), max(2.8, 0.34 * len(y.values) + 1.3)
    size = (min(width, widest) * len(lines), min(height, highest))
    cells = _by_values(summary, keys)
    with plotting.figure(path, columns=len(lines), size=size, also=plotting.PRINT) as (_, panels):
        for axes, (measure, name) in zip(panels, lines, strict=True):
            _heat_map(axes, cells, measure, x, y)
            axes.set_title(f"{title}: {name}" if len(lines) > 1 and title else title or name)


def _heat_map(axes: Axes, groups: dict[tuple[str, ...], list[Group]], measure: str, x: SweptAxis, y: SweptAxis) -> None:
    columns, rows = ([shown(value) for value in axis.values] for axis in (x, y))
    cells = [[_mean(groups.get((column, row), []), measure) for column in columns] for row in rows]
    image = axes.imshow(cells, cmap="viridis", aspect="auto", origin="lower")
    axes.grid(visible=False)
    for ticks, names in ((axes.set_xticks, columns), (axes.set_yticks, rows)):
        marked = range(0, len(names), -(-len(names) // MOST_CELL_NAMES))
        ticks(marked, [names[i] for i in marked])
    axes.set_xlabel(x.label)
    axes.set_ylabel(y.label)
    assert axes.figure is not None
    axes.figure.colorbar(image, ax=axes, shrink=0.9)
    if len(columns) * len(rows) <= MOST_NUMBERED_CELLS:
        known = [value for row in cells for value in row if value == value]
        middle = (min(known) + max(known)) / 2 if known else 0.0
        for j, row in enumerate(cells):
            for i, value in enumerate(row):
                colour = "white" if value < middle else "black"
                axes.text(i, j, figures(value, 2), ha="center", va="center", fontsize=7, color=colour)


def draw_effects(summary: Summary, path: Path, measures: Sequence[str]) -> None:
    """A panel for each measure and setting: every group as a dot, and the mean over the groups that share a value."""
    keys = summary.telling[:MOST_SETTINGS]
    size = (2.6 * len(keys) + 0.6, 2.1 * len(measures) + 0.4)
    with plotting.figure(path, len(measures), len(keys), size=size, sharey="row", also=plotting.PRINT) as (_, panels):
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
    means = [(position, _mean(groups, measure)) for position, groups in _levels(summary, axis)]
    line = "-" if axis.is_ordered else "none"
    axes.plot(*zip(*means, strict=True), linestyle=line, marker="D", color=plotting.PALETTE[0], markeredgecolor="white")
    axis.apply(axes)


def _levels(summary: Summary, axis: SweptAxis) -> list[tuple[float, list[Group]]]:
    """Places on the axis and the groups there: one for each value, or bins of equal counts where values are many."""
    if axis.is_ordered and len(axis.values) > MOST_LEVELS:
        ordered = sorted(summary.groups, key=lambda group: axis.position(group.value(axis.key)))
        edges = [len(ordered) * i // BINS for i in range(BINS + 1)]
        bins = [ordered[start:stop] for start, stop in itertools.pairwise(edges)]
        return [(axis.position(members[len(members) // 2].value(axis.key)), members) for members in bins]
    groups = _by_values(summary, [axis.key])
    return [(axis.position(value), groups[(shown(value),)]) for value in axis.values]


def _by_values(summary: Summary, keys: Sequence[str]) -> dict[tuple[str, ...], list[Group]]:
    """The groups by their values of these settings, as they are shown."""
    found: dict[tuple[str, ...], list[Group]] = {}
    for group in summary.groups:
        found.setdefault(tuple(shown(group.value(key)) for key in keys), []).append(group)
    return found


def _mean(groups: list[Group], measure: str) -> float:
    """Mean over groups that have the measure; NaN without any."""
    found = [mean for group in groups if not math.isnan(mean := group.interval(measure)[0])]
    return sum(found) / len(found) if found else math.nan


def effects_caption(summary: Summary) -> str:
    """What the figure of effects shows."""
    names = short_names(summary.telling)
    return (
        f"{len(summary.groups)} settings: each grey dot is one of them, each diamond the mean over those that share a value "
        f"of {', '.join(names[key].replace('_', ' ') for key in summary.telling[:MOST_SETTINGS])} (or that lie in one of "
        f"{BINS} bins of equal counts, where there are more than {MOST_LEVELS} values)."
    )


def pair_of(summary: Summary) -> list[str]:
    """Two settings with few enough values for a heat map, of three or more that tell; empty without such."""
    counts = {key: len({shown(group.value(key)) for group in summary.groups}) for key in summary.telling}
    few = [key for key, count in counts.items() if 2 < count <= MOST_PAIRED]
    return few[:2] if len(few) >= 2 else []


def suits_rows(summary: Summary, series: dict[str, list[Group]]) -> bool:
    """Whether the settings are a list: neither a grid nor drawn, which can be looked at one setting at a time."""
    if summary.compared.drawn:
        return False
    cells = math.prod(len({shown(group.value(key)) for group in summary.groups}) for key in summary.telling)
    return len(series) <= MOST_ROWS and len(summary.groups) < cells


def draw_rows(summary: Summary, series: dict[str, list[Group]], path: Path, measures: Sequence[str]) -> str:
    """Write the figure: a panel for each measure, a colour for each swept value; returns its caption."""
    first = _first_group(summary)
    rows = sorted(series.values(), key=lambda members: first not in members)
    axis = SweptAxis(summary.x, [group.value(summary.x) for group in summary.groups])
    size = (2.5 * len(measures) + 2.6, 0.24 * len(rows) + 1.2)
    with plotting.figure(path, columns=len(measures), size=size, sharey=True, also=plotting.PRINT) as (drawn, panels):
        for axes, measure in zip(panels, measures, strict=True):
            _row_panel(axes, rows, axis, measure)
            axes.set_xlabel(label(measure))
        panels[0].set_yticks(range(len(rows)), [_difference(summary, members[0]) for members in rows])
        panels[0].set_ylim(len(rows) - 0.5, -0.5)
        if len(axis.values) > 1:
            drawn.legend(*panels[0].get_legend_handles_labels(), title=axis.label, loc="outside right upper")
    return (
        f"Each row is one setting, named by what tells it from the first ({summary.name(first, summary.telling[1:])}); "
        "marks are means with their 95 % intervals."
    )


def _row_panel(axes: Axes, rows: list[list[Group]], axis: SweptAxis, measure: str) -> None:
    for number, value in enumerate(axis.values):
        name = shown(value)
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


def _first_group(summary: Summary, like: Group | None = None) -> Group:
    """What others are named after: a group of the report's baseline, else the first; with the swept value of `like`."""
    wanted = dict(summary.compared.settings.baseline)
    if like is not None:
        wanted.setdefault(summary.x, like.value(summary.x))
    agreeing = (
        group
        for group in summary.groups
        if all(shown(group.value(key)) == shown(value) for key, value in wanted.items())
    )
    return next(agreeing, summary.groups[0] if like is None else _first_group(summary))


def _difference(summary: Summary, group: Group) -> str:
    """The settings that were given, for one of the two, and differ; what only follows from a preset is left out."""
    first = _first_group(summary, group)
    given = dict.fromkeys([*group.axes, *first.axes])
    keys = [key for key in given if key != summary.x and shown(group.value(key)) != shown(first.value(key))]
    own = [key for key in summary.compared.settings.baseline if key in summary.telling and key != summary.x]
    return summary.name(group, keys) or summary.name(group, own) or "(the first)"
