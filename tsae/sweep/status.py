"""How a sweep is doing: what `tsae status` prints.

Reads what the stages wrote, and asks a scheduler only which of its jobs live. It may run anywhere and at any time.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping, Sequence

from tsae.runtime import metadata
from tsae.runtime.errors import TsaeError, suggestion
from tsae.runtime.state import LIVE, Record, State
from tsae.sweep.overview import counts, headline, log_texts, not_submitted, point_rows
from tsae.sweep.plan import Plan
from tsae.sweep.stage import Stage
from tsae.sweep.survey import Survey

WATCH_SECONDS = 3.0
HAD = (*LIVE, State.DONE)
WIDE = 200
"""Columns where the output is no terminal."""


def show(plan: Plan, *, logs: str | None = None, watch: bool = False, everything: bool = False) -> None:
    """`tsae status`: print the picture, once or until nothing lives any more, or the `logs` of one point."""
    if logs is not None:
        print("\n".join(_logs(plan, logs)))
    elif watch:
        _watch(plan, everything)
    else:
        print("\n".join(status_lines(plan, _columns(), everything)[0]))


def status_lines(plan: Plan, width: int, everything: bool = False, watch: bool = False) -> tuple[list[str], bool]:
    """The whole picture in lines of at most `width` columns (paths and errors may be longer); whether anything lives."""
    every = [one for stage in plan.stages for one in stage.apart]
    stages = [*every, *(stage for stage in [plan.report()] if stage)]
    survey = Survey(plan, whatever_answers=True)
    standings = survey.standings(stages)
    lines = [*headline(plan, stages, standings), *_changes(plan), "", *counts(stages, standings), ""]
    for scheduler, said in survey.silence.items():
        lines[2:2] = [f"{scheduler} does not answer ({said}): what is not done stands as its job said last"]
    lines[2:2] = [*survey.damaged, *_damaged_results(plan, stages, standings)]
    rest = survey.sweep_attempts[-1].rest() if survey.sweep_attempts else None
    left = [stage for stage in stages if rest and stage.key in rest.stages and standings[stage.key].state not in HAD]
    if rest and left:
        points = {point for stage in left for point in stage.points}
        lines[2:2] = [not_submitted(rest, len(left), len(points), survey.submitter())]
    lines += point_rows(plan, stages, standings, width, everything, watch)
    return lines, any(standing.state in LIVE for standing in standings.values())


def _damaged_results(plan: Plan, stages: Sequence[Stage], standings: Mapping[str, Record]) -> list[str]:
    """Which results are there and not what was written, in words; they do not count, and are made again."""
    open_points = {point for stage in stages if standings[stage.key].state != State.DONE for point in stage.points}
    runs = [plan.run(point) for point in plan.points if point.name in open_points - plan.damaged.keys()]
    found = [(path, metadata.damage(path)) for run in runs for path in sorted(run.measured.glob("*.json"))]
    return [f"{path}: {wrong}; it does not count" for path, wrong in found if wrong]


def _changes(plan: Plan) -> list[str]:
    """Which runs were trained on data that are not there any more."""
    changed = plan.changes()
    if not changed:
        return []
    name, what = next(iter(changed.items()))
    more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    return [f"trained on other data: {name}{more}: {what}; what is shown was measured on the data of the training"]


def _watch(plan: Plan, everything: bool) -> None:
    """Draw the picture anew every few seconds until nothing lives any more."""
    alive = True
    while alive:
        lines, alive = status_lines(plan, _columns(), everything, watch=True)
        if sys.stdout.isatty():
            size = shutil.get_terminal_size()
            shown = [line[: size.columns] for line in lines[: size.lines - 1]]
            print("\x1b[H\x1b[J" + "\n".join(shown), flush=True)
        else:
            print("\n".join(lines), flush=True)
        if alive:
            time.sleep(WATCH_SECONDS)


def _logs(plan: Plan, point: str) -> list[str]:
    """The ends of the logs of one point."""
    names = [candidate.name for candidate in plan.points]
    if point not in names:
        raise TsaeError(
            f"--logs {point}: no such point; {suggestion(point, names)}the sweep has {', '.join(names[:20])}"
        )
    stages = [one for stage in plan.stages for one in stage.apart if point in one.points]
    return log_texts(stages, Survey(plan, whatever_answers=True).standings(stages))


def _columns() -> int:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDE
