"""Slurm's side of a sweep: what its controller and its accounting know, each in one query for all jobs."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tsae.runtime.errors import TsaeError

KINDS_LIMIT = 40
"""Characters of a sweep's name that its jobs bear; a hash behind them tells sweeps apart."""
AT_A_TIME = 500


@dataclass(frozen=True)
class QueuedJob:
    """A job that the controller knows."""

    state: str
    """PENDING, RUNNING, COMPLETING, …"""
    reason: str
    """Why it does not run: Priority, Dependency, JobHeldUser, …"""
    node: str
    elapsed: str

    @property
    def alive(self) -> bool:
        """Whether it runs or will."""
        return self.state in ALIVE


@dataclass(frozen=True)
class AccountedJob:
    """A job in the accounting, which lags behind the controller by seconds."""

    state: str
    exit_code: str
    node: str
    elapsed: str


@dataclass(frozen=True)
class Limits:
    """What the controller was configured with."""

    cluster: str
    max_array: int
    """Most jobs in one array."""


ALIVE = frozenset(
    [
        "PENDING",
        "RUNNING",
        "CONFIGURING",
        "COMPLETING",
        "SUSPENDED",
        "STOPPED",
        "REQUEUED",
        "REQUEUE_HOLD",
        "REQUEUE_FED",
        "RESIZING",
        "SIGNALING",
        "STAGE_OUT",
        "SPECIAL_EXIT",
        "PREEMPTED",
    ]
)


def job_name(sweep_folder: Path) -> str:
    """The name that all jobs of a sweep bear and no others: one query finds them, whoever submitted them and when."""
    text = str(sweep_folder.absolute())
    readable = re.sub(r"[^\w.=+-]+", "-", sweep_folder.name)[:KINDS_LIMIT]
    return f"tsae.{readable}.{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def queued(sweep_folder: Path) -> dict[str, QueuedJob]:
    """Job id → what the controller knows, for all jobs of the sweep that it has not forgotten; one call of squeue."""
    columns = "%i|%T|%r|%N|%M"
    answer = run("squeue", "--noheader", "--array", "--states=all", f"--name={job_name(sweep_folder)}", f"-o{columns}")
    return {job: QueuedJob(*rest) for job, *rest in (line.split("|") for line in answer.splitlines())}


def accounted(sweep_folder: Path, since: float) -> dict[str, AccountedJob] | None:
    """Job id → what the accounting knows of jobs after `since` (epoch seconds); None where there is no accounting."""
    start = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since - 60))
    answer = subprocess.run(
        [
            *("sacct", "--noheader", "--allocations", "--parsable2", f"--starttime={start}"),
            *(f"--name={job_name(sweep_folder)}", "--format=JobID,State,ExitCode,NodeList,Elapsed"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode:
        return None
    rows = (line.split("|") for line in answer.stdout.splitlines())
    # `CANCELLED by 1000` is a state too.
    return {job: AccountedJob(state.split(" ")[0], *rest) for job, state, *rest in rows}


def cancel(jobs: Iterable[str]) -> None:
    """End jobs, whether they run or wait; those that have ended already are left alone."""
    for part in _parts(list(jobs)):
        run("scancel", *part)


def release(jobs: Iterable[str]) -> None:
    """Let jobs start that were submitted with --hold."""
    for part in _parts(list(jobs)):
        run("scontrol", "release", ",".join(part))


def answers() -> bool:
    """Whether a controller answers; a machine may have the commands of Slurm without one."""
    try:
        answer = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, check=False, timeout=30)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False
    return answer.returncode == 0 and " UP" in answer.stdout


def limits() -> Limits:
    """What the controller says of itself."""
    found = dict(re.findall(r"^(\w+)\s*= (.*)$", run("scontrol", "show", "config"), flags=re.MULTILINE))
    return Limits(found["ClusterName"].strip(), int(found["MaxArraySize"]))


def run(*command: str) -> str:
    """The output of one of Slurm's commands. Raises TsaeError with what it complains about."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"})
    except FileNotFoundError:
        raise TsaeError(f"{command[0]}: not found; sweeps on a cluster start where Slurm's commands are") from None
    if answer.returncode:
        raise TsaeError(f"{command[0]}: {complaint(answer.stderr) or f'ended with code {answer.returncode}'}")
    return answer.stdout


def complaint(said: str) -> str:
    """What one of Slurm's commands complains about, as one line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line.partition("error: ")[2] for line in lines if "error: " in line]
    return "; ".join(dict.fromkeys(errors or lines))


def _parts(items: list[str]) -> Iterator[list[str]]:
    for first in range(0, len(items), AT_A_TIME):
        yield items[first : first + AT_A_TIME]
