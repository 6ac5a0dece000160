"""What a report says without pictures: sentences made from its numbers, and plain tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tsae.config.points import short_names, shown
from tsae.evaluation.measures import REGISTRY, in_words, label, shown_in
from tsae.report.summary import Comparison, Group, Summary, compare
from tsae.runtime import tables

MOST_WORLDS = 6
"""Kinds of activations that get a sentence each."""
MOST_DIFFERENCES = 8
"""Differences that get a sentence each; of more, directions are counted."""
MOST_NAMED = 3
"""Settings of a baseline that are named."""


def sentences(summary: Summary) -> list[str]:
    """What was found and how sure it is, in paragraphs; nothing while there are no results."""
    groups = [group for group in summary.groups if any(not row.missing for row in group.rows)]
    if not groups:
        return []
    worlds = summary.worlds(groups)
    if len(worlds) > MOST_WORLDS:
        worlds = {"": groups}
    ranges = [_ranges(summary, alike, f"{world}: " if len(worlds) > 1 else "") for world, alike in worlds.items()]
    told = [text for text in (*ranges, _splits(groups), *_differences(summary)) if text]
    return [*told, _how_sure(summary, groups)] if told else []


def _ranges(summary: Summary, groups: list[Group], world: str) -> str:
    """The extremes of each measure over settings."""
    parts = []
    for measure in shown_in("sentences", summary.measures):
        known = [group for group in groups if not math.isnan(group.interval(measure)[0])]
        if not known:
            continue
        worst, best = (choose(known, key=lambda group: group.interval(measure)[0]) for choose in (min, max))
        if len({figures(group.interval(measure)[0], 3) for group in (worst, best)}) == 1:
            parts.append(_sentence(f"{in_words(measure)} is {_number(best, measure)}"))
        else:
            high, low = (
                f"{summary.name(group, summary.given(group))} ({_number(group, measure)})" for group in (best, worst)
            )
            least_is_best = measure in REGISTRY and REGISTRY[measure].better == "lower"
            said = (
                f"best (lowest) with {low} and worst (highest) with {high}"
                if least_is_best
                else f"largest with {high} and smallest with {low}"
            )
            parts.append(_sentence(f"{in_words(measure)} is {said}"))
    return world + " ".join(parts) if parts else ""


def _splits(groups: list[Group]) -> str:
    """Whether the high-level split is the smoother one, and for how many settings beyond doubt."""
    keys = ("lipschitz_cont_h", "lipschitz_cont_l")
    known, smoother, bounded, certain = [], 0, 0, 0
    for group in groups:
        (high, high_half), (low, low_half) = (group.interval(key) for key in keys)
        if math.isnan(high) or math.isnan(low):
            continue
        known.append(group)
        smoother += high < low
        bounded += high_half == high_half and low_half == low_half
        certain += high + high_half < low - low_half
    if not known:
        return ""
    if len(known) == 1:
        values = "{} against {}".format(*(_number(known[0], key) for key in keys))
        if not smoother:
            return f"The high-level split is not smoother than the low-level one ({values}; lower is smoother)."
        doubt = (", with intervals that do not touch" if certain else ", but the intervals overlap") if bounded else ""
        return f"The high-level split is smoother than the low-level one ({values}){doubt}."
    text = f"The high-level split is smoother than the low-level one in {smoother or 'none'} of {len(known)} settings"
    if smoother and bounded:
        text += f", in {certain or 'none'} of them with intervals that do not touch"
    return f"{text}."


def _differences(summary: Summary) -> list[str]:
    """The differences by seed whose interval leaves out zero, and the measures of which nothing is claimed."""
    found = compare(summary)
    sure: dict[str, list[Comparison]] = {name: [] for entry in found for name in entry.differences}
    for entry in found:
        for measure, (mean, half, _) in entry.differences.items():
            if abs(mean) > half:
                sure[measure].append(entry)
    told = []
    if sum(map(len, sure.values())) <= MOST_DIFFERENCES:
        told = [_difference(summary, entry, measure) for measure, entries in sure.items() for entry in entries]
    else:
        for measure, entries in sure.items():
            ups = sum(entry.differences[measure][0] > 0 for entry in entries)
            counts = [f"{word} in {count}" for word, count in (("higher", ups), ("lower", len(entries) - ups)) if count]
            if counts:
                told.append(f"{in_words(measure)} is {' and '.join(counts)}")
        told = [f"Of {len(found)} comparisons with {_reference(summary)}, seed by seed: {'; '.join(told)}."]
    open_ = [in_words(measure) for measure, entries in sure.items() if not entries]
    if open_:
        zero = "its 95 % interval holds zero" if len(open_) == 1 else "their 95 % intervals hold zero"
        told.append(f"No difference is claimed in {', '.join(open_)}: {zero}.")
    return [" ".join(told)] if told else []


def _difference(summary: Summary, entry: Comparison, measure: str) -> str:
    """One difference with both values, their intervals and the number of seeds."""
    mean, half, seeds = entry.differences[measure]
    group, reference = entry.group, entry.reference
    differing = [key for key in summary.telling if shown(group.value(key)) != shown(reference.value(key))]
    shared = [key for key in summary.telling if key not in differing]
    where = f", {summary.name(group, shared)}" if shared else ""
    better = REGISTRY[measure].better
    judged = f" ({'better' if (mean > 0) == (better == 'higher') else 'worse'})" if better else ""
    by, width = with_interval(abs(mean), half)
    return _sentence(
        f"with {summary.name(group, differing)} instead of {summary.name(reference, differing)}{where}, "
        f"{in_words(measure)} is {'higher' if mean > 0 else 'lower'} by {by} ± {width}{judged}: "
        f"{_number(group, measure)} against {_number(reference, measure)} ({seeds} seeds)"
    )


def _how_sure(summary: Summary, groups: list[Group]) -> str:
    """What the intervals are, and what cannot be said."""
    if summary.seeds > 1:
        least = min(sum(not row.missing for row in group.rows) for group in groups)
        count = f"{least} to {summary.seeds}" if least < summary.seeds else f"{summary.seeds}"
        text = (
            f"Values are means over {count} seeds, ± their 95 % intervals (Student's t); differences are taken seed by seed, "
            "and their intervals are not corrected for their number."
        )
        return text + (" A setting with one seed has no interval over seeds." if least == 1 else "")
    text = "One seed: ± is the 95 % interval within a run, over held-out documents or as its experiment says."
    if len(groups) == 1:
        return f"{text} What another seed would give is not known."
    return f"{text} What another seed would give is not known, so no difference between settings is claimed."


def _number(group: Group, measure: str) -> str:
    """A group's value with its interval, where it has one."""
    value, half = with_interval(*group.interval(measure))
    return f"{value} ± {half}" if half else value


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


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
