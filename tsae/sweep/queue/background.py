"""A sweep on this machine: a queue in a process of its own, which survives the terminal, and a launcher that follows it.

attempts/<stamp>/
  queue.lock    held while the queue lives
  queue.json    its stages by key, as it sees them
  queue.log     what it printed, should it fail itself
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from tsae.runtime import locks, metadata, processes
from tsae.runtime.errors import TsaeError
from tsae.runtime.state import BROKEN, OPEN, QUEUE, Record, State
from tsae.sweep.attempt import Attempt, Submitted, attempts
from tsae.sweep.container import Container
from tsae.sweep.plan import Plan
from tsae.sweep.queue.display import Terminal
from tsae.sweep.queue.executors import DebugExecutor, LocalExecutor, last_line, log_path
from tsae.sweep.queue.machine import Machine
from tsae.sweep.queue.runner import Display, Queue, Task
from tsae.sweep.stage import Stage

START_SECONDS = 30.0
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
        _note_jobs(own, attempt, os.getpid())
    except OSError:  # a full disk
        attempt.remove()
        raise
    return _in_background(attempt, make)


def follow(stages: Sequence[Stage], attempt: Attempt, queue: int, terminal: Terminal) -> list[Task]:
    """Show what the queue in process `queue` does until it ends; the stages that did not come to their end.

    Ctrl-C asks the queue to stop, and waits until it has. Raises TsaeError if it ended before its work did.
    """
    tasks = [Task(stage) for stage in stages]
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
    _note_jobs(stages, attempt, os.getpid())
    queue = Queue(
        list(stages), DebugExecutor(attempt), _Both(terminal, shown), Machine.this(), 1, OtherQueues(plan, attempt)
    )
    return _run_queue(attempt, queue, shown)


def stop(queue: int) -> None:
    """Ask a queue of this process to end its jobs, and wait until it has."""
    with suppress(ProcessLookupError):
        os.kill(queue, signal.SIGTERM)
    while not _ended(queue):
        time.sleep(0.05)


class QueueFile:
    """A display for other processes: queue.json, written when something has changed."""

    def __init__(self, attempt: Attempt) -> None:
        self._path = file_of(attempt)
        self._tasks: dict[str, dict[str, Any]] = {}
        self._stale = True

    def changed(self, task: Task) -> None:
        """Remember the new state."""
        self._tasks[task.stage.key] = task.status.for_queue()
        for stage in task.stage.then:
            self._tasks[stage.key] = Record(self._of_follower(stage, task)).for_queue()
        self._stale = True

    @staticmethod
    def _of_follower(stage: Stage, task: Task) -> State:
        """How a stage that follows in the job of `task` is doing, for other queues: they leave it alone while that lives."""
        if task.state in OPEN:
            return State.WAITING
        said = Record.of(stage.record)
        if stage.is_done():
            return State.DONE
        return State.FAILED if said is not None and said.state == State.FAILED else State.INTERRUPTED

    def refresh(self, tasks: list[Task]) -> None:
        """Write all that has changed since."""
        if not self._stale:
            return
        plain = {one.key: self._tasks.get(one.key, {}) for task in tasks for one in task.stage.apart}
        metadata.write(self._path, plain)
        self._stale = False


def file_of(attempt: Attempt) -> Path:
    """Where a queue says what it does."""
    return attempt.folder / "queue.json"


def lock_of(attempt: Attempt) -> Path:
    """What a queue holds while it lives."""
    return attempt.folder / "queue.lock"


def read_queue(attempt: Attempt) -> dict[str, Record]:
    """Stage key → what the queue of `attempt` says of it; empty if it has none, or none yet."""
    return {key: Record.from_queue(status) for key, status in metadata.whole(file_of(attempt), QUEUE).items()}


class OtherQueues:
    """What the live queues of other launches of the same sweep say; looked at anew once a second."""

    def __init__(self, plan: Plan, own: Attempt) -> None:
        self._plan, self._own = plan, own
        self._looked = 0.0
        self._claims: dict[str, Record] = {}

    def __call__(self, stage: Stage) -> Record | None:
        """Who else has `stage`, or had it since this queue began."""
        if time.monotonic() - self._looked > 1.0:
            self._look()
            self._looked = time.monotonic()
        return self._claims.get(stage.key)

    def _look(self) -> None:
        for attempt in attempts(self._plan.folder):
            if attempt.stamp == self._own.stamp:
                continue
            owner = locks.owner(lock_of(attempt))
            if owner is None and not any(
                claim.state in (State.WAITING, State.RUNNING) for claim in self._claims.values()
            ):
                continue
            for key, status in read_queue(attempt).items():
                known = self._claims.get(key)
                if owner is not None or (known is not None and known.attempt == attempt.stamp):
                    # A queue that is gone works on nothing any more.
                    lost = owner is None and status.state in OPEN
                    state = State.INTERRUPTED if lost else status.state
                    self._claims[key] = replace(status, state=state, attempt=attempt.stamp)


def _in_background(attempt: Attempt, make: Callable[[QueueFile], Queue]) -> int:
    """Run the queue that `make` gives in a process without a terminal; its id, once the queue holds its lock."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _become_the_queue(attempt, make)
    deadline = time.monotonic() + START_SECONDS
    while not file_of(attempt).exists() and time.monotonic() < deadline and not _has_ended(child):
        time.sleep(0.01)
    return child


def _run_queue(attempt: Attempt, queue: Queue, shown: QueueFile) -> list[Task]:
    """Run `queue` in this process and hold its lock meanwhile; what did not come to its end."""
    with locks.hold(lock_of(attempt), "queue"):
        shown.refresh(queue.tasks)
        try:
            return queue.run()
        finally:
            shown.refresh(queue.tasks)


def _become_the_queue(attempt: Attempt, make: Callable[[QueueFile], Queue]) -> NoReturn:
    """What the forked process does; it never returns into the launcher's code, whose locks are not its own."""
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, _stop)
        with open(attempt.folder / "queue.log", "ab", buffering=0) as stream, open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        shown = QueueFile(attempt)
        code = 1 if _run_queue(attempt, make(shown), shown) else 0
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _has_ended(child: int) -> bool:
    return processes.started_at(child) == ""


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


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


def _note_jobs(stages: Sequence[Stage], attempt: Attempt, process: int) -> None:
    attempt.add_jobs(
        Submitted(
            stage=one.key,
            label=one.label,
            job=str(process),
            cluster=None,
            submitted=time.time(),
            executor="local",
            log=str(log_path(stage, attempt)),
            attempt=attempt.stamp,
        )
        for stage in stages
        for one in stage.apart
    )


def _update(tasks: Sequence[Task], attempt: Attempt, terminal: Terminal) -> None:
    found = read_queue(attempt)
    for task in tasks:
        before, task.status = task.status, found.get(task.stage.key, task.status)
        if (before.state, before.restarts) != (task.state, task.status.restarts):
            terminal.changed(task)


def _ended(child: int) -> bool:
    try:
        return os.waitpid(child, os.WNOHANG) != (0, 0)
    except ChildProcessError:
        return True
