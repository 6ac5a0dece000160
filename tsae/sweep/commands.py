"""The commands `tsae sweep`, `status`, `report`, `compare`, `claims`, `cancel` and `runs`.

A sweep is expanded into points and stages; what is complete is skipped, the rest is run, and a report ends it. Running
the same command again is always safe: it continues what was interrupted and does exactly what is still missing.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from tsae.experiments.commands import add_accept_argument
from tsae.runtime import environment
from tsae.runtime.environment import SWEEPS
from tsae.runtime.errors import TsaeError
from tsae.sweep.commandline import add_sweep_arguments, part_words, plan_of, sweep_of, words_of
from tsae.sweep.schedulers import SCHEDULERS

if TYPE_CHECKING:
    from tsae.sweep.launcher import Launched, Options
    from tsae.sweep.plan import Plan

CLAIMS = "claims"
"""The shipped sweep that puts the paper's claims."""
INEXACT_HELP = "go on with trainings whose state another version of torch or tsae saved"
PROBE_HELP = "time a few seconds of reading and of training on this machine, and say how long all will take"

AddCommand = Callable[[str, Callable[[argparse.Namespace], int | None], str], argparse.ArgumentParser]


def add_commands(add: AddCommand) -> None:
    """The commands that take a sweep. Heavy imports wait until one of them runs."""
    sweep = add("sweep", _sweep, "run what is missing of a sweep, and report it")
    add_sweep_arguments(sweep)
    _add_launch_arguments(sweep)
    sweep.add_argument("--cancel", action="store_true", help="end what runs or waits of this sweep, and nothing else")
    sweep.add_argument("--settings", action="store_true", help="print every setting with its meaning")

    status = add("status", _status, "how a sweep is doing")
    add_sweep_arguments(status)
    status.add_argument("--watch", action="store_true", help="draw anew every few seconds until nothing runs or waits")
    status.add_argument("--logs", metavar="POINT", help="the end of each log of one point")
    status.add_argument("--all", action="store_true", help="every point, however many there are")

    add_sweep_arguments(add("report", _report, "write the tables, figures and page of a sweep, whatever is there"))
    compare = add("compare", _compare, "one table and page of any runs; what was measured on other texts is not ranked")
    compare.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run's name or folder, a folder of runs, a sweep's folder or YAML"
    )
    compare.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the page (default: TSAE_HOME/comparisons/…)"
    )
    claims = add(
        "claims",
        _claims,
        "judge the paper's claims: on what is there of a SWEEP over kinds and seeds, or, without one, on the shipped sweep "
        f"'{CLAIMS}', of which what is missing is run first",
    )
    add_sweep_arguments(claims)
    _add_launch_arguments(claims)
    add_sweep_arguments(add("cancel", _cancel, "end what runs or waits of a sweep, and nothing else"))

    runs = add("runs", _runs, "list the runs, sweeps and stores under TSAE_HOME")
    runs.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="another folder than TSAE_HOME")


def _add_launch_arguments(command: argparse.ArgumentParser) -> None:
    """What a command that runs a sweep is told of how to."""
    bases = ", ".join(sorted(path.stem for path in (SWEEPS / "bases").glob("*.yaml")))
    command.epilog = (
        f"bases: {bases}. Everything lands under TSAE_HOME (default ./runs). "
        "Running the same command again continues and does only what is missing."
    )
    command.add_argument(
        "--executor",
        choices=("auto", *SCHEDULERS, "local", "debug"),
        default="auto",
        help=f"{', '.join(SCHEDULERS)}: submit and return; local: processes of this machine; debug: inside this process; "
        "auto: the first scheduler that answers, else local",
    )
    command.add_argument(
        "--cluster", type=Path, metavar="FILE", help="a site's defaults, instead of ~/.config/tsae/cluster.yaml"
    )
    command.add_argument(
        "--container", metavar="IMAGE", help="run every job in tsae.sif, docker://owner/image or docker:image"
    )
    command.add_argument("--retry-failed", action="store_true", help="try again what failed; else it is only named")
    add_accept_argument(command)
    command.add_argument(
        "--inexact", action="store_true", help=f"{INEXACT_HELP}, those that failed over it among them; results say so"
    )
    command.add_argument("--detach", action="store_true", help="local: return once the queue runs, do not follow it")
    command.add_argument(
        "--dry-run", action="store_true", help="show points, stages, their cost and job scripts, start nothing"
    )
    command.add_argument("--probe", action="store_true", help=PROBE_HELP)


def _sweep(given: argparse.Namespace) -> int:
    """0 when everything is complete or under way, 1 when a point failed."""
    if given.settings:
        from tsae.config import run as configuration

        print(configuration.help_text())
        return 0
    if given.cancel:
        beside = [name for name in ("dry_run", "probe", "detach", "retry_failed", "inexact") if getattr(given, name)]
        if beside:
            raise TsaeError(f"--cancel: it starts nothing; leave --{beside[0].replace('_', '-')} out")
        return _cancel(given)
    return _launch(given)


