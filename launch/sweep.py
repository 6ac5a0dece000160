"""Run a sweep: `python launch/sweep.py sweeps/split_fraction.yaml [section.key=value ...]`.

Expands the sweep into points and stages, skips what is complete, runs the rest and ends with a report. Running the
same command again is always safe: it continues what was interrupted and does exactly what is still missing.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from plan import Plan, make_plan
from stage import Stage
from sweepfile import BASES, load_sweep, shown

from tsae import config as configuration
from tsae import environment, locks
from tsae.errors import TsaeError, os_error_line

if TYPE_CHECKING:
    from jobs import Executor
    from runner import Task


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0 when everything is complete, 1 when a point failed, 2 for bad input."""
    given = _parser().parse_intermixed_args(arguments)
    if given.settings:
        print(configuration.help_text())
        return 0
    try:
        environment.load_dotenv()
        if given.file is None:
            raise TsaeError("command line: FILE: the sweep's YAML is missing; for example sweeps/split_fraction.yaml")
        plan = make_plan(load_sweep(given.file, given.base, given.overrides, given.name))
        if given.dry_run:
            print("\n".join(dry_run(plan)))
            return 0
        return run(plan, given.executor)
    except TsaeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {os_error_line(error, environment.home())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues from here", file=sys.stderr)
        return 130


def run(plan: Plan, executor: str = "auto") -> int:
    """Do what is missing of `plan`, then write the report; the exit code."""
    from report import is_current, page_path, short_table, write_report

    unfinished = plan.unfinished()
    broken: list[Task] = []
    if unfinished:
        plan.write_configs()
        broken = _run_stages(plan, unfinished, executor)
    else:
        print(f"{plan.name}: nothing to do, all {len(plan.points)} points are complete", file=sys.stderr)
    if "report" in plan.sweep.config.stages:
        page = page_path(plan) if is_current(plan) else write_report(plan)
        print("\n".join(short_table(plan)))
        print(f"report: {page}")
    return _verdict(plan, broken)


def dry_run(plan: Plan) -> list[str]:
    """What would be done, as lines."""
    unfinished = {stage.key for stage in plan.unfinished()}
    axes = list(dict.fromkeys(key for point in plan.points for key in point.axes))
    rows = [["point", *axes]]
    rows += [[point.name, *(shown(point.value(key)) for key in axes)] for point in plan.points]
    lines = [f"{plan.name}: {len(plan.points)} points", *_table(rows), ""]
    rows = [["stage", "subject", "points", "state"]]
    for stage in plan.stages:
        holder = locks.owner(stage.lock)
        state = "to run" if stage.key in unfinished else "complete" if stage.is_done() else "not needed"
        state += f", {holder} is working on it" if holder else ""
        rows.append([stage.kind, stage.subject, str(len(stage.points)), state])
    lines += [f"{len(plan.stages)} stages, {len(unfinished)} to run", *_table(rows), ""]
    return [*lines, f"results: {plan.folder}", "dry run: nothing was started"]


def _run_stages(plan: Plan, stages: list[Stage], executor: str) -> list[Task]:
    from display import Terminal
    from jobs import visible_gpus
    from runner import Queue

    skipped = len(plan.stages) - len(stages)
    terminal = Terminal()
    cores, gpus = environment.available_cores(), visible_gpus()
    terminal.say(
        f"{plan.name}: {len(plan.points)} points, {len(stages)} stages to run, {skipped} complete; "
        f"{cores} cores, {len(gpus)} GPUs; logs in {plan.folder / 'logs'}"
    )
    signal.signal(signal.SIGTERM, _interrupt)
    return Queue(stages, _executor(executor), terminal, cores, gpus).run()


def _executor(name: str) -> Executor:
    from jobs import DebugExecutor, LocalExecutor

    return DebugExecutor() if name == "debug" else LocalExecutor()


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _verdict(plan: Plan, broken: list[Task]) -> int:
    failed = [task for task in broken if task.state == "failed"]
    if not broken:
        return 0
    lost = {point for task in broken for point in task.stage.points}
    print(f"\n{len(lost)} of {len(plan.points)} points are not complete:", file=sys.stderr)
    for task in failed:
        log = f"\n    log: {task.job.log}" if task.job else ""
        print(f"  {task.stage.label}: {task.error}{log}", file=sys.stderr)
    print("the same command tries them again", file=sys.stderr)
    return 1


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _parser() -> argparse.ArgumentParser:
    bases = ", ".join(sorted(path.stem for path in BASES.glob("*.yaml")))
    parser = argparse.ArgumentParser(
        prog="launch/sweep.py",
        description="Train and compare dictionaries over the points of a sweep, then write a report.",
        epilog=f"bases: {bases}. Everything lands under TSAE_HOME (default ./runs). "
        "Running the same command again continues and does only what is missing.",
    )
    parser.add_argument(
        "file", nargs="?", type=Path, metavar="FILE", help="the sweep's YAML, such as sweeps/split_fraction.yaml"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that differ from the base, such as sae.k=40"
    )
    parser.add_argument("--base", metavar="NAME|FILE", help="another base configuration than the sweep's own")
    parser.add_argument(
        "--name", help="name of the sweep's folders, instead of one made from sweep, base and overrides"
    )
    parser.add_argument(
        "--executor",
        choices=("auto", "local", "debug"),
        default="auto",
        help="local: processes of this machine; debug: inside this process; auto: local",
    )
    parser.add_argument("--dry-run", action="store_true", help="show points and stages, start nothing")
    parser.add_argument("--settings", action="store_true", help="print every setting with its meaning")
    return parser


if __name__ == "__main__":
    sys.exit(main())
