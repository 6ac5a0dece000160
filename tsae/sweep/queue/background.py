"""A queue in a process of its own: it survives the terminal, and says in its attempt's folder what it does.

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
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from tsae.runtime import files, locks
from tsae.sweep.attempt import Attempt
from tsae.sweep.queue.runner import Queue, Status, Task

START_SECONDS = 30.0


class QueueFile:
    """A display for other processes: queue.json, written when something has changed."""

    def __init__(self, attempt: Attempt) -> None:
        self._path = file_of(attempt)
        self._tasks: dict[str, dict[str, Any]] = {}
        self._stale = True

    def changed(self, task: Task) -> None:
        """Remember the new state."""
        self._tasks[task.stage.key] = task.status.plain()
        self._stale = True

    def refresh(self, tasks: list[Task]) -> None:
        """Write all that has changed since."""
        if not self._stale:
            return
        plain = {task.stage.key: self._tasks.get(task.stage.key, {}) for task in tasks}
        files.write_json(self._path, plain)
        self._stale = False


def file_of(attempt: Attempt) -> Path:
    """Where a queue says what it does."""
    return attempt.folder / "queue.json"


def lock_of(attempt: Attempt) -> Path:
    """What a queue holds while it lives."""
    return attempt.folder / "queue.lock"


def read_queue(attempt: Attempt) -> dict[str, Status]:
    """Stage key → what the queue of `attempt` says of it; empty if it has none, or none yet."""
    return {key: Status.read(status) for key, status in files.read_whole_json(file_of(attempt)).items()}


def start_in_background(attempt: Attempt, make: Callable[[QueueFile], Queue]) -> int:
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


def run_queue(attempt: Attempt, queue: Queue, shown: QueueFile) -> list[Task]:
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
        code = 1 if run_queue(attempt, make(shown), shown) else 0
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _has_ended(child: int) -> bool:
    return locks.started_at(child) == ""


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
