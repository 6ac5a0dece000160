"""The words and tables of `status.py`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from tsae.config.points import Point
from tsae.runtime.state import BROKEN, LIVE, Record, State
from tsae.sweep.attempt import Rest
from tsae.sweep.curves import curves
from tsae.sweep.plan import Plan
from tsae.sweep.queue.display import duration, read_progress
from tsae.sweep.stage import KINDS, Stage
from tsae.training.splits import beside, last_line, of_splits

NOTABLE = (
    *(State.FAILED, State.INTERRUPTED, State.RUNNING, State.PREEMPTED, State.QUEUED),
    *(State.BLOCKED, State.WAITING, State.DONE),
)
"""States by what a person wants to see first."""
WITH_LOG = NOTABLE[:4]
MOST_ROWS = 40
LOG_LINES = 30
COLUMNS = (
    "point",
    "stage",
    "state",
    "node",
    "elapsed",
    "progress",
    "rate",
    "alive H/L",
    "share H/L",
    "FVE H/L",
    "loss",
    "FVE",
)
BEGUN = (State.RUNNING, State.PREEMPTED, State.INTERRUPTED, State.FAILED, State.DONE)
"""States in which a point's run has lines of its own, if it has any."""

Standings = Mapping[str, Record]


def headline(plan: Plan, stages: Sequence[Stage], standings: Standings) -> list[str]:
    """What is looked at, and how far it is."""
    done = sum(standings[stage.key].state == "done" for stage in stages)
    return [
        f"{plan.name}: {len(plan.points)} points, {done} of {len(stages)} stages done   {time.strftime('%H:%M:%S')}",
        f"in {plan.folder}",
    ]


def not_submitted(rest: Rest, stages: int, points: int, submitter: Record) -> str:
    """What a scheduler had no room for, and who submits it: a line for people."""
    if submitter.state in LIVE:
        who = f"job {submitter.job} submits them once what was submitted has ended"
    elif submitter.state in BROKEN:
        who = f"job {submitter.job}, which was to submit them, {submitter.state}: {submitter.error}; the same command does"
    else:
        who = "the same command submits them once there is room"
    return f"{stages} stages of {points} points are not submitted yet ({rest.limit}): {who}"


def counts(stages: Sequence[Stage], standings: Standings) -> list[str]:
    """One line for each kind of stage: how many are in which state; states that occur nowhere are left out."""
    found: dict[str, Counter[str]] = {}
    for stage in stages:
        found.setdefault(stage.kind, Counter())[standings[stage.key].state] += 1
    columns = [state for state in State if state == "done" or any(counter[state] for counter in found.values())]
    rows = [["stage", *columns]]
    for kind in sorted(found, key=KINDS.index):
        counter = found[kind]
        rows.append([kind, f"{counter['done']}/{counter.total()}", *(str(counter[s] or "") for s in columns[1:])])
    return _aligned(rows, right=range(1, len(rows[0])))


def point_rows(
    plan: Plan, stages: Sequence[Stage], standings: Standings, width: int, everything: bool = False, watch: bool = False
) -> list[str]:
    """One line for each point, with its log below while it runs, its error if it has one, and its curves for a `watch`.

    Harvests, which many points share, and the report have lines of their own until they are done.
    """
    shown = _shown(plan, stages, standings)
    if len(shown) > MOST_ROWS and not everything:
        shown.sort(key=lambda entry: NOTABLE.index(entry[2].state))
    hidden = [] if everything else shown[MOST_ROWS:]
    shown = shown[: len(shown) - len(hidden)]
    points = {point.name: point for point in plan.points}
    rows = [list(COLUMNS)]
    for name, stage, standing in shown:
        begun = name in points and standing.state in BEGUN
        splits = _splits(plan, points[name]) if begun else ("", "", "")
        drawn = curves(plan.run(points[name]).metrics) if begun and watch else ("", "")
        rows.append([name, *_cells(stage, standing), *splits, *drawn])
    table = _fitting(rows, width)
    lines = table[0]
    for below, (_, _, standing) in zip(table[1:], shown, strict=True):
        lines += below
        if standing.error:
            lines.append(f"    {standing.error}")
        if standing.log and standing.state in WITH_LOG:
            lines.append(f"    log: {_relative(standing.log, plan.folder)}")
    if hidden:
        states = Counter(standing.state for _, _, standing in hidden)
        rest = ", ".join(f"{states[state]} {state}" for state in State if states[state])
        lines.append(f"... and {len(hidden)} more: {rest} (--all shows them)")
    return lines


def log_texts(stages: Sequence[Stage], standings: Standings) -> list[str]:
    """The end of each stage's log, under its path."""
    lines: list[str] = []
    for stage in stages:
        standing = standings[stage.key]
        path = Path(standing.log) if standing.log else None
        if path is None or not path.is_file():
            lines.append(f"== {stage.label}: {standing.state}, no log")
            continue
        lines.append(f"== {stage.label}: {standing.state}; the end of {path}")
        lines += path.read_text(errors="replace").splitlines()[-LOG_LINES:]
    return lines


def _shown(plan: Plan, stages: Sequence[Stage], standings: Standings) -> list[tuple[str, Stage, Record]]:
    """Name, stage and standing of each line: shared stages that are not done, and the most telling stage of each point."""
    shared = [stage for stage in stages if stage.kind in ("harvest", "report") and standings[stage.key].state != "done"]
    own: dict[str, list[Stage]] = {point.name: [] for point in plan.points}
    for stage in stages:
        for point in stage.points if stage.kind != "harvest" else ():
            own[point].append(stage)
    found = [(stage.subject, stage, standings[stage.key]) for stage in shared if stage.kind == "harvest"]
    for point, members in own.items():
        if members:
            stage = _most_telling(members, standings)
            found.append((point, stage, standings[stage.key]))
    return found + [(stage.kind, stage, standings[stage.key]) for stage in shared if stage.kind == "report"]


def _most_telling(stages: Sequence[Stage], standings: Standings) -> Stage:
    """The first in the most notable state; of a point that is complete, the last."""
    return min(
        reversed(stages) if all(standings[stage.key].state == "done" for stage in stages) else stages,
        key=lambda stage: NOTABLE.index(standings[stage.key].state),
    )


def _cells(stage: Stage, standing: Record) -> list[str]:
    elapsed = ""
    if standing.started is not None and (standing.ended is not None or standing.state == "running"):
        elapsed = duration(max(0.0, (standing.ended or time.time()) - standing.started))
    progress, rate = _progress(stage, standing) if standing.state in ("running", "preempted") else ("", "")
    return [stage.kind, standing.state, standing.host, elapsed, progress, rate]


def _splits(plan: Plan, point: Point) -> tuple[str, str, str]:
    """`0.98/0.91` of each split alive, `0.21/0.79` of the activity and `0.09/0.70` of the variance explained by each alone.

    All at the last line logged; of a dictionary without splits, what it has of its own.
    """
    line = last_line(plan.run(point).metrics)
    alive, share, alone = (of_splits(line, name, point.config) for name in ("alive", "share", "fve"))
    if len(point.config.sae.fractions) == 1 and line:
        alone = [line["fve"]]
    return beside(alive), beside(share), beside(alone)


def _progress(stage: Stage, standing: Record) -> tuple[str, str]:
    """`200/800 steps` and `12.5k tokens/s`, of what the stage's progress file says."""
    record = read_progress(stage, standing.started or 0.0)
    if not record or str(record.get("stage", "")).split(" ")[0] != stage.kind:
        return "", ""
    reached = f"{_short(record['done'])}/{_short(record['total'])}" if record.get("total") else _short(record["done"])
    rate, unit = float(record.get("rate") or 0.0), str(record["unit"])
    words = str(record.get("message", "")).split()
    if "tokens/s" in words[:-1]:
        rate, per = float(words[words.index("tokens/s") + 1]), "tokens"
    else:
        per = unit
    return f"{reached} {unit}", f"{_short(rate)} {per}/s" if rate else ""


def _short(number: float) -> str:
    """`800`, `12.5k`, `1.2M`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            return f"{number / (1e3 if letter == 'k' else size):.3g}{letter}"
    return f"{number:.3g}" if isinstance(number, float) and number < 1000 else f"{number:.0f}"


def _fitting(rows: list[list[str]], width: int) -> list[list[str]]:
    """Each row as one aligned line without columns that are empty; where that is too wide, names stand above the rest."""
    rows = [[row[i] for i in range(len(COLUMNS)) if i == 0 or any(other[i] for other in rows[1:])] for row in rows]
    lines = _aligned(rows)
    if max(map(len, lines)) <= width:
        return [[line] for line in lines]
    rest = _aligned([row[1:] for row in rows])
    return [[row[0], f"  {line}"] for row, line in zip(rows, rest, strict=True)]


def _aligned(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _relative(log: str, folder: Path) -> str:
    return str(Path(log).relative_to(folder)) if Path(log).is_relative_to(folder) else log
