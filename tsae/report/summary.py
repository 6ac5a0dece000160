"""The results of a sweep, gathered from its run folders, averaged over seeds and compared seed by seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tsae.checkpoint import RESULTS, RunFolder
from tsae.config.points import Point, short_names, shown
from tsae.evaluation.identity import is_evaluated
from tsae.evaluation.measures import in_order, scalars, shown_in
from tsae.experiments.driver import headlines
from tsae.experiments.registry import declare_measures
from tsae.report.compared import Compared
from tsae.runtime import metadata
from tsae.runtime.errors import TsaeError
from tsae.store.binding import difference
from tsae.training.splits import damaged_end, last_line, trouble

declare_measures()

SEED_AXES = ("training.seed", "data.seed")
SOURCES = frozenset({"model", "data", "synthetic"})
"""Sections that decide what activations are."""


@dataclass(frozen=True)
class Row:
    """One point and its results."""

    point: Point
    results: dict[str, Any]
    """Content of eval_results.json; empty while the point is missing."""
    experiments: dict[str, tuple[float, float | None]]
    """Headline numbers of the experiments: measure → value and half-width of its interval."""
    missing: str
    """Why there are no results, or nothing."""
    changed: str = ""
    """What of its data has changed since it was trained, or nothing."""
    trouble: str = ""
    """What was wrong with its splits when training ended, or nothing."""

    @cached_property
    def values(self) -> dict[str, float]:
        """Measure → value."""
        return scalars(self.results) | {name: value for name, (value, _) in self.experiments.items()}

    def half_width(self, measure: str) -> float:
        """Half-width of the run's own 95 % interval, NaN where none was estimated."""
        own = self.results.get("half_width_95", {}).get(measure)
        own = self.experiments[measure][1] if measure in self.experiments else own
        return math.nan if own is None else float(own)

    @property
    def seed(self) -> tuple[Any, ...]:
        """What tells this point from others of its group."""
        return tuple(self.point.value(key) for key in SEED_AXES)


@dataclass(frozen=True)
class Group:
    """The points that differ in nothing but their seed."""

    axes: dict[str, Any]
    rows: tuple[Row, ...]

    def value(self, key: str) -> Any:
        """The setting at `key`, which the points share."""
        return self.rows[0].point.value(key)

    def interval(self, measure: str) -> tuple[float, float]:
        """Mean over the seeds that have results, and the half-width of its 95 % interval.

        With one seed, the half-width is the run's own over held-out documents. NaN stands for what is not known.
        """
        found = [row.values[measure] for row in self.rows if measure in row.values]
        if not found:
            return math.nan, math.nan
        if len(found) == 1:
            return found[0], next(row for row in self.rows if measure in row.values).half_width(measure)
        from tsae.evaluation.statistics import student_interval

        return student_interval(found)

    def difference(self, reference: Group, measure: str) -> tuple[float, float, int]:
        """Mean over shared seeds of this group's value less the reference's, half-width of its 95 % interval, seeds."""
        theirs = {row.seed: row.values[measure] for row in reference.rows if measure in row.values}
        found = [
            row.values[measure] - theirs[row.seed] for row in self.rows if measure in row.values and row.seed in theirs
        ]
        if len(found) < 2:
            return math.nan, math.nan, len(found)
        from tsae.evaluation.statistics import student_interval

        return *student_interval(found), len(found)


