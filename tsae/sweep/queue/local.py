"""A sweep on this machine: a queue in the background, and a launcher that follows it in the foreground."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress

from tsae.runtime.errors import TsaeError
from tsae.sweep.attempt import Attempt, Submitted
from tsae.sweep.container import Container
from tsae.sweep.plan import Plan
from tsae.sweep.queue.background import QueueFile, read_queue, run_queue, start_in_background
from tsae.sweep.queue.calls import last_line, log_path
from tsae.sweep.queue.display import Terminal
from tsae.sweep.queue.jobs import DebugExecutor, LocalExecutor
from tsae.sweep.queue.machine import Machine
from tsae.sweep.queue.runner import BROKEN, OPEN, Display, Queue, Status, Task
from tsae.sweep.stage import Stage
from tsae.sweep.survey import OtherQueues

FOLLOW_SECONDS = 0.2


def start(
    plan: Plan, stages: Sequence[Stage], own: Sequence[Stage], attempt: Attempt, container: Container | None
) -> int:
    """Start a queue for `stages` in the background; `own` are those that no other queue has. The queue's process id."""

    def make(shown: QueueFile) -> Queue:
        executor = LocalExecutor(attempt, container)
        claims = OtherQueues(plan, attempt)
        return Queue(list(stages), executor, shown, Machine.this(), plan.sweep.config.max_parallel, claims)

    try:
        _record(own, attempt, os.getpid())
    except OSError:  # a full disk
        attempt.remove()
        raise
    return start_in_background(attempt, make)


def follow(stages: Sequence[Stage], attempt: Attempt, queue: int, terminal: Terminal) -> list[Task]:
    """Show what the queue in process `queue` does until it ends; the stages that did not come to their end.

    Ctrl-C asks the queue to stop, and waits until it has. Raises TsaeError if it ended before its work did.
    """
    tasks = [Task(stage, Status()) for stage in stages]
    try:
        while not _ended(queue):
            _update(tasks, attempt, terminal)
            terminal.refresh(tasks)
            time.sleep(FOLLOW_SECONDS)
    except KeyboardInterrupt:
        stop(queue)
        raise
    _update(tasks, attempt, terminal)
    if any(task.state in OPEN for task in tasks):
        log = attempt.folder / "queue.log"
        why = last_line(log) or "it could not say why; is the disk full?"
        raise TsaeError(f"the queue ended before its work did: {why} (all of it in {log}); the same command continues")
    return [task for task in tasks if task.state in BROKEN]


def run_here(plan: Plan, stages: Sequence[Stage], attempt: Attempt, terminal: Terminal) -> list[Task]:
    """Run `stages` one after the other in this process; those that did not come to their end."""
    shown = QueueFile(attempt)
    _record(stages, attempt, os.getpid())
    queue = Queue(
        list(stages), DebugExecutor(attempt), _Both(terminal, shown), Machine.this(), 1, OtherQueues(plan, attempt)
    )
    return run_queue(attempt, queue, shown)


def stop(queue: int) -> None:
    """Ask a queue of this process to end its jobs, and wait until it has."""
    with suppress(ProcessLookupError):
        os.kill(queue, signal.SIGTERM)
    while not _ended(queue):
        time.sleep(0.05)


class _Both:
    """Two displays of one queue."""

    def __init__(self, *displays: Display) -> None:
        self._displays = displays

    def changed(self, task: Task) -> None:
        """Tell both."""
        for display in self._displays:
            display.changed(task)

    def refresh(self, tasks: list[Task]) -> None:
        """Tell both."""
        for display in self._displays:
            display.refresh(tasks)


def _record(stages: Sequence[Stage], attempt: Attempt, process: int) -> None:
    attempt.add_jobs(
        Submitted(
            stage=stage.key,
            label=stage.label,
            job=str(process),
            cluster=None,
            submitted=time.time(),
            executor="local",
            log=str(log_path(stage, attempt)),
            attempt=attempt.stamp,
        )
        for stage in stages
    )


def _update(tasks: Sequence[Task], attempt: Attempt, terminal: Terminal) -> None:
    found = read_queue(attempt)
    for task in tasks:
        before, task.status = task.status, found.get(task.stage.key, task.status)
        if (before.state, before.preemptions) != (task.state, task.status.preemptions):
            terminal.changed(task)


def _ended(child: int) -> bool:
    try:
        return os.waitpid(child, os.WNOHANG) != (0, 0)
    except ChildProcessError:
        return True
