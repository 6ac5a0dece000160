"""Which groups of a sweep are compared with which: differences seed by seed, where the seeds' common noise cancels."""

from __future__ import annotations

from dataclasses import dataclass

from tsae.config.points import shown
from tsae.report.measures import shown_of
from tsae.report.summary import Group, Summary

MEASURES = (
    "frac_variance_explained",
    "lipschitz_cont_h",
    "frac_recovered",
    "frac_alive",
    "truth_disentanglement",
    "truth_slow",
    "probing_chunk0/semantics",
    "probing_chunk0/context",
    "probing_chunk0/syntax",
)
"""Measures whose differences are shown, where a sweep has them."""


@dataclass(frozen=True)
class Comparison:
    """A group and the one it is held against."""

    group: Group
    reference: Group
    differences: dict[str, tuple[float, float, int]]
    """Measure → mean difference, half-width of its 95 % interval, shared seeds."""


def compare(summary: Summary) -> list[Comparison]:
    """Every group against the reference that it agrees with in most settings, where both have two seeds in common.

    References are the groups that `report.baseline` names, else those with the first of the swept values.
    """
    references = _references(summary)
    measures = shown_of(MEASURES, summary.measures)
    found = []
    for group in summary.groups:
        others = [reference for reference in references if reference is not group]
        if any(reference is group for reference in references) or not others:
            continue
        reference = max(others, key=lambda other: _agreement(group, other))
        differences = {name: group.difference(reference, name) for name in measures}
        differences = {name: values for name, values in differences.items() if values[2] >= 2}
        if differences:
            found.append(Comparison(group, reference, differences))
    return found


def _references(summary: Summary) -> list[Group]:
    wanted = summary.compared.settings.baseline
    if wanted:
        return [
            group
            for group in summary.groups
            if all(shown(group.value(key)) == shown(value) for key, value in wanted.items())
        ]
    first = shown(summary.groups[0].value(summary.x)) if summary.groups else ""
    return [group for group in summary.groups if shown(group.value(summary.x)) == first]


def _agreement(group: Group, other: Group) -> int:
    """In how many swept settings two groups agree."""
    keys = dict.fromkeys([*group.axes, *other.axes])
    return sum(shown(group.value(key)) == shown(other.value(key)) for key in keys)