@dataclass(frozen=True)
class Summary:
    """All that the report shows."""

    compared: Compared
    x: str
    """Key path of the value on the horizontal axis."""
    rows: tuple[Row, ...]
    groups: tuple[Group, ...]

    @property
    def missing(self) -> list[Row]:
        """Points without results."""
        return [row for row in self.rows if row.missing]

    @property
    def measures(self) -> list[str]:
        """Every measure that any point has, the summary's first."""
        return in_order(list(dict.fromkeys(name for row in self.rows for name in row.values)))

    @cached_property
    def telling(self) -> list[str]:
        """Key paths that tell the groups apart, the swept one first; what follows from those before it is left out.

        A drawn setting follows from no other, although its neighbour's digits alone would do to tell the groups apart.
        """
        keys = dict.fromkeys(key for group in self.groups for key in group.axes if key != self.x)
        drawn = self.compared.drawn
        telling = [self.x]
        for key in keys:
            is_drawn = key in drawn
            if is_drawn or self._distinct([*telling, key]) > self._distinct(telling):
                telling.append(key)
        return telling

    def worlds(self, groups: Sequence[Group]) -> dict[str, list[Group]]:
        """The groups by what their activations are, in words: those of different ones do not compete."""
        keys = [key for key in self.telling if key.partition(".")[0] in SOURCES]
        found: dict[str, list[Group]] = {}
        for group in groups:
            found.setdefault(self.name(group, keys), []).append(group)
        return found

    def name(self, group: Group, keys: Sequence[str]) -> str:
        """A group in words, by its settings at `keys`."""
        short = short_names([*self.telling, *keys])
        return ", ".join(f"{short[key].replace('_', ' ')} {shown(group.value(key))}" for key in keys)

    def given(self, group: Group) -> list[str]:
        """What tells a group from others, without what only follows from a preset and without what its activations are."""
        telling = [key for key in self.telling if key.partition(".")[0] not in SOURCES]
        return [key for key in telling if key in group.axes] or telling or self.telling

    def _distinct(self, keys: list[str]) -> int:
        return len({tuple(shown(group.value(key)) for key in keys) for group in self.groups})

    @property
    def seeds(self) -> int:
        """The largest number of seeds with results in one group."""
        return max((sum(not row.missing for row in group.rows) for group in self.groups), default=0)


def summarise(compared: Compared) -> Summary:
    """Read the results of every point of `compared`; points that are not there yet are kept as missing."""
    rows = tuple(_row(compared, *pair) for pair in zip(compared.points, compared.runs, strict=True))
    x = _swept_key(compared)
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(_shared_axes(row.point, x)), []).append(row)
    found = tuple(Group(_shared_axes(members[0].point, x), tuple(members)) for members in groups.values())
    return Summary(compared, x, rows, found)


def _row(compared: Compared, point: Point, run: RunFolder) -> Row:
    try:
        return _row_of_sound(compared, point, run)
    except TsaeError as error:
        return Row(point, {}, {}, f"damaged: {error}")


def _row_of_sound(compared: Compared, point: Point, run: RunFolder) -> Row:
    experiments = headlines(run, point.config)
    if is_evaluated(point.config, run):
        results = run.read_results()
        found = damaged_end(run.metrics) or trouble(last_line(run.metrics), point.config)
        return Row(point, results, experiments, "", _changed(run, point, results), str(found or ""))
    if experiments and not compared.evaluated:
        return Row(point, {}, experiments, "")
    return Row(point, {}, {}, _missing(run, point))


def _missing(run: RunFolder, point: Point) -> str:
    """Why a point has no results."""
    wrong = metadata.damage(run.eval_results, RESULTS)
    if wrong:
        return f"{run.eval_results}: {wrong}"
    return "trained, not evaluated" if run.is_trained(point.config) else "not trained"


def _changed(run: RunFolder, point: Point, results: dict[str, Any]) -> str:
    """What a reader must know of the data behind results: accepted after the training, or changed since."""
    try:
        what = difference(run, point.config)
    except TsaeError as error:  # a text or a model that is gone; the results are what they were
        what = str(error)
    return what or ("measured on other data than it was trained on" if results.get("trained_on_other_data") else "")


def _swept_key(compared: Compared) -> str:
    """The axis that the sweep's report names, else the first that varies and is not a seed, else the first."""
    named = compared.settings.x
    if named:
        return named
    keys = dict.fromkeys(key for point in compared.points for key in point.axes)
    varying = [key for key in keys if len({shown(point.value(key)) for point in compared.points}) > 1]
    return next(iter([*(key for key in varying if key not in SEED_AXES), *varying, *keys]))


def _shared_axes(point: Point, x: str) -> dict[str, Any]:
    return {key: value for key, value in point.axes.items() if key == x or key not in SEED_AXES}


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
    measures = shown_in("differences", summary.measures)
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
