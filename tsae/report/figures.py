"""The report's figures: measures against the swept value with their intervals, and one measure against another."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tsae import plotting
from tsae.config.points import short_names, shown
from tsae.evaluation.measures import FVE, REGISTRY, Chart, Measure, instead_of, label, shown_in
from tsae.experiments.registry import EXPERIMENTS
from tsae.plotting import SPLITS
from tsae.report.grids import (
    MOST_EFFECTS,
    SweptAxis,
    draw_effects,
    draw_heat_map,
    draw_rows,
    effects_caption,
    pair_of,
    suits_rows,
)
from tsae.report.summary import Group, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize

MOST_SERIES = 7
"""Series that one panel can show; the palette has no more colours."""
LEAST_GRID = 4
"""Values of two ordered settings from which on a heat map shows more than lines."""
MOST_PAIRED_MEASURES = 3
SMALL, LEGEND = (2.35, 2.3), 1.2
"""Inches of a panel of an experiment's row, and of the legend beside it."""
LONG_LABEL = 32
"""Characters of a legend's entry that leave too little room for the axes beside it."""
COLOURS = "viridis"
MOST_NAMED_MARKS = 10
MOST_WITH_INTERVALS = 40
LEAST_GROUPS = 3


class Panel(NamedTuple):
    """One pair of axes with lines over the swept value."""

    title: str
    axis: str
    """What the vertical axis shows, in its unit."""
    curves: list[tuple[str, list[Group], str]]
    """Name, groups and measure of each line."""


def draw_figures(summary: Summary, folder: Path) -> list[tuple[Chart, Path]]:
    """Write every figure of the evaluation's measures that has data into `folder`.

    Measures are drawn as lines over the swept value; as heat maps over two settings with many values; where there are
    still more settings, as a row for each that was named, or as the effect of each. Trade-offs between measures follow.
    """
    if all(row.missing for row in summary.rows):
        return []
    series, drawn = series_of(summary), []
    form = _form(summary, series)
    if form in ("lines", "grid"):
        for chart, measures in _charted(summary, ""):
            path = folder / f"{chart.name}.png"
            if form == "grid":
                draw_heat_map(summary, chart.title, [(one.key, one.line) for one in measures], path)
            else:
                _draw_lines(_panels(chart, measures, series), _swept(summary), path)
            drawn.append((chart, path))
    elif form == "rows":
        caption = draw_rows(summary, series, folder / "settings.png", _told(summary))
        drawn.append((Chart("settings", "Settings", "", caption), folder / "settings.png"))
    else:
        drawn += _draw_effects(summary, folder)
    return drawn + draw_trade_offs(summary, folder)


def draw_experiments(summary: Summary, folder: Path) -> list[tuple[Chart, Path]]:
    """Write one row of panels for each experiment that declares charts, as NAME.png: a panel for each headline number.

    Its lines are the splits; where several series are compared, they are these, on the high-level split.
    """
    series, drawn = series_of(summary), []
    form = _form(summary, series)
    for name, experiment in EXPERIMENTS.items():
        charts = _charted(summary, experiment.file)
        if not charts:
            continue
        path = folder / f"{name}.png"
        one_each = [(chart, next((one for one in of if one.line == SPLITS[0]), of[0])) for chart, of in charts]
        of_split = [(measure.key, f"{chart.title}, {measure.line}") for chart, measure in one_each]
        about = ""
        if form == "lines" and len(series) == 1:
            panels = [panel for chart, measures in charts for panel in _panels(chart, measures, series)]
            _draw_lines(panels, _swept(summary), path, SMALL)
        elif form == "lines":
            panels = [panel for chart, measure in one_each for panel in _panels(chart, [measure], series)]
            _draw_lines(panels, _swept(summary), path, SMALL)
        elif form == "grid":
            draw_heat_map(summary, "", of_split, path)
        elif form == "rows":
            about = draw_rows(summary, series, path, [key for key, _ in of_split])
        else:
            draw_effects(summary, path, [key for key, _ in of_split])
            about = effects_caption(summary)
        caption = " ".join([*dict.fromkeys(chart.caption for chart, _ in charts), about]).strip()
        drawn.append((Chart(name, experiment.help, "", caption), path))
    return drawn


