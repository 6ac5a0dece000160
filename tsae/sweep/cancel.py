"""Ending what runs or waits of one sweep, wherever a launch of it put that, and nothing else."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Container, Iterable
from contextlib import suppress
from pathlib import Path

from tsae.runtime import locks, processes
from tsae.runtime.state import State
from tsae.sweep import schedulers
from tsae.sweep.attempt import Attempt, attempts, job_name
from tsae.sweep.queue.background import lock_of, read_queue
from tsae.sweep.schedulers.base import Scheduler

PATIENCE_SECONDS = 30.0


def cancel(sweep_folder: Path) -> list[str]:
    """End the sweep's jobs on clusters and its queues on this machine; a line for each thing done or left."""
    lines = []
    for attempt in attempts(sweep_folder):
        owner = locks.owner(lock_of(attempt))
        if owner is not None and not owner.is_here:
            lines.append(f"a queue runs on {owner.host}; cancel it there")
            continue
        tasks = read_queue(attempt).values()
        groups = {task.pid: task.pid_started for task in tasks if task.state == State.RUNNING and task.pid}
        if owner is not None:
            waiting = sum(task.state == State.WAITING for task in tasks)
            os.kill(owner.pid, signal.SIGTERM)
            _wait_until(lambda pid=owner.pid, started=owner.started: processes.started_at(pid) != started)  # type: ignore[misc]
            lines.append(f"ended a local queue with {len(groups)} running and {waiting} waiting stages")
        lines += [f"ended process {pid}" for pid, started in groups.items() if _end_orphans(pid, started)]
    for scheduler in _schedulers_of(attempts(sweep_folder)):
        alive = _end_jobs(scheduler, sweep_folder)
        if alive:
            lines.append(f"cancelled {alive} {scheduler.title} job{'s' if alive > 1 else ''}")
    return lines


def undo_half_submissions(sweep_folder: Path) -> None:
    """Cancel the jobs of launches that did not come to their end: some are held, others missing or known to nobody.

    For whoever holds the sweep's launch lock, so that no other launcher is at work.
    """
    halves = [attempt for attempt in attempts(sweep_folder) if attempt.submitting.exists()]
    if not halves:
        return
    wholes = [attempt for attempt in attempts(sweep_folder) if not attempt.submitting.exists()]
    known = {entry.job for attempt in wholes for entry in attempt.jobs()}
    for scheduler in _schedulers_of(halves):
        _end_jobs(scheduler, sweep_folder, known)
    for attempt in halves:
        attempt.submitting.unlink()


def _schedulers_of(chosen: Iterable[Attempt]) -> list[Scheduler]:
    """The schedulers that have, or may have, jobs of the attempts."""
    names: set[str] = set()
    for attempt in chosen:
        names |= {entry.executor for entry in attempt.jobs()} - {"local"}
        if attempt.submitting.exists():
            # Empty, if a version of tsae made it that knew only one.
            names.add(attempt.submitting.read_text().strip() or next(iter(schedulers.SCHEDULERS)))
    return [schedulers.find(name) for name in sorted(names)]


def _end_jobs(scheduler: Scheduler, sweep_folder: Path, but: Container[str] = ()) -> int:
    """Cancel all live jobs that bear the sweep's name, known to an attempt or not, `but` those; how many there were."""
    queued = scheduler.queued(job_name(sweep_folder))
    alive = sorted(job for job, seen in queued.items() if seen.alive and job not in but)
    scheduler.cancel(alive)
    return len(alive)


def _end_orphans(pid: int, started: str) -> bool:
    """End the processes of a job whose queue is gone; whether there were any."""
    if processes.started_at(pid) != started:
        return False
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(pid, number)
        if _wait_until(lambda: processes.started_at(pid) != started):
            break
    return True


def _wait_until(reached: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not reached():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
