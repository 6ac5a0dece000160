"""What Slurm's controller and its accounting know of a sweep's jobs, each in one query, in the words of all schedulers."""

from __future__ import annotations

import os
import subprocess
import time

from tsae.runtime.errors import TsaeError
from tsae.runtime.state import State
from tsae.sweep.schedulers.base import Seen

WAITING = frozenset(
    [
        "PENDING",
        "CONFIGURING",
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
"""The controller's words for jobs that live and do not run. (Of a job that has ended, the accounting says PREEMPTED.)"""
PATIENT = ("None", "Priority", "Resources", "Dependency", "BeginTime", "JobArrayTaskLimit")
"""Reasons for which a job waits that will run by itself."""
ENDED_FROM_OUTSIDE = ("CANCELLED", "NODE_FAIL", "PREEMPTED", "TIMEOUT", "DEADLINE", "BOOT_FAIL")


def queued(job_name: str) -> dict[str, Seen]:
    """Job id → what the controller knows, for all jobs of the name that it has not forgotten."""
    columns = "%i|%T|%r|%N|%M"
    answer = run("squeue", "--noheader", "--array", "--states=all", f"--name={job_name}", f"-o{columns}")
    found: dict[str, Seen] = {}
    for line in answer.splitlines():
        job, state, reason, node, elapsed = line.split("|")
        if state in ("RUNNING", "COMPLETING"):
            found[job] = Seen(State.RUNNING, node, time.time() - seconds(elapsed))
        elif state in WAITING:
            found[job] = Seen(State.QUEUED, why=_why_it_waits(job, reason))
        else:
            found[job] = _ended(state, node)
    return found


def accounted(job_name: str, since: float) -> dict[str, Seen]:
    """Job id → how it ended, of jobs after `since` (epoch seconds); empty where there is no accounting."""
    start = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since - 60))
    answer = subprocess.run(
        [
            *("sacct", "--noheader", "--allocations", "--parsable2", f"--starttime={start}"),
            *(f"--name={job_name}", "--format=JobID,State,NodeList"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    rows = [] if answer.returncode else [line.split("|") for line in answer.stdout.splitlines()]
    # `CANCELLED by 1000` is a state too.
    return {job: _ended(state.split(" ")[0], node) for job, state, node in rows}


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


def seconds(elapsed: str) -> float:
    """Seconds in Slurm's `1-02:03:04`, `2:03:04` or `3:04`."""
    days, _, clock = elapsed.rpartition("-")
    total = 0
    for part in clock.split(":"):
        total = 60 * total + (int(part) if part.isdigit() else 0)
    return total + 86400 * (int(days) if days.isdigit() else 0)


def _ended(word: str, node: str) -> Seen:
    """A job that lives no more, whose last state was `word`."""
    if word == "OUT_OF_MEMORY":
        return Seen(State.FAILED, node, why="out of memory; resources: mem asks for more")
    if word in ENDED_FROM_OUTSIDE:
        return Seen(State.INTERRUPTED, node, why=f"ended from outside ({word})")
    return Seen(State.FAILED if word == "FAILED" else State.DONE, node)


def _why_it_waits(job: str, reason: str) -> str:
    """Why it does not run, if it will not do so by itself or not soon."""
    if reason in PATIENT:
        return ""
    # After a lost node Slurm may hold a job whose second launch came too early for the first one's end.
    held = reason == "JobHeldUser" or reason.endswith("requeued held")
    return f"{reason}; `scontrol release {job}` lets it run" if held else reason
