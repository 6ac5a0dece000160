"""A sweep's points: the product of its axes, each a validated run with a name of its own."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from tsae.config import run as configuration
from tsae.config import schema
from tsae.config.points import Point, file_name, key_paths, short_names, shown
from tsae.config.schema import flatten
from tsae.runtime.errors import TsaeError, suggestion
from tsae.sweep.draws import draw_points
from tsae.sweep.sweepfile import Sweep


def expand(sweep: Sweep) -> tuple[Point, ...]:
    """All points in the order of the file. Raises TsaeError for unknown axes, bad values and duplicates."""
    choices = [_grid(sweep), _zipped(sweep), _listed(sweep), _drawn(sweep)]
    _refuse_overlap(sweep, choices)
    rows = [_merged(parts) for parts in itertools.product(*choices)]
    short = short_names([key for row in rows for key in row])
    points = []
    for row in rows:
        name = file_name(",".join(f"{short[key]}={shown(value)}" for key, value in row.items()) or "run")
        where = f"{sweep.path}: {name}" if row else str(sweep.path)
        asked = {**sweep.asked, **row}
        configuration.check_part(asked, where)
        config = configuration.from_mapping(sweep.settings_with(row), where)
        configuration.refuse_without_effect(config, asked, where)
        points.append(Point(name, row, config))
    _refuse_duplicates(sweep, points)
    x = sweep.config.report.x
    if x is not None and x not in short:
        raise TsaeError(f"{sweep.path}: report.x: {x} is not swept; {suggestion(x, short)}allowed: {', '.join(short)}")
    return tuple(points)


def require_baseline(sweep: Sweep, points: Sequence[Point]) -> None:
    """Refuse a baseline of which no point is one. Raises TsaeError."""
    baseline = sweep.config.report.baseline
    for key in baseline:
        if key not in _known_axes():
            raise TsaeError(
                f"{sweep.path}: report.baseline: {key} is no setting; {suggestion(key, _known_axes())}".rstrip("; ")
            )
    if not any(all(shown(point.value(key)) == shown(value) for key, value in baseline.items()) for point in points):
        wanted = ", ".join(f"{key}={shown(value)}" for key, value in baseline.items())
        raise TsaeError(f"{sweep.path}: report.baseline: no point of this sweep has {wanted}")


@cache
def _known_axes() -> tuple[str, ...]:
    return (*key_paths(), *configuration.PRESETS)


def _grid(sweep: Sweep) -> list[dict[str, Any]]:
    axes = _axes(sweep, "grid", sweep.config.grid)
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _zipped(sweep: Sweep) -> list[dict[str, Any]]:
    axes = _axes(sweep, "zip", sweep.config.zip)
    if not axes:
        return [{}]
    lengths = {key: len(values) for key, values in axes.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{key} has {length}" for key, length in lengths.items())
        raise TsaeError(f"{sweep.path}: zip: lists of one length are expected; {found}")
    return [dict(zip(axes, values, strict=True)) for values in zip(*axes.values(), strict=True)]


def _listed(sweep: Sweep) -> list[dict[str, Any]]:
    rows = [dict(flatten(row)) for row in sweep.config.list]
    for number, row in enumerate(rows):
        for key in row:
            _refuse_unknown(sweep, f"list[{number}]", key)
    return rows or [{}]


def _drawn(sweep: Sweep) -> list[dict[str, Any]]:
    if not sweep.config.random:
        return [{}]
    where = f"{sweep.path}: random"
    tree = dict(sweep.config.random)
    count, seed = (schema.convert(int, tree.pop(name, None), where, name) for name in ("n", "seed"))
    if count < 1:
        raise TsaeError(f"{where}: n: {count} is impossible; it must be at least 1")
    axes: dict[str, Any] = {}
    known = _known_axes()
    for key, value in flatten(tree):
        setting, _, way = key.rpartition(".")
        axis, choice = (setting, {way: value}) if key not in known and setting in known else (key, value)
        _refuse_unknown(sweep, "random", axis)
        axes[axis] = choice
    if not axes:
        raise TsaeError(
            f"{where}: no axis besides n and seed; for example training.lr: {{log_uniform: [1.0e-4, 1.0e-2]}}"
        )
    return draw_points(axes, count, seed, where)


def _axes(sweep: Sweep, part: str, tree: Mapping[str, Any]) -> dict[str, list[Any]]:
    axes = dict(flatten(tree))
    for key, values in axes.items():
        _refuse_unknown(sweep, part, key)
        if not isinstance(values, list):
            raise TsaeError(f"{sweep.path}: {part}.{key}: a list of values is expected, found {schema.kind_of(values)}")
        if not values:
            raise TsaeError(f"{sweep.path}: {part}.{key}: the list is empty; at least one value is expected")
    return axes


def _refuse_overlap(sweep: Sweep, choices: list[list[dict[str, Any]]]) -> None:
    if not any(row for rows in choices for row in rows):
        raise TsaeError(f"{sweep.path}: grid: empty, and so are zip, list and random; name at least one axis")
    seen: dict[str, str] = {}
    for part, rows in zip(("grid", "zip", "list", "random"), choices, strict=True):
        for key in dict.fromkeys(key for row in rows for key in row):
            if key in seen:
                raise TsaeError(f"{sweep.path}: {part}.{key}: {seen[key]} varies it too; it may be in one of them")
            seen[key] = part


def _refuse_unknown(sweep: Sweep, part: str, key: str) -> None:
    known = _known_axes()
    if key in known:
        return
    last = key.rpartition(".")[2]
    same = [path for path in known if path.rpartition(".")[2] == last]
    hint = f"did you mean '{same[0]}'? " if len(same) == 1 else suggestion(key, known)
    raise TsaeError(f"{sweep.path}: {part}.{key}: no such axis; {hint}an axis is a setting such as sae.k")


def _merged(parts: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for part in parts:
        merged.update(part)
    return merged


def _refuse_duplicates(sweep: Sweep, points: list[Point]) -> None:
    names: dict[str, Point] = {}
    contents: dict[str, Point] = {}
    for point in points:
        content = point.config.evaluation_hash + schema.stable_hash(schema.to_plain(point.config.experiments))
        for table, key in ((names, point.name), (contents, content)):
            if key in table:
                raise TsaeError(
                    f"{sweep.path}: the points '{table[key].name}' and '{point.name}' are the same run; "
                    "each combination may occur once"
                )
            table[key] = point