def _charted(summary: Summary, file: str) -> list[tuple[Chart, list[Measure]]]:
    """The charts of an experiment's results in `file`, or of the evaluation's, with the measures that are there."""
    charts: dict[Chart, list[Measure]] = {}
    there = set(summary.measures)
    for key, measure in REGISTRY.items():
        if measure.chart and key in there and key.rpartition("/")[0].partition("_chunk")[0] == file:
            charts.setdefault(measure.chart, []).append(measure)
    return list(charts.items())


def _form(summary: Summary, series: dict[str, list[Group]]) -> Literal["lines", "grid", "rows", "effects"]:
    """How measures are drawn over the settings."""
    if len(series) <= MOST_SERIES or (len(summary.telling) == 2 and _fills_its_grid(summary)):
        return "grid" if _is_grid(summary, series) else "lines"
    return "rows" if suits_rows(summary, series) else "effects"


def _told(summary: Summary) -> list[str]:
    """The few measures that the figures of many settings show."""
    return shown_in("effects", summary.measures)[:MOST_EFFECTS]


def _swept(summary: Summary) -> SweptAxis:
    return SweptAxis(summary.x, [row.point.value(summary.x) for row in summary.rows])


def _draw_effects(summary: Summary, folder: Path) -> list[tuple[Chart, Path]]:
    """The effect of each setting alone, and of two of them together."""
    path = folder / "effects.png"
    draw_effects(summary, path, _told(summary))
    drawn = [(Chart("effects", "What each setting does", "", effects_caption(summary)), path)]
    pair = pair_of(summary)
    if len(summary.telling) > len(pair) > 0:
        names = " and ".join(short_names(summary.telling)[key].replace("_", " ") for key in pair)
        lines = [(name, label(name)) for name in shown_in("effects", summary.measures)[:MOST_PAIRED_MEASURES]]
        path = folder / "pair.png"
        draw_heat_map(summary, "", lines, path, pair)
        caption = f"Mean over all other settings, for {names} together."
        drawn.append((Chart("pair", f"{names} together", "", caption), path))
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


def _panels(chart: Chart, measures: list[Measure], series: dict[str, list[Group]]) -> list[Panel]:
    """One panel with a line for each measure; with several series, one panel for each measure."""
    if len(series) == 1:
        lines = [(one.line, groups, one.key) for groups in series.values() for one in measures]
        return [Panel(chart.title, chart.axis, lines)]
    return [
        Panel(f"{chart.title}: {one.line}", chart.axis, [(name, groups, one.key) for name, groups in series.items()])
        for one in measures
    ]


def _draw_lines(panels: list[Panel], axis: SweptAxis, path: Path, each: tuple[float, float] | None = None) -> None:
    """Panels side by side; those of one chart on one scale, those `each` of a size in inches on their own."""
    labels = list(dict.fromkeys(label for panel in panels for label, _, _ in panel.curves))
    below = len(labels) > 1 and max(map(len, labels)) > LONG_LABEL
    width, height = each or ((4.4 if len(panels) == 1 else 3.4), 2.9)
    size = (width * len(panels) + (LEGEND if each else 0.0), height + (0.19 * len(labels) if below else 0.0))
    numbers = {
        label: SPLITS.index(split) if (split := label.removesuffix(" only")) in SPLITS else place
        for place, label in enumerate(labels)
    }
    with plotting.figure(path, columns=len(panels), size=size, sharey=each is None, also=plotting.PRINT) as (
        drawn,
        all_axes,
    ):
        handles: dict[Any, Any] = {}
        for axes, panel in zip(all_axes, panels, strict=True):
            for label, groups, measure in panel.curves:
                _curve(axes, axis, groups, measure, numbers[label], len(labels), label)
            axes.set_title(panel.title)
            axis.apply(axes)
            axes.margins(y=0.12)
            if each or axes is all_axes[0]:
                axes.set_ylabel(panel.axis)
            handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        if below:
            drawn.legend(handles.values(), handles, loc="outside lower left")
        elif len(labels) > 1:
            all_axes[-1].legend(handles.values(), handles, loc="center left", bbox_to_anchor=(1.0, 0.5))


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


