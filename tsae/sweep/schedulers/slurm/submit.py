"""Stages to Slurm, through submitit: one job array for each kind, which then needs no launcher.

What requeues a job is its batch script, on the host: a task in a container has no scontrol, and one that is being
ended cannot call it. The script knows a cancelled job from one whose time is over or whose place was taken.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tsae.runtime import environment
from tsae.runtime.errors import TsaeError
from tsae.runtime.job import MOST_RESTARTS, Call, run_on_slurm
from tsae.sweep.attempt import Attempt, Submitted
from tsae.sweep.cancel import undo_half_submissions
from tsae.sweep.cluster import Cluster
from tsae.sweep.container import Container
from tsae.sweep.schedulers.arrays import Array, to_arrays
from tsae.sweep.schedulers.slurm.query import Limits, complaint, job_name, limits, release
from tsae.sweep.snapshot import python_path
from tsae.sweep.stage import Stage

UNKNOWN_CLUSTER = Limits("unknown", 1001)

KEEP_SHELL = "trap : TERM  # the shell outlives its job step, to see why that ended"
REQUEUE = """\
code=$?
[ $code -eq 0 ] && exit 0
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
for _ in 1 2 3 4 5; do
    state=$(squeue --noheader --states=all --jobs="$job" --format='%T %r') && break
    sleep 2
done
echo "batch script: step ended with code $code; $job is ${state:-unknown}"
case "$code/$state" in
    # 75: left when asked to; 140, 143: was asked to before it could listen
    75/RUNNING* | 140/RUNNING* | 143/RUNNING* | */*TimeLimit | 75/)
        scontrol requeue "$job" && sleep 60 ;;
    # by itself; where there is no accounting, Slurm forgets
    */RUNNING*)
        echo $code >{folder}/"$job"_exit_code ;;