def _launch(given: argparse.Namespace) -> int:
    if given.detach and given.executor == "debug":
        raise TsaeError("--detach: the executor debug works in this very process; leave one of them out")
    plan = plan_of(given)
    plan.decide_on_data(given.accept_new_data)
    plan = plan.inexact() if given.inexact else plan
    from tsae.sweep.launcher import Options

    options = Options(
        executor=given.executor,
        cluster=given.cluster,
        container=given.container,
        retry_failed=given.retry_failed or given.inexact,
        inexact=given.inexact,
        detach=given.detach,
        probe=given.probe,
    )
    if given.dry_run:
        from tsae.sweep.dryrun import REFUSED, dry_run

        lines = dry_run(plan, options)
        print("\n".join(lines))
        return 2 if lines[-1].startswith(REFUSED) else 0
    return run(plan, options, f"{given.status_command} {words_of(given)}")


def _cancel(given: argparse.Namespace) -> int:
    from tsae.sweep.cancel import cancel
    from tsae.sweep.chain import Chain

    sweep = sweep_of(given)
    print("\n".join(cancel(Chain(sweep).folder)) or f"{sweep.folder_name}: nothing is running or queued")
    return 0


def _status(given: argparse.Namespace) -> None:
    from tsae.sweep import status

    if given.watch and given.logs is not None:
        raise TsaeError("--logs: it prints the end of logs once; leave --watch out")
    status.show(plan_of(given, to_look_at=True), logs=given.logs, watch=given.watch, everything=given.all)


def _report(given: argparse.Namespace) -> None:
    from tsae.report.write import short_table, write_report

    plan = plan_of(given, to_look_at=True)
    if not plan.compared.anything():
        raise TsaeError(
            f"{plan.name}: nothing to report yet: none of its {len(plan.points)} points has been trained or measured"
        )
    page = write_report(plan.compared)
    print("\n".join(short_table(plan.compared)))
    print(f"report: {page}")


def _compare(given: argparse.Namespace) -> None:
    from tsae.config.points import file_name
    from tsae.report.side_by_side import write_comparison
    from tsae.sweep.compare import entries_of

    name = file_name(" vs ".join(Path(word).name for word in given.runs))
    written = write_comparison(entries_of(given.runs), given.out or environment.home() / "comparisons" / name)
    print("\n".join(written.lines))
    print(f"report: {written.page}")


def _claims(given: argparse.Namespace) -> int:
    """Of a sweep that is named, 0; else 0 when all is complete or under way, 1 when a point failed."""
    part_words(given)
    if given.file is None:
        given.file = CLAIMS
        return _launch(given)  # the report that ends the shipped sweep has the claims
    if given.dry_run:
        return _launch(given)
    from tsae.report.claims import as_text, write_claims

    plan = plan_of(given)
    print(as_text(plan.compared, write_claims(plan.compared)), end="")
    return 0


def _runs(given: argparse.Namespace) -> None:
    from tsae.sweep.runs import listing

    if given.folder is not None and not given.folder.is_dir():
        raise TsaeError(f"{given.folder}: no such folder; one that runs and sweeps lie under is expected")
    print("\n".join(listing(given.folder or environment.home())))


def run(plan: Plan, options: Options, status: str) -> int:
    """Do what is missing of `plan`, or have it done; the exit code. `status` is the command that tells how it does."""
    from tsae.sweep.launcher import launch
    from tsae.sweep.overview import not_submitted
    from tsae.sweep.survey import Survey

    signal.signal(signal.SIGTERM, _interrupt)
    if not plan.unfinished():
        print(f"{plan.name}: nothing to do, all {len(plan.points)} points are complete", file=sys.stderr)
        _show_report(plan)
        return 0
    launched = launch(plan, options)
    rest = launched.rest
    under_way = launched.submitted or launched.choice.left or rest
    if under_way:
        given = [f"{launched.submitted} stages were submitted"] if launched.submitted else []
        given += [f"{len(launched.choice.left)} are under way from before"] if launched.choice.left else []
        if rest:
            print(not_submitted(rest, len(rest.stages), len(rest.points), Survey(plan).submitter()), file=sys.stderr)
        print(f"{plan.name}: {', '.join(given) or 'nothing was submitted'}; see how they do with", file=sys.stderr)
        print(f"    {status}", file=sys.stderr)
    else:
        _show_report(plan)
    return _verdict(plan, launched)


def _show_report(plan: Plan) -> None:
    """Print the short table and where the report is; write it first if a job has not."""
    from tsae.report.write import short_table, write_report

    if "report" in plan.sweep.config.stages:
        page = plan.compared.page if plan.compared.is_current() else write_report(plan.compared)
        print("\n".join(short_table(plan.compared)))
        if plan.sweep.config.report.claims:
            from tsae.report.claims import as_text, write_claims

            print(as_text(plan.compared, write_claims(plan.compared)), end="")
        print(f"report: {page}")


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _verdict(plan: Plan, launched: Launched) -> int:
    """Name what failed, now or before; the exit code."""
    choice = launched.choice
    broken = [(task.stage, str(task.state), task.status.error, task.status.log) for task in launched.broken]
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
