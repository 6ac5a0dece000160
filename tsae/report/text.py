"""What a report says without pictures: sentences made from its numbers, and plain tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tsae.config.points import short_names, shown
from tsae.evaluation.measures import label, shown_in
from tsae.report.summary import Group, Summary, compare
from tsae.runtime import tables

MOST_WORLDS = 6
"""Kinds of activations that get a sentence each."""
MOST_NAMED = 3
"""Settings of a baseline that are named."""


def sentences(summary: Summary) -> list[str]:
    """A paragraph or two; nothing while there are no results."""
    groups = [group for group in summary.groups if any(not row.missing for row in group.rows)]
    if not groups:
        return []
    worlds = summary.worlds(groups)
    if len(worlds) > MOST_WORLDS:
        worlds = {"": groups}
    ranges = [_ranges(summary, alike, f"{world}: " if len(worlds) > 1 else "") for world, alike in worlds.items()]
    return [text for text in (*ranges, _splits(groups), _differences(summary)) if text]


def _ranges(summary: Summary, groups: list[Group], world: str) -> str:
    parts = []
    for measure in shown_in("sentences", summary.measures):
        known = [(mean, group) for group in groups if not math.isnan(mean := group.interval(measure)[0])]
        if not known:
            continue
        (low, worst), (high, best) = min(known, key=lambda e: e[0]), max(known, key=lambda e: e[0])
        if len(known) == 1 or figures(low, 3) == figures(high, 3):
            parts.append(f"{label(measure)} is {figures(high, 3)}")
        else:
            names = [summary.name(group, summary.given(group)) for group in (worst, best)]
            parts.append(
                f"{label(measure)} goes from {figures(low, 3)} ({names[0]}) to {figures(high, 3)} ({names[1]})"
            )
    return f"{world}{'; '.join(parts)}." if parts else ""


def _splits(groups: list[Group]) -> str:
    """Whether the high-level split is the smoother one, and for how many settings beyond doubt."""
    known, smoother, bounded, certain = 0, 0, 0, 0
    for group in groups:
        (high, high_half), (low, low_half) = group.interval("lipschitz_cont_h"), group.interval("lipschitz_cont_l")
        if math.isnan(high) or math.isnan(low):
            continue
        known += 1
        smoother += high < low
        bounded += high_half == high_half and low_half == low_half
        certain += high + high_half < low - low_half
    if not known:
        return ""
    if known == 1:
        if not smoother:
            return "The high-level split is not smoother than the low-level one."
        doubt = (", with intervals that do not touch" if certain else ", but the intervals overlap") if bounded else ""
        return f"The high-level split is smoother than the low-level one{doubt}."
    text = f"The high-level split is smoother than the low-level one in {smoother or 'none'} of {known} settings"
    if smoother and bounded:
        text += f", in {certain or 'none'} of them with intervals that do not touch"
    return f"{text}."


def _differences(summary: Summary) -> str:
    """The measures whose differences by seed leave out zero."""
    found = compare(summary)
    parts = []
    for measure in dict.fromkeys(name for entry in found for name in entry.differences):
        values = [entry.differences[measure] for entry in found if measure in entry.differences]
        up = sum(mean > half for mean, half, _ in values)
        down = sum(mean < -half for mean, half, _ in values)
        if up or down:
            directions = [f"higher in {up}" if up else "", f"lower in {down}" if down else ""]
            parts.append(f"{label(measure)} is {' and '.join(filter(None, directions))}")
    if not parts:
        return ""
    against = f"with {_reference(summary)}, seed by seed (95 %)"
    start = f"Of {len(found)} comparisons {against}" if len(found) > 1 else f"Compared {against}"
    return f"{start}: {'; '.join(parts)}."


def _reference(summary: Summary) -> str:
    """What groups are compared with."""
    wanted = summary.compared.settings.baseline or {summary.x: summary.groups[0].value(summary.x)}
    if len(wanted) > MOST_NAMED:
        return "the baseline"
    names = short_names(list(wanted))
    return ", ".join(f"{names[key].replace('_', ' ')} {shown(value)}" for key, value in wanted.items())


def short_table(summary: Summary) -> list[str]:
    """A few measures of each point, for the terminal."""
    columns = shown_in("terminal", summary.measures)
    cells = [["point", *(label(name) for name in columns)]]
    for row in summary.rows:
        values = [figures(row.values.get(name, float("nan")), 3) for name in columns]
        cells.append([row.point.name, *values] if not row.missing else [row.point.name, f"({row.missing})"])
    return aligned(cells)


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose first row is its head: names to the left, figures to the right.

    A shorter row ends in a remark, which stands in the place of all its figures; there may be no column of figures.
    """
    whole = [line for line in cells if len(line) == len(cells[0])]
    widths = [
        max(len(line[0]) for line in cells),
        *(max(map(len, column)) for column in list(zip(*whole, strict=True))[1:]),
    ]
    padded = (
        [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], [*widths[1:], 0], strict=False)),
        ]
        for line in cells
    )
    return ["  ".join(line).rstrip() for line in padded]


def as_csv(summary: Summary) -> str:
    """One line for each point: name, swept values, every measure."""
    axes = list(dict.fromkeys(key for row in summary.rows for key in row.point.axes))
    table: list[list[object]] = [["point", *axes, "missing", *summary.measures]]
    for row in summary.rows:
        swept = [shown(row.point.value(key)) for key in axes]
        table.append([row.point.name, *swept, row.missing, *(row.values.get(name, "") for name in summary.measures)])
    return tables.as_csv(table)


def as_markdown(summary: Summary) -> str:
    """Measures as rows, points as columns."""

    rows = [row for row in summary.rows if not row.missing]
    lines = ["| measure | " + " | ".join(row.point.name for row in rows) + " |", "|---|" + "---:|" * len(rows)]
    for name in summary.measures:
        values = (figures(row.values.get(name, float("nan"))) for row in rows)
        lines.append(f"| {name} | " + " | ".join(values) + " |")
    lines += [f"\nMissing: {row.point.name} ({row.missing})" for row in summary.missing]
    return "\n".join(lines) + "\n"


def figures(value: float, digits: int = 4) -> str:
    """A number with about `digits` significant figures, without exponent where that is readable."""
    if value != value:
        return "–"
    magnitude = abs(value)
    if magnitude and (magnitude < 1e-3 or magnitude >= 1e6):
        return f"{value:.{digits - 1}e}"
    before_point = len(str(int(magnitude))) if magnitude >= 1 else 0
    decimals = max(0, digits - before_point)
    return f"{value:.{decimals}f}"


def with_interval(mean: float, half: float) -> tuple[str, str]:
    """A mean and the half-width of its interval as text, the latter empty where it is not known."""
    if half != half:
        return figures(mean, 3), ""
    # As many decimals as the value deserves, and enough to show the first digit of its interval.
    # What is left of a difference of equal numbers is rounding.
    first_digit = -math.floor(math.log10(half)) if half > 1e-9 * abs(mean) else 0
    decimals = min(max(len(figures(mean, 3).partition(".")[2]), first_digit), 5)
    return f"{mean:.{decimals}f}", f"{half:.{decimals}f}"
