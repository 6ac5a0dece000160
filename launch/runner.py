"""The queue: starts stages when their inputs are there and a share of the machine is free, and watches them.

What is complete is decided by the files of a stage, never by memory, so a launcher that dies loses nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from jobs import Executor, Job, Outcome, Share
from stage import Stage

from tsae import locks

POLL_SECONDS = 0.2
LOOK_SECONDS = 2.0
MOST_PREEMPTIONS = 100
"""Times that a preempted stage is started again; one that never gets anywhere must end."""
MOST_CORES = 16
"""A job that names no number of cores gets no more than this: small models do not gain from more threads."""


@dataclass
class Task:
    """A stage of the queue and what is known of it now."""

    stage: Stage
    job: Job | None = None
    share: Share | None = None
    state: str = "waiting"
    """waiting, running, elsewhere (another process works on it), done, failed or blocked."""
    error: str = ""
    preemptions: int = 0
    looked: float = field(default=-LOOK_SECONDS)
    elsewhere: locks.Owner | None = None


class Display(Protocol):
    """Whoever shows the queue to a person."""

    def changed(self, task: Task) -> None:
        """`task` has just entered another state."""

    def refresh(self, tasks: list[Task]) -> None:
        """Show what is running; called several times a second."""


class Queue:
    """Stages in order, an executor, and the cores and GPUs to share out."""

    def __init__(
        self, stages: list[Stage], executor: Executor, display: Display, cores: int, gpus: tuple[str, ...] = ()
    ) -> None:
        self.tasks = [Task(stage) for stage in stages]
        self._by_key = {task.stage.key: task for task in self.tasks}
        self._executor, self._display = executor, display
        self._cores, self._gpus = cores, gpus

    def run(self, sleep: Callable[[float], None] = time.sleep) -> list[Task]:
        """Run everything that can run; the tasks that failed or were blocked by one that did."""
        try:
            while any(task.state in ("waiting", "running", "elsewhere") for task in self.tasks):
                self._step()
                self._display.refresh(self.tasks)
                sleep(POLL_SECONDS)
        finally:
            self.end()
        return [task for task in self.tasks if task.state in ("failed", "blocked")]

    def end(self) -> None:
        """Stop every job of this queue."""
        for task in self.tasks:
            if task.job is not None and task.state == "running":
                task.job.end()

    def _step(self) -> None:
        for task in self.tasks:
            if task.state == "running":
                self._watch(task)
        for task in self.tasks:
            if task.state in ("waiting", "elsewhere"):
                self._advance(task)

    def _watch(self, task: Task) -> None:
        assert task.job is not None
        outcome = task.job.poll()
        if outcome is None:
            return
        if outcome.error is not None and self._taken(task):
            return
        if outcome.preempted and task.preemptions < MOST_PREEMPTIONS:
            task.preemptions += 1
            self._enter(task, "waiting")
            return
        if outcome.error is None and not task.stage.is_done():
            outcome = Outcome("ended without an error, but its output is not complete")
        task.error = outcome.error or ""
        self._enter(task, "failed" if outcome.error else "done")

    def _advance(self, task: Task) -> None:
        inputs = [self._by_key[key] for key in task.stage.depends_on if key in self._by_key]
        broken = [entry for entry in inputs if entry.state in ("failed", "blocked")]
        if broken:
            task.error = f"not started, because '{broken[0].stage.label}' failed"
            self._enter(task, "blocked")
            return
        if any(entry.state != "done" for entry in inputs):
            return
        now = time.monotonic()
        if now - task.looked < LOOK_SECONDS:
            return
        share = self._share(task)
        if share is None and task.state == "waiting":
            return
        task.looked = now
        if task.stage.is_done():
            self._enter(task, "done")
        elif not self._taken(task) and share is not None:
            task.share = share
            task.job = self._executor.start(task.stage, share)
            self._enter(task, "running")

    def _taken(self, task: Task) -> bool:
        """Whether another live process is working on it; then this queue waits for that one."""
        task.elsewhere = locks.owner(task.stage.lock)
        if task.elsewhere is None:
            if task.state == "elsewhere":
                task.state = "waiting"
            return False
        if task.state != "elsewhere":
            self._enter(task, "elsewhere")
        return True

    def _share(self, task: Task) -> Share | None:
        """Cores and a GPU for `task`, or None while too little is free."""
        running = [entry.share for entry in self.tasks if entry.state == "running" and entry.share]
        wanted = task.stage.resources
        gpus = (min(1, len(self._gpus)) if task.stage.on_gpu else 0) if wanted.gpus is None else wanted.gpus
        gpus = min(gpus, len(self._gpus))
        taken = {gpu for share in running for gpu in share.gpus}
        free = [gpu for gpu in self._gpus if gpu not in taken]
        cpus = min(wanted.cpus or self._fair_cores(task, gpus), self._cores)
        if cpus > self._cores - sum(share.cpus for share in running) or gpus > len(free):
            return None
        return Share(cpus, tuple(free[:gpus]))

    def _fair_cores(self, task: Task, gpus: int) -> int:
        """Cores divided by the jobs of this kind that could run side by side, within reason."""
        peers = sum(
            entry.stage.kind == task.stage.kind and entry.state in ("waiting", "running") for entry in self.tasks
        )
        side_by_side = min(peers, len(self._gpus) // gpus) if gpus else peers
        return min(max(1, self._cores // max(1, side_by_side)), MOST_CORES)

    def _enter(self, task: Task, state: str) -> None:
        task.state = state
        self._display.changed(task)
