"""The rest of a sweep that is larger than a site's limit on submitted jobs, as a job: it makes the next launch."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tsae.report.write import write_report
from tsae.runtime import preemption
from tsae.runtime.errors import TsaeError
from tsae.sweep.attempt import Attempt
from tsae.sweep.commandline import load_folder
from tsae.sweep.launcher import Launched, Options, launch
from tsae.sweep.plan import Plan, make_plan
from tsae.sweep.schedulers.base import Full

WAIT_SECONDS = 60.0


def submit_stage(
    configs: str, executor: str, cluster: str | None, container: str | None, inexact: bool, path: str
) -> None:
    """Submit what the launch whose configurations are in folder `configs` has left, as the latest launch describes it.

    `path` is the PYTHONPATH of the shell that launched it. While others take all the room, it waits.
    """
    os.environ["PYTHONPATH"] = path
    own = Attempt(Path(configs).parent)
    rest = own.rest()
    if rest is None:
        raise TsaeError(f"{own.folder}: nothing was left to submit")
    options = Options(
        executor=executor,
        cluster=Path(cluster) if cluster else None,
        container=container,
        inexact=inexact,
        rest=rest,
    )
    plan = make_plan(load_folder(own.folder.parents[1]))
    plan.decide_on_data(accept=False)
    plan = plan.inexact() if inexact else plan
    launched = _when_there_is_room(plan, options)
    if plan.report() and not launched.submitted and not launched.choice.left and not plan.compared.is_current():
        write_report(plan.compared)  # nothing was left but that


def _when_there_is_room(plan: Plan, options: Options) -> Launched:
    while True:
        try:
            launched = launch(plan, options)
            if launched.submitted or launched.rest is None:
                return launched
        except Full as full:
            print(f"waiting: {full}", file=sys.stderr, flush=True)
        preemption.wait(WAIT_SECONDS)
