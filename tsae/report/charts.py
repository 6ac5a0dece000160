"""The report's figures: measures against the swept value, with intervals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from tsae import plotting
from tsae.config.points import short_names, shown
from tsae.report.axis import SweptAxis
from tsae.report.forest import draw_forest, suits
from tsae.report.grids import EFFECTS, draw_effects, draw_heat_map, effects_caption, pair_of
from tsae.report.measures import CHARTS, Chart, label, shown_of
from tsae.report.summary import Group, Summary
from tsae.report.trade_offs import draw_trade_offs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_SERIES = 7
"""Series that one panel can show; the palette has no more colours."""
LEAST_GRID = 4
"""Values of two ordered settings from which on a heat map shows more than lines."""
MOST_PAIRED_MEASURES = 3
LONG_LABEL = 32
"""Characters of a legend's entry that leave too little room for the axes beside it."""


def draw_charts(summary: Summary, folder: Path) -> list[tuple[Chart, Path]]:
    """Write every figure that has data as a PNG into `folder`.

    Measures are drawn as lines over the swept value; as heat maps over two settings with many values; where there are
    still more settings, as a row for each that was named, or as the effect of each. Trade-offs between measures follow.
    """
    measured = [row for row in summary.rows if not row.missing]
    if not measured:
        return []
    series = series_of(summary)
    drawn = []
    if len(series) <= MOST_SERIES or (len(summary.telling) == 2 and _fills_its_grid(summary)):
        axis = SweptAxis(summary.x, [row.point.value(summary.x) for row in summary.rows])
        for chart in CHARTS:
            known = [line for line in chart.lines if line[0] in summary.measures]
            if not known:
                continue
            path = folder / f"{chart.name}.png"
            if _is_grid(summary, series):
                draw_heat_map(summary, chart.title, known, path)
            else:
                _draw(chart, known, axis, series, path)
            drawn.append((chart, path))
    elif suits(summary, series):
        caption = draw_forest(summary, series, folder / "settings.png")
        drawn.append((Chart("settings", "Settings", "", (), caption), folder / "settings.png"))
    else:
        drawn += _draw_effects(summary, folder)
    return drawn + draw_trade_offs(summary, folder)


def _draw_effects(summary: Summary, folder: Path) -> list[tuple[Chart, Path]]:
    """The effect of each setting alone, and of two of them together."""
    path = folder / "effects.png"
    draw_effects(summary, path)
    drawn = [(Chart("effects", "What each setting does", "", (), effects_caption(summary)), path)]
    pair = pair_of(summary)
    if len(summary.telling) > len(pair) > 0:
        names = " and ".join(short_names(summary.telling)[key].replace("_", " ") for key in pair)
        lines = [(name, label(name)) for name in shown_of(EFFECTS, summary.measures)[:MOST_PAIRED_MEASURES]]
        path = folder / "pair.png"
        draw_heat_map(summary, "", lines, path, pair)
        caption = f"Mean over all other settings, for {names} together."
        drawn.append((Chart("pair", f"{names} together", "", (), caption), path))
    return drawn


def _is_grid(summary: Summary, series: dict[str, list[Group]]) -> bool:
    """Whether two settings have so many values that lines would hide them."""
    if len(summary.telling) != 2:
        return False
    axes = [SweptAxis(key, [group.value(key) for group in summary.groups]) for key in summary.telling]
    many = all(len(axis.values) >= LEAST_GRID and axis.is_ordered for axis in axes)
    return many or len(series) > MOST_SERIES


def _fills_its_grid(summary: Summary) -> bool:
    """Whether most combinations of the settings occur: of settings that were drawn, hardly any two meet."""
    cells = math.prod(len({shown(group.value(key)) for group in summary.groups}) for key in summary.telling)
    return 2 * len(summary.groups) >= cells


def series_of(summary: Summary) -> dict[str, list[Group]]:
    """Groups that differ in the swept value alone, by what they share (with one series, that is nothing)."""
    series: dict[str, list[Group]] = {}
    for group in summary.groups:
        series.setdefault(summary.name(group, summary.telling[1:]), []).append(group)
    return series


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
