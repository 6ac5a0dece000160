"""What `tsae sweep`, `cancel`, `report` and `claims` do.

A sweep is expanded into points and stages; what is complete is skipped, the rest is run, and a report ends it. Running
the same command again is always safe: it continues what was interrupted and does exactly what is still missing.
"""

from __future__ import annotations

import argparse
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING

from tsae.config import run as configuration
from tsae.sweep.commandline import plan_of, sweep_of, words_of
from tsae.sweep.plan import Plan

if TYPE_CHECKING:
    from tsae.sweep.launcher import Launched, Options


def sweep(given: argparse.Namespace) -> int:
    """`tsae sweep`: 0 when everything is complete or under way, 1 when a point failed. Raises TsaeError."""
    if given.settings:
        print(configuration.help_text())
        return 0
    if given.cancel:
        return cancel_sweep(given)
    plan = plan_of(given)
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
    return run(plan, options, f"{given.status_command} {words_of(given)}")


def cancel_sweep(given: argparse.Namespace) -> int:
    """`tsae cancel`: end what runs or waits of a sweep."""
    from tsae.sweep.cancel import cancel
    from tsae.sweep.chain import Chain

    sweep = sweep_of(given)
    print("\n".join(cancel(Chain(sweep).folder)) or f"{sweep.folder_name}: nothing is running or queued")
    return 0


def report(plan: Plan) -> None:
    """`tsae report`: write it, and print the short table and where the page is."""
    from tsae.report.write import short_table, write_report

    page = write_report(plan.compared)
    print("\n".join(short_table(plan.compared)))
    print(f"report: {page}")


def claims(plan: Plan) -> None:
    """`tsae claims`: write the verdicts, and print them."""
    from tsae.report.claims import as_text, write_claims

    print(as_text(plan.compared, write_claims(plan.compared)), end="")


def run(plan: Plan, options: Options, status: str) -> int:
    """Do what is missing of `plan`, or have it done; the exit code. `status` is the command that tells how it does."""
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
