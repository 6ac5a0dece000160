"""What a sweep's numbers say, in a few sentences made from them."""

from __future__ import annotations

import math

from tsae.config.points import short_names, shown
from tsae.report.comparison import compare
from tsae.report.measures import figures, label, shown_of
from tsae.report.summary import Group, Summary

RANGED = (
    "frac_variance_explained",
    "lipschitz_cont_h",
    "frac_recovered",
    "truth_disentanglement",
    "truth_slow",
    "probing_chunk0/semantics",
)
"""Measures whose range is told, where a sweep has them."""
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
    for measure in shown_of(RANGED, summary.measures):
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
        return f"The high-level split {'is' if smoother else 'is not'} smoother than the low-level one."
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
