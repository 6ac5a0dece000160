"""Figures for sweeps of several settings: heat maps of two, and each setting's effect where there are more."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsae import plotting
from tsae.config.points import short_names, shown
from tsae.report.axis import SweptAxis
from tsae.report.measures import figures, label, shown_of
from tsae.report.summary import Group, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_NUMBERED_CELLS = 80
MOST_TICKS = 12
LARGEST_PANEL = (5.2, 4.6)
"""Inches of a heat map, however many cells it has: a larger picture would be shrunk until its labels vanish."""
MOST_LEVELS, BINS = 12, 8
"""Ordered values above which an effect is the mean over so many bins of equal counts."""
MOST_PAIRED = 30
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
    with plotting.figure(path, columns=len(lines), size=size) as (_, panels):
        for axes, (measure, name) in zip(panels, lines, strict=True):
            _heat_map(axes, cells, measure, x, y)
            axes.set_title(f"{title}: {name}" if len(lines) > 1 and title else title or name)


def _heat_map(axes: Axes, groups: dict[tuple[str, ...], list[Group]], measure: str, x: SweptAxis, y: SweptAxis) -> None:
    columns, rows = ([shown(_as_setting(value)) for value in axis.values] for axis in (x, y))
    cells = [[_mean(groups.get((column, row), []), measure) for column in columns] for row in rows]
    image = axes.imshow(cells, cmap="viridis", aspect="auto", origin="lower")
    axes.grid(visible=False)
    for ticks, names in ((axes.set_xticks, columns), (axes.set_yticks, rows)):
        marked = range(0, len(names), -(-len(names) // MOST_TICKS))
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


def draw_effects(summary: Summary, path: Path) -> None:
    """A panel for each measure and setting: every group as a dot, and the mean over the groups that share a value."""
    measures = shown_of(EFFECTS, summary.measures)[:MOST_EFFECTS]
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
    return [(axis.position(value), groups[(shown(_as_setting(value)),)]) for value in axis.values]


def _by_values(summary: Summary, keys: Sequence[str]) -> dict[tuple[str, ...], list[Group]]:
    """The groups by their values of these settings, as they are shown."""
    found: dict[tuple[str, ...], list[Group]] = {}
    for group in summary.groups:
        found.setdefault(tuple(shown(group.value(key)) for key in keys), []).append(group)
    return found


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
        f"of {', '.join(names[key].replace('_', ' ') for key in summary.telling[:MOST_SETTINGS])} (or that lie in one of "
        f"{BINS} bins of equal counts, where there are more than {MOST_LEVELS} values)."
    )


def pair_of(summary: Summary) -> list[str]:
    """Two settings with few enough values for a heat map, of three or more that tell; empty without such."""
    counts = {key: len({shown(group.value(key)) for group in summary.groups}) for key in summary.telling}
    few = [key for key, count in counts.items() if 2 < count <= MOST_PAIRED]
    return few[:2] if len(few) >= 2 else []
