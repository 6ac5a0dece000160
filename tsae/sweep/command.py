"""Run a sweep: `python launch/sweep.py sweeps/split_fraction.yaml [section.key=value ...]`.

Expands the sweep into points and stages, skips what is complete, runs the rest and ends with a report. Running the
same command again is always safe: it continues what was interrupted and does exactly what is still missing.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from tsae.config import run as configuration
from tsae.runtime import environment
from tsae.runtime.errors import TsaeError, os_error_line
from tsae.sweep.commandline import add_sweep_arguments, sweep_of
from tsae.sweep.made_from import is_current, page_path
from tsae.sweep.plan import Plan, make_plan
from tsae.sweep.schedulers import SCHEDULERS
from tsae.sweep.sweepfile import BASES

if TYPE_CHECKING:
    from tsae.sweep.launcher import Launched, Options


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0 when everything is complete or under way, 1 when a point failed, 2 for bad input."""
    given = _parser().parse_intermixed_args(arguments)
    if given.settings:
        print(configuration.help_text())
        return 0
    try:
        return _run(given)
    except TsaeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {os_error_line(error, environment.home())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues from here", file=sys.stderr)
        return 130


def run(plan: Plan, options: Options, words: list[str]) -> int:
    """Do what is missing of `plan`, or have it done; the exit code. `words` name the sweep on a command line."""
    from tsae.sweep.launcher import launch

    signal.signal(signal.SIGTERM, _interrupt)
    if not plan.unfinished():
        print(f"{plan.name}: nothing to do, all {len(plan.points)} points are complete", file=sys.stderr)
        _show_report(plan)
        return 0
    launched = launch(plan, options)
    under_way = launched.submitted or launched.choice.left
    if under_way:
        given = [f"{launched.submitted} stages were submitted"] if launched.submitted else []
        given += [f"{len(launched.choice.left)} are under way from before"] if launched.choice.left else []
        print(f"{plan.name}: {', '.join(given)}; see how they do with", file=sys.stderr)
        print(f"    python launch/status.py {shlex.join(words)}", file=sys.stderr)
    else:
        _show_report(plan)
    return _verdict(plan, launched)


def _run(given: argparse.Namespace) -> int:
    sweep = sweep_of(given)
    if given.cancel:
        from tsae.sweep.cancel import cancel
        from tsae.sweep.chain import Chain

        print("\n".join(cancel(Chain(sweep).folder)) or f"{sweep.folder_name}: nothing is running or queued")
        return 0
    plan = make_plan(sweep)
    from tsae.sweep.launcher import Options

    options = Options(
        executor=given.executor,
        cluster=given.cluster,
        container=given.container,
        retry_failed=given.retry_failed,
        detach=given.detach,
    )
    if given.dry_run:
        from tsae.sweep.dryrun import dry_run

        print("\n".join(dry_run(plan, options)))
        return 0
    return run(plan, options, _words(given))


def _show_report(plan: Plan) -> None:
    """Print the short table and where the report is; write it first if a job has not."""
    from tsae.report.command import short_table, write_report

    if "report" in plan.sweep.config.stages:
        page = page_path(plan) if is_current(plan) else write_report(plan)
        print("\n".join(short_table(plan)))
        if plan.sweep.config.report.claims:
            from tsae.report.claims import as_text, write_claims

            print(as_text(plan, write_claims(plan)), end="")
        print(f"report: {page}")


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _verdict(plan: Plan, launched: Launched) -> int:
    """Name what failed, now or before; the exit code."""
    choice = launched.choice
    broken = [(task.stage, task.state, task.status.error, task.status.log) for task in launched.broken]
    for stage in choice.failed:
        standing = choice.standings[stage.key]
        broken.append((stage, "failed before", standing.error, standing.log))
    if not broken and not (choice.blocked and not choice.left):
        return 0
    lost = {point for stage, *_ in broken for point in stage.points}
    lost |= {point for stage in choice.blocked for point in stage.points}
    print(f"\n{len(lost)} of {len(plan.points)} points are not complete:", file=sys.stderr)
    for stage, state, error, log in broken:
        if state == "blocked":
            continue
        print(f"  {stage.label}: {state}: {error}" + (f"\n    log: {log}" if log else ""), file=sys.stderr)
    states = {state for _, state, *_ in broken}
    if "interrupted" in states:
        print("the same command continues what was interrupted", file=sys.stderr)
    if states & {"failed", "failed before"}:
        print("the same command with --retry-failed tries again what failed", file=sys.stderr)
    return 1


def _words(given: argparse.Namespace) -> list[str]:
    """What names the sweep on the command line."""
    options = [
        word for name in ("base", "name") if getattr(given, name) for word in (f"--{name}", getattr(given, name))
    ]
    return [str(given.file), *given.overrides, *options]


def _parser() -> argparse.ArgumentParser:
    bases = ", ".join(sorted(path.stem for path in BASES.glob("*.yaml")))
    parser = argparse.ArgumentParser(
        prog="launch/sweep.py",
        description="Train and compare dictionaries over the points of a sweep, then write a report.",
        epilog=f"bases: {bases}. Everything lands under TSAE_HOME (default ./runs). "
        "Running the same command again continues and does only what is missing.",
    )
    add_sweep_arguments(parser)
    parser.add_argument(
        "--executor",
        choices=("auto", *SCHEDULERS, "local", "debug"),
        default="auto",
        help=f"{', '.join(SCHEDULERS)}: submit and return; local: processes of this machine; debug: inside this process; "
        "auto: the first scheduler that answers, else local",
    )
    parser.add_argument(
        "--cluster", type=Path, metavar="FILE", help="a site's defaults, instead of ~/.config/tsae/cluster.yaml"
    )
    parser.add_argument(
        "--container", metavar="IMAGE", help="run every job in tsae.sif, docker://owner/image or docker:image"
    )
    parser.add_argument("--retry-failed", action="store_true", help="try again what failed; else it is only named")
    parser.add_argument("--detach", action="store_true", help="local: return once the queue runs, do not follow it")
    parser.add_argument("--cancel", action="store_true", help="end what runs or waits of this sweep, and nothing else")
    parser.add_argument("--dry-run", action="store_true", help="show points, stages and batch scripts, start nothing")
    parser.add_argument("--settings", action="store_true", help="print every setting with its meaning")
    return parser


if __name__ == "__main__":
    sys.exit(main())
