"""Stages to a scheduler: one array after the other, of which none stays if one of them is refused.

Where a limit on submitted jobs is reached, whole points are submitted as long as they find room, and a job behind them
that submits the rest: one wave after the other, without anybody watching.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tsae.runtime import environment
from tsae.runtime.errors import TsaeError
from tsae.runtime.job import MOST_RESTARTS, Call
from tsae.sweep.attempt import Attempt, Rest, Submitted, job_name, python_path, shell_path
from tsae.sweep.cancel import undo_half_submissions
from tsae.sweep.cluster import Cluster
from tsae.sweep.container import Container
from tsae.sweep.schedulers.arrays import Array, to_arrays
from tsae.sweep.schedulers.base import Inputs, Limits, Order, Scheduler
from tsae.sweep.schedulers.wave import Wave
from tsae.sweep.stage import Stage

NEEDS_APPTAINER = (
    'command -v apptainer >/dev/null || echo "tsae: apptainer is not on PATH on $(hostname), and the job runs in a '
    "container; setup: ['module load apptainer'] in the cluster's file loads it where it is a module\" >&2"
)
"""The container's command fails then, as it would without this line of shell, but says less."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What goes to a scheduler in one launch."""

    scheduler: Scheduler
    sweep_folder: Path
    attempt: Attempt
    cluster: Cluster
    container: Container | None = None
    max_parallel: int | None = None
    """Most jobs of one array at the same time; by default the cluster's."""
    alive: Mapping[str, str] = field(default_factory=dict)
    """Stage key → job, for inputs that an earlier launch has submitted and that are not done."""
    rest: Stage | None = None
    """What submits the stages that find no room, once the others have ended; None where a job does that already."""

    def submit(self, stages: Sequence[Stage]) -> list[Submitted]:
        """Submit `stages`, which come after their inputs, with one call of the scheduler for each array.

        What finds no room is noted in the attempt. Raises TsaeError if the scheduler refuses an array for another
        reason, `Full` if it takes none; then none of them stays submitted and the attempt is taken away.
        """
        try:
            self.attempt.submitting.write_text(self.scheduler.name)
            self._submit_held(stages)
            self.attempt.submitting.unlink(missing_ok=True)
        except BaseException:
            # By the sweep's name: Ctrl-C may have come after the scheduler took an array and before its id was read.
            undo_half_submissions(self.sweep_folder)
            self.attempt.remove()
            raise
        return self.attempt.jobs()

    def _submit_held(self, stages: Sequence[Stage]) -> None:
        """Submit all arrays that find room, and let the first jobs start once the scheduler has taken the last one."""
        wave = Wave(self.scheduler, self.cluster, self.alive, self._order)
        full = wave.fill(stages)
        if full is not None:
            behind = wave.follow(self.rest) if self.rest else None
            left = [stage for stage in stages if stage.key not in wave.jobs]
            points = dict.fromkeys(point for stage in left for point in stage.points)
            self.attempt.leave(Rest(tuple(stage.key for stage in left), tuple(points), full.limit, behind))
        self.attempt.add_jobs(
            dataclasses.replace(wave.jobs[stage.key], stage=one.key, label=one.label)
            for stage in [*stages, *([self.rest] if self.rest else [])]
            if stage.key in wave.jobs
            for one in stage.apart
        )
        try:
            self.scheduler.release(wave.held)
        except TsaeError as error:
            raise TsaeError(f"{error}; were the jobs cancelled meanwhile? nothing stays submitted") from None

    def texts(self, stages: Sequence[Stage], known: Limits | None = None) -> list[str]:
        """The scripts that `submit` would hand over, with words where ids are not known yet."""
        ids: dict[Array, str] = {}
        texts: list[str] = []
        arrays = to_arrays(stages, self.cluster, (known or Limits()).max_array, self.alive)
        for number, array in enumerate(arrays):
            order = self._order(number, array, array.inputs(ids), array.is_free)
            texts.append(self.scheduler.script(order))
            ids[array] = f"<{order.folder.name}>"
        return texts

    def _order(self, number: int, array: Array, inputs: Inputs, hold: bool) -> Order:
        """`array` as the scheduler gets it, as the one of that `number` in this launch."""
        python, in_image = [sys.executable], self.container is not None and array.kind != "submit"
        if self.container is not None and in_image:
            # An image keeps the host's PYTHONPATH out, so the copy of the code is named to it.
            own = self.cluster.environment.get("PYTHONPATH")
            code = {"PYTHONPATH": python_path(self.attempt.code, own, *shell_path(in_image=True))}
            python = self.container.command(code, gpus=bool(array.resources.gpus))
        return Order(
            kind=array.kind,
            job_name=job_name(self.sweep_folder),
            comment=f"{array.kind} of {self.sweep_folder.name}",
            folder=self.attempt.folder / f"{number:02}-{array.kind}",
            calls=[
                Call(
                    record=str(stage.record),
                    function=stage.function,
                    arguments=stage.arguments_in(self.attempt.points),
                    label=stage.label,
                    attempt=self.attempt.stamp,
                    executor=self.scheduler.name,
                    processes=array.resources.processes,
                    then=stage.then_in(self.attempt.points),
                )
                for stage in array.stages
            ],
            resources=array.resources,
            inputs=inputs,
            hold=hold,
            max_parallel=self.max_parallel or self.cluster.max_parallel or len(array.stages),
            cluster=self.cluster,
            setup=[*self._setup(array.resources.cpus), *([NEEDS_APPTAINER] if in_image else [])],
            python=python,
        )

    def _setup(self, cpus: int | None) -> list[str]:
        """The site's lines, with PYTHONPATH as the launching shell had it, and then the variables of the jobs.

        What `module load` in the site's lines puts on PYTHONPATH stays, like all of it behind the copy of the code.
        """
        own = dict(self.cluster.environment)
        path = python_path(self.attempt.code, own.pop("PYTHONPATH", None))
        variables = {
            "TSAE_HOME": str(environment.home()),
            "PYTHONSAFEPATH": "1",  # else a folder `tsae` in the working directory would stand in for the copy
            MOST_RESTARTS: str(self.cluster.max_restarts),
            **({"OMP_NUM_THREADS": str(cpus)} if cpus else {}),
            **own,
        }
        return [
            # Absolute, and without the empty entries that mean the working directory.
            f"export PYTHONPATH={shlex.quote(os.pathsep.join(shell_path()))}",
            *self.cluster.setup,
            *(f"export {name}={shlex.quote(str(value))}" for name, value in variables.items()),
            f"export PYTHONPATH={shlex.quote(path)}${{PYTHONPATH:+:$PYTHONPATH}}",
        ]