esac
exit $code"""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What goes to Slurm in one launch."""

    sweep_folder: Path
    attempt: Attempt
    cluster: Cluster
    container: Container | None = None
    max_parallel: int | None = None
    """Most jobs of one array at the same time; by default the cluster's."""
    alive: Mapping[str, str] = field(default_factory=dict)
    """Stage key → job, for inputs that an earlier launch has submitted and that are not done."""

    def submit(self, stages: Sequence[Stage]) -> list[Submitted]:
        """Submit `stages`, which come after their inputs, with one call of sbatch for each array.

        Raises TsaeError if Slurm refuses one; then none of them stays submitted and the attempt is taken away.
        """
        try:
            self.attempt.submitting.touch()
            self._submit_held(stages)
            self.attempt.submitting.unlink(missing_ok=True)
        except BaseException:
            # By the sweep's name: Ctrl-C may have ended sbatch after Slurm took the array and before its id was read.
            undo_half_submissions(self.sweep_folder)
            self.attempt.remove()
            raise
        return self.attempt.jobs()

    def _submit_held(self, stages: Sequence[Stage]) -> None:
        """Submit all arrays, and let the first jobs start once Slurm has taken the last one."""
        known = limits()
        ids: dict[Array, str] = {}
        arrays = to_arrays(stages, self.cluster, known.max_array, self.alive)
        for number, array in enumerate(arrays):
            folder = self.attempt.folder / _folder_name(number, array)
            folder.mkdir()
            began = time.time()
            jobs = _sbatch(folder, self._parameters(array, ids, folder), self._python(array), self._calls(array))
            ids[array] = jobs[0].partition("_")[0]
            self.attempt.add_jobs(
                Submitted(
                    stage=stage.key,
                    label=stage.label,
                    job=job,
                    cluster=known.cluster,
                    submitted=began,
                    executor="slurm",
                    log=str(folder / f"{job}_0_log.out"),
                    attempt=self.attempt.stamp,
                )
                for stage, job in zip(array.stages, jobs, strict=True)
            )
        try:
            release(ids[array] for array in arrays if array.is_free)
        except TsaeError as error:
            raise TsaeError(f"{error}; were the jobs cancelled meanwhile? nothing stays submitted") from None

    def texts(self, stages: Sequence[Stage], known: Limits = UNKNOWN_CLUSTER) -> list[str]:
        """The sbatch scripts that `submit` would hand over, with words where ids are not known yet."""
        from submitit.slurm.slurm import _make_sbatch_string

        texts: list[str] = []
        ids: dict[Array, str] = {}
        for number, array in enumerate(to_arrays(stages, self.cluster, known.max_array, self.alive)):
            name = _folder_name(number, array)
            folder = self.attempt.folder / name
            command = f"{self._python(array)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
            count = len(array.stages) if len(array.stages) > 1 else None
            texts.append(_make_sbatch_string(command, folder, map_count=count, **self._parameters(array, ids, folder)))
            ids[array] = f"<{name}>"
        return texts

    def _calls(self, array: Array) -> Iterator[Call]:
        for stage in array.stages:
            yield Call(
                record=str(stage.record),
                function=stage.function,
                arguments=stage.arguments_in(self.attempt.points),
                label=stage.label,
                attempt=self.attempt.stamp,
                executor="slurm",
                processes=array.resources.processes,
            )

    def _python(self, array: Array) -> str:
        if self.container is None:
            return shlex.quote(sys.executable)
        # An image keeps the host's PYTHONPATH out, so the copy of the code is named to it.
        code = {"PYTHONPATH": self._variables(None)["PYTHONPATH"]}
        return shlex.join(self.container.command(code, gpus=bool(array.resources.gpus)))

    def _parameters(self, array: Array, ids: Mapping[Array, str], folder: Path) -> dict[str, Any]:
        """What submitit writes into the script, in its words."""
        asked, cluster = array.resources, self.cluster
        minutes, cpus = asked.minutes, asked.cpus
        notice = cluster.signal_seconds if minutes is None else min(cluster.signal_seconds, minutes * 60 // 3)
        extra = {name: value for name, value in asked.extra.items() if value not in (None, False)}
        variables = [f"export {name}={shlex.quote(value)}" for name, value in self._variables(cpus).items()]
        own: dict[str, Any] = {
            "requeue": True,
            "kill-on-invalid-dep": "yes",
            **({"mem": asked.mem} if asked.mem else {}),
        }
        if array.is_free:
            own["hold"] = True  # until all is submitted: if Slurm refuses a later array, no job of this one has run
        return {
            "job_name": job_name(self.sweep_folder),
            "comment": f"{array.kind} of {self.sweep_folder.name}",
            "nodes": asked.nodes or 1,
            "ntasks_per_node": asked.tasks_per_node,
            "cpus_per_task": cpus,
            "gres": asked.gpu_request,
            "gpus_per_node": (asked.gpus or None) if asked.gres is None else None,
            "time": minutes,
            "partition": asked.partition,
            "account": asked.account,
            "qos": asked.qos,
            "constraint": asked.constraint,
            "exclude": asked.exclude,
            "dependency": array.dependency(ids),
            "array_parallelism": self.max_parallel or cluster.max_parallel or len(array.stages),
            "signal_delay_s": notice,
            "wckey": None,  # submitit's own default would be refused where keys are checked
            "stderr_to_stdout": True,
            "additional_parameters": {**own, **extra},
            "setup": [*cluster.setup, *variables, KEEP_SHELL],
            # srun does not inherit the cores; a dead process must not leave the others waiting for it.
            "srun_args": ["--kill-on-bad-exit=1", *([f"--cpus-per-task={cpus}"] if cpus else [])],
            "teardown": REQUEUE.replace("{folder}", shlex.quote(str(folder))).splitlines(),
        }

    def _variables(self, cpus: int | None) -> dict[str, str]:
        own = self.cluster.environment
        # The copy comes first, or an installed package would stand in for it.
        path = [python_path(self.attempt.code), *([own["PYTHONPATH"]] if "PYTHONPATH" in own else [])]
        return {
            "TSAE_HOME": str(environment.home()),
            "PYTHONSAFEPATH": "1",  # else a folder `tsae` in the working directory would stand in for the copy
            MOST_RESTARTS: str(self.cluster.max_restarts),
            **({"OMP_NUM_THREADS": str(cpus)} if cpus else {}),
            **own,
            "PYTHONPATH": os.pathsep.join(path),
        }


def _folder_name(number: int, array: Array) -> str:
    return f"{number:02}-{array.kind}"


def _sbatch(folder: Path, parameters: Mapping[str, Any], python: str, calls: Iterator[Call]) -> list[str]:
    """Submit one array; the ids of its jobs, in order."""
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = submitit.SlurmExecutor(folder, python=python)
    executor.update_parameters(**parameters)
    try:
        # submitit prints what sbatch says besides raising it.
        with _outside_any_job(), contextlib.redirect_stderr(io.StringIO()):
            jobs = executor.map_array(run_on_slurm, calls)
    except (FailedJobError, FailedSubmissionError) as error:
        said = complaint(str(error))
        raise TsaeError(f"sbatch: {parameters['comment']}: {said}; nothing was submitted") from None
    return [str(job.job_id) for job in jobs]


@contextlib.contextmanager
def _outside_any_job() -> Iterator[None]:
    """Hide the job that this process may be in; what the user has set for Slurm's commands stays."""
    from submitit.helpers import clean_env

    own = {name: value for name, value in os.environ.items() if name.startswith("SBATCH_") or name == "SLURM_CONF"}
    with clean_env():
        os.environ.update(own)
        try:
            yield
        finally:
            for name in own:
                del os.environ[name]