def draw_trade_offs(summary: Summary, folder: Path) -> list[tuple[Chart, Path]]:
    """Write a figure of every trade-off that at least three groups have both measures of."""
    y = instead_of(FVE, summary.measures)
    both = {key: _with_both(summary, key, y) for key in shown_in("trade-offs", summary.measures)}
    known = [(REGISTRY[key], groups) for key, groups in both.items() if len(groups) >= LEAST_GROUPS]
    if not known:
        return []
    from matplotlib.cm import ScalarMappable

    path = folder / "trade_offs.png"
    axis = SweptAxis(summary.x, [group.value(summary.x) for group in summary.groups])
    named = len(known[0][1]) <= MOST_NAMED_MARKS
    with plotting.figure(path, columns=len(known), size=(4.6 * len(known), 3.5), also=plotting.PRINT) as (
        drawn,
        panels,
    ):
        for axes, (x, groups) in zip(panels, known, strict=True):
            _draw_trade_off(axes, summary, x, y, groups, axis)
        if axis.is_ordered and _is_crowded(axis):
            drawn.colorbar(ScalarMappable(_norm(axis), COLOURS), ax=panels, label=axis.label, shrink=0.9)
        elif not named and not _is_crowded(axis):
            drawn.legend(*panels[0].get_legend_handles_labels(), title=axis.label, loc="outside right upper")
    intervals = " with its 95 % intervals" if len(summary.groups) <= MOST_WITH_INTERVALS else ""
    own = ", for each kind of activations by itself" if len(summary.worlds(known[0][1])) > 1 else ""
    to_the_left = " and ".join(dict.fromkeys(x.family for x, _ in known if x.better == "lower"))
    text = (
        f"Each mark is one setting{intervals}; the step line joins those that no other setting beats in both measures{own}. "
        + (f"{to_the_left}: to the left is better; elsewhere to the right. " if to_the_left else "")
        + "Up is better."
    )
    return [(Chart("trade_offs", "Trade-offs", "", text), path)]


def front(points: list[tuple[float, float]], x_sign: int) -> list[tuple[float, float]]:
    """The points that none beats in both coordinates, from the worst x to the best; y: more is better."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (-x_sign * point[0], -point[1])):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return best[::-1]


def _with_both(summary: Summary, x: str, y: str) -> list[Group]:
    return [group for group in summary.groups if not any(math.isnan(group.interval(key)[0]) for key in (x, y))]


def _draw_trade_off(
    axes: Axes, summary: Summary, measure: Measure, quality: str, groups: list[Group], axis: SweptAxis
) -> None:
    x_sign = -1 if measure.better == "lower" else 1
    few = len(groups) <= MOST_WITH_INTERVALS
    places, labelled = [], set()
    for group in groups:
        (x, x_half), (y, y_half) = group.interval(measure.key), group.interval(quality)
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
    where: Literal["post", "pre"] = "post" if x_sign > 0 else "pre"
    for alike in summary.worlds(groups).values():
        best = front([place for group, place in zip(groups, places, strict=True) if group in alike], x_sign)
        axes.step(*zip(*best, strict=True), where=where, color="#555555", linewidth=1.1, zorder=1)
    if len(groups) <= MOST_NAMED_MARKS:
        for group, place in zip(groups, places, strict=True):
            name = summary.name(group, summary.telling)
            axes.annotate(name, place, xytext=(5, 4), textcoords="offset points", fontsize=7, color="#333333")
    axes.set_xlabel(f"{measure.label} ({'more' if x_sign > 0 else 'less'} is better)")
    axes.set_ylabel(label(quality))
    axes.locator_params(axis="x", nbins=6)
    axes.margins(0.12)


def _is_crowded(axis: SweptAxis) -> bool:
    """Whether the swept setting has more values than there are colours that can be told apart."""
    return len(axis.values) > len(plotting.PALETTE)


def _look(axis: SweptAxis, value: Any) -> dict[str, Any]:
    """Colour and marker of a swept value."""
    import matplotlib

    if not _is_crowded(axis):
        names = [shown(v) for v in axis.values]
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
