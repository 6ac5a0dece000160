"""Slurm as a scheduler of sweeps: arrays go there through submitit, and need no launcher from then on.

What requeues a job is its batch script, on the host: a task in a container has no scontrol, and one that is being
ended cannot call it. The script knows a cancelled job from one whose time is over or whose place was taken.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tsae.runtime.errors import TsaeError
from tsae.sweep.schedulers.base import Full, Inputs, Limits, Order, Seen
from tsae.sweep.schedulers.slurm import job, query

BEFORE = """\
trap : TERM  # the shell outlives its job step, to see why that ended
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
# submitit's pickles run what they hold
foreign=$(find {folder} -maxdepth 1 \\( -type d -o -name '*.pkl' \\) \\( ! -user "$(id -u)" -o -perm /022 \\) | head -n 1)
if [ -n "$foreign" ]; then
    echo "batch script: $foreign: others may write there, and it would be run; take their right away and launch again"
    echo {failed} >{folder}/"$job"_exit_code
    exit {failed}
fi"""
AFTER = """\
code=$?
[ $code -eq 0 ] && exit 0
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
NO_ROOM = re.compile(r"\w+Submit\w*Limit|job queue full|temporarily un\w+( to accept job)?")
"""What sbatch says where a limit on submitted jobs is reached: of an association, a QOS, or MaxJobCount."""
AT_A_TIME = 500
"""Jobs in one call of scancel or scontrol."""


class Slurm:
    """The Slurm whose commands are on PATH."""

    name = "slurm"
    title = "Slurm"
    command = "sbatch"
    silence = "no controller answers `scontrol ping`"

    def answers(self) -> bool:
        """Whether a controller answers."""
        try:
            answer = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, check=False, timeout=30)
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return False
        return answer.returncode == 0 and " UP" in answer.stdout

    def limits(self) -> Limits:
        """What the controller was configured with."""
        text = query.run("scontrol", "show", "config")
        found = dict(re.findall(r"^(\w+)\s*= (.*)$", text, flags=re.MULTILINE))
        tasks = re.search(r"max_array_tasks=(\d+)", found.get("SchedulerParameters", ""))
        # Where MaxJobCount is reached, sbatch tries for two minutes: arrays are small enough to find room one day.
        most = [
            int(found["MaxArraySize"]),
            int(found.get("MaxJobCount", 10000)) // 4,
            *([int(tasks[1])] if tasks else []),
        ]
        return Limits(found["ClusterName"].strip(), max(1, min(most)))

    def submit(self, order: Order) -> list[str]:
        """Submit one array with one call of sbatch."""
        import submitit
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        executor = submitit.SlurmExecutor(order.folder, python=shlex.join(order.python))
        executor.update_parameters(**_parameters(order))
        order.folder.chmod(order.folder.stat().st_mode & ~0o022)
        try:
            # submitit prints what sbatch says besides raising it.
            with _for_others_to_read(), _outside_any_job(), contextlib.redirect_stderr(io.StringIO()):
                jobs = executor.map_array(job.run, order.calls)
        except (FailedJobError, FailedSubmissionError) as error:
            said = query.complaint(str(error))
            message = f"sbatch: {order.comment}: {said}; nothing was submitted"
            limit = NO_ROOM.search(said)
            raise (Full(message, limit.group()) if limit else TsaeError(message)) from None
        return [str(entry.job_id) for entry in jobs]

    def script(self, order: Order) -> str:
        """The script for sbatch, as submitit writes it."""
        from submitit.slurm.slurm import _make_sbatch_string

        command = f"{shlex.join(order.python)} -u -m submitit.core._submit {shlex.quote(str(order.folder))}"
        count = len(order.calls) if len(order.calls) > 1 else None
        text: str = _make_sbatch_string(command, order.folder, map_count=count, **_parameters(order))
        return text

    def log(self, order: Order, job: str) -> Path:
        """Submitit's log of the first task."""
        return order.folder / f"{job}_0_log.out"

    def queued(self, job_name: str) -> dict[str, Seen]:
        """What the controller knows, by one call of squeue."""
        return query.queued(job_name)

    def accounted(self, job_name: str, since: float) -> dict[str, Seen]:
        """What the accounting knows, by one call of sacct."""
        return query.accounted(job_name, since)

    def cancel(self, jobs: Iterable[str]) -> None:
        """scancel."""
        for part in _parts(list(jobs)):
            query.run("scancel", *part)

    def release(self, jobs: Iterable[str]) -> None:
        """Let jobs start that were submitted with --hold."""
        for part in _parts(list(jobs)):
            query.run("scontrol", "release", ",".join(part))

    def ending(self, job_name: str) -> str:
        """scancel, by the name."""
        return f"scancel --name={job_name}"

    def adopt_place(self) -> None:
        """Where `srun` alone started several of this process, say so in torchrun's variables."""
        job.adopt_step()


def dependency(inputs: Inputs) -> str | None:
    """Slurm's --dependency: `aftercorr:7,afterok:8:9_3`."""
    parts = [f"aftercorr:{array}" for array in inputs.one_by_one]
    if inputs.jobs:
        parts.append(":".join(["afterany" if inputs.however_they_end else "afterok", *inputs.jobs]))
    return ",".join(parts) or None


def _parameters(order: Order) -> dict[str, Any]:
    """What submitit writes into the script, in its words."""
    asked, cluster = order.resources, order.cluster
    minutes, cpus = asked.minutes, asked.cpus
    notice = cluster.signal_seconds if minutes is None else min(cluster.signal_seconds, minutes * 60 // 3)
    extra = {name: value for name, value in asked.extra.items() if value not in (None, False)}
    own: dict[str, Any] = {
        "requeue": True,
        "kill-on-invalid-dep": "yes",
        **({"mem": asked.mem} if asked.mem else {}),
        **({"hold": True} if order.hold else {}),
    }
    return {
        "job_name": order.job_name,
        "comment": order.comment,
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
        "dependency": dependency(order.inputs),
        "array_parallelism": order.max_parallel,
        "signal_delay_s": notice,
        "wckey": None,  # submitit's own default would be refused where keys are checked
        "stderr_to_stdout": True,
        "additional_parameters": {**own, **extra},
        "setup": [*order.setup, *_written(BEFORE, order)],
        # srun does not inherit the cores; a dead process must not leave the others waiting for it.
        "srun_args": ["--kill-on-bad-exit=1", *([f"--cpus-per-task={cpus}"] if cpus else [])],
        "teardown": _written(AFTER, order),
    }


def _written(part: str, order: Order) -> list[str]:
    """A part of the batch script, with its values."""
    return part.replace("{folder}", shlex.quote(str(order.folder))).replace("{failed}", str(job.FAILED)).splitlines()


@contextlib.contextmanager
def _for_others_to_read() -> Iterator[None]:
    """Let nobody else write what is made in a block, whatever the umask."""
    mask = os.umask(0o022)
    os.umask(mask | 0o022)
    try:
        yield
    finally:
        os.umask(mask)


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


def _parts(items: list[str]) -> Iterator[list[str]]:
    for first in range(0, len(items), AT_A_TIME):
        yield items[first : first + AT_A_TIME]
