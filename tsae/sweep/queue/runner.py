"""The queue: starts stages when their inputs are there and a share of the machine is free, and watches them.

What is complete is decided by the files of a stage, never by memory, so a queue that dies loses nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from tsae.runtime import locks, processes
from tsae.runtime.state import BROKEN, OPEN, Record, State, mark_failed
from tsae.sweep.queue.executors import Executor, Job
from tsae.sweep.queue.machine import Machine, Share
from tsae.sweep.stage import Stage

POLL_SECONDS = 0.2
LOOK_SECONDS = 2.0
MOST_PREEMPTIONS = 100
"""Times that a preempted stage is started again; one that never gets anywhere must end."""
MOST_CORES = 16
"""A job that names no number of cores gets no more than this: small models do not gain from more threads."""


@dataclass
class Task:
    """A stage of the queue, and what is known of it now."""

    stage: Stage
    status: Record = field(default_factory=Record)
    job: Job | None = None
    share: Share | None = None
    looked: float = -LOOK_SECONDS

    @property
    def state(self) -> State:
        """Of its status."""
        return self.status.state


class Display(Protocol):
    """Whoever shows the queue to a person or to other processes."""

    def changed(self, task: Task) -> None:
        """`task` has just entered another state."""

    def refresh(self, tasks: list[Task]) -> None:
        """Show what is running; called several times a second."""


Claims = Callable[[Stage], Record | None]
"""What another queue says of a stage, with its stamp as `attempt`; None if no other queue has it."""


class Queue:
    """Stages in order, an executor, and a machine to share out."""

    def __init__(
        self,
        stages: list[Stage],
        executor: Executor,
        display: Display,
        machine: Machine,
        most: int | None = None,
        claims: Claims = lambda _stage: None,
    ) -> None:
        self.tasks = [Task(stage) for stage in stages]
        self._by_key = {task.stage.key: task for task in self.tasks}
        self._executor, self._display, self._machine, self._claims = executor, display, machine, claims
        self._most = most or len(stages)
        self._running = 0

    def run(self, sleep: Callable[[float], None] = time.sleep) -> list[Task]:
        """Run everything that can run; the tasks that did not come to their end."""
        try:
            while any(task.state in OPEN for task in self.tasks):
                self._step()
                self._display.refresh(self.tasks)
                sleep(POLL_SECONDS)
        finally:
            self.end()
        return [task for task in self.tasks if task.state in BROKEN]

    def end(self) -> None:
        """Stop every job of this queue; each is asked first, so that it can save what it has."""
        running = [task for task in self.tasks if task.job is not None and task.state == State.RUNNING]
        for task in running:
            assert task.job is not None
            task.job.ask()
        for task in running:
            assert task.job is not None
            task.job.end()
            self._release(task)
            task.status.error = "was stopped"
            self._enter(task, State.INTERRUPTED)

    def _step(self) -> None:
        for task in self.tasks:
            if task.state == State.RUNNING:
                self._watch(task)
        waiting = [task for task in self.tasks if task.state in (State.WAITING, State.ELSEWHERE)]
        peers = Counter(task.stage.kind for task in self.tasks if task.state in (State.WAITING, State.RUNNING))
        self._running = sum(task.share is not None for task in self.tasks)
        full: set[str] = set()
        for task in waiting:
            if self._is_ready(task) and not (task.state == State.WAITING and task.stage.kind in full):
                self._advance(task, peers[task.stage.kind], full)

    def _watch(self, task: Task) -> None:
        assert task.job is not None
        ending = task.job.poll()
        if ending is None:
            return
        self._release(task)
        state, error = ending
        if state != State.DONE and self._taken(task):
            return
        if state == State.PREEMPTED and task.status.restarts < MOST_PREEMPTIONS:
            task.status.restarts += 1
            self._enter(task, State.WAITING)
            return
        # A report may be out of date as soon as it is written; every other output is there or is not.
        if state == State.DONE and not task.stage.after_failures and not task.stage.is_done():
            state, error = State.FAILED, "ended without an error, but its output is not complete"
            mark_failed(task.stage.record, error)
        task.status.error = error
        self._enter(task, State.FAILED if state == State.PREEMPTED else state)

    def _advance(self, task: Task, peers: int, full: set[str]) -> None:
        """Start `task` if nobody has it and a share is free; else its kind of stage is `full` for this step."""
        now = time.monotonic()
        if now - task.looked < LOOK_SECONDS:
            return
        share = self._share(task, peers)
        if share is None and task.state == State.WAITING:
            full.add(task.stage.kind)
            return
        task.looked = now
        if task.stage.is_done():
            self._enter(task, State.DONE)
        elif not self._taken(task) and share is not None and task.state == State.WAITING:
            self._start(task, share)
            return
        if share is not None:
            self._machine.give_back(share)

    def _is_ready(self, task: Task) -> bool:
        """Whether what it reads is there; a task that cannot get it any more is blocked."""
        inputs = [self._by_key[key] for key in task.stage.depends_on if key in self._by_key]
        if task.stage.after_failures:
            return all(entry.state not in OPEN for entry in inputs)
        broken = next((entry for entry in inputs if entry.state in BROKEN), None)
        if broken is not None:
            task.status.error = f"not started, because '{broken.stage.label}' is not done"
            self._enter(task, State.BLOCKED)
            return False
        return all(entry.state == State.DONE for entry in inputs)

    def _start(self, task: Task, share: Share) -> None:
        task.share = share
        self._running += 1
        task.job = self._executor.start(task.stage, share)
        for lease in share.leases if task.job.pid else ():
            lease.hand_to(task.job.pid)
        task.status = Record(
            cpus=share.cpus,
            gpus=",".join(share.gpus),
            started=task.job.started,
            log=str(task.job.log),
            pid=task.job.pid,
            pid_started=processes.started_at(task.job.pid),
            restarts=task.status.restarts,
        )
        self._enter(task, State.RUNNING)

    def _taken(self, task: Task) -> bool:
        """Whether another live process has it; then this queue waits for that one, and takes its failure for its own."""
        owner, claim = locks.owner(task.stage.lock), self._claims(task.stage)
        if owner is None and (claim is None or claim.state not in (State.WAITING, State.RUNNING)):
            if task.state == State.ELSEWHERE:
                task.status.state = State.WAITING
                if claim is not None and claim.state == State.FAILED:
                    task.status.error = claim.error
                    self._enter(task, State.FAILED)
            return task.state == State.FAILED
        task.status.elsewhere = str(owner) if owner is not None else claim.attempt if claim else ""
        if task.state != State.ELSEWHERE:
            self._enter(task, State.ELSEWHERE)
        return True

    def _share(self, task: Task, peers: int) -> Share | None:
        """Cores and GPUs for `task`, or None while too little is free."""
        if self._running >= self._most:
            return None
        wanted, machine = task.stage.resources, self._machine
        default = min(1, len(machine.gpus)) if task.stage.on_gpu else 0
        gpus = min(default if wanted.gpus is None else wanted.gpus * (wanted.nodes or 1), len(machine.gpus))
        processes = self._executor.processes(wanted, gpus)
        cpus = wanted.cpus * processes if wanted.cpus else max(processes, _fair_cores(machine, gpus, peers))
        return machine.take(cpus, gpus)

    def _release(self, task: Task) -> None:
        if task.share is not None:
            self._machine.give_back(task.share)
            task.share = None

    def _enter(self, task: Task, state: State) -> None:
        task.status.state = state
        if state not in OPEN:
            task.status.ended = time.time()
        self._display.changed(task)


def _fair_cores(machine: Machine, gpus: int, peers: int) -> int:
    """Cores divided by the jobs of one kind that could run side by side, within reason."""
    side_by_side = min(peers, len(machine.gpus) // gpus) if gpus else peers
    return min(max(1, machine.cores // max(1, side_by_side)), MOST_CORES)
