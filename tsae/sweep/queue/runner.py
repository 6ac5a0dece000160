"""The queue: starts stages when their inputs are there and a share of the machine is free, and watches them.

What is complete is decided by the files of a stage, never by memory, so a queue that dies loses nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

from tsae.runtime import locks
from tsae.sweep.queue.jobs import Executor, Job, Outcome, Share
from tsae.sweep.queue.machine import Machine
from tsae.sweep.stage import Stage

POLL_SECONDS = 0.2
LOOK_SECONDS = 2.0
MOST_PREEMPTIONS = 100
"""Times that a preempted stage is started again; one that never gets anywhere must end."""
MOST_CORES = 16
"""A job that names no number of cores gets no more than this: small models do not gain from more threads."""
OPEN = ("waiting", "running", "elsewhere")
"""States of a task that is not settled."""
BROKEN = ("failed", "interrupted", "blocked")


@dataclass
class Status:
    """What a queue knows of one stage; plain values, for other processes to read."""

    state: str = "waiting"
    """waiting, running, elsewhere (another process works on it), done, failed, interrupted (killed) or blocked."""
    error: str = ""
    cpus: int = 0
    gpus: str = ""
    began: float = 0.0
    """When its job started, in seconds since the epoch."""
    ended: float = 0.0
    log: str = ""
    pid: int = 0
    """Process group of its job."""
    pid_started: str = ""
    elsewhere: str = ""
    """Who works on it instead of this queue."""
    preemptions: int = 0

    def plain(self) -> dict[str, Any]:
        """As JSON; what is at its default is left out."""
        return {name: value for name, value in asdict(self).items() if value != getattr(Status, name)}

    @classmethod
    def read(cls, plain: dict[str, Any]) -> Status:
        """From JSON, of this version or another."""
        known = {entry.name for entry in fields(cls)}
        return cls(**{name: value for name, value in plain.items() if name in known})


@dataclass
class Task:
    """A stage of the queue, and what is known of it now."""

    stage: Stage
    status: Status
    job: Job | None = None
    share: Share | None = None
    looked: float = -LOOK_SECONDS

    @property
    def state(self) -> str:
        """The state of its status."""
        return self.status.state


class Display(Protocol):
    """Whoever shows the queue to a person or to other processes."""

    def changed(self, task: Task) -> None:
        """`task` has just entered another state."""

    def refresh(self, tasks: list[Task]) -> None:
        """Show what is running; called several times a second."""


@dataclass(frozen=True)
class Claim:
    """What another queue says of a stage."""

    owner: str
    alive: bool
    """Whether it works on the stage or will."""
    error: str = ""
    """How its job failed, if it did."""


def nobody(_stage: Stage) -> Claim | None:
    """No other queue has the stage."""
    return None


class Queue:
    """Stages in order, an executor, and a machine to share out."""

    def __init__(
        self,
        stages: list[Stage],
        executor: Executor,
        display: Display,
        machine: Machine,
        most: int | None = None,
        claims: Callable[[Stage], Claim | None] = nobody,
    ) -> None:
        self.tasks = [Task(stage, Status()) for stage in stages]
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
        running = [task for task in self.tasks if task.job is not None and task.state == "running"]
        for task in running:
            assert task.job is not None
            task.job.ask()
        for task in running:
            assert task.job is not None
            task.job.end()
            self._release(task)
            task.status.error = "was stopped"
            self._enter(task, "interrupted")

    def _step(self) -> None:
        for task in self.tasks:
            if task.state == "running":
                self._watch(task)
        waiting = [task for task in self.tasks if task.state in ("waiting", "elsewhere")]
        peers = Counter(task.stage.kind for task in self.tasks if task.state in ("waiting", "running"))
        self._running = sum(task.share is not None for task in self.tasks)
        full: set[str] = set()
        for task in waiting:
            if self._is_ready(task) and not (task.state == "waiting" and task.stage.kind in full):
                self._advance(task, peers[task.stage.kind], full)

    def _watch(self, task: Task) -> None:
        assert task.job is not None
        outcome = task.job.poll()
        if outcome is None:
            return
        self._release(task)
        if outcome.error is not None and self._taken(task):
            return
        if outcome.preempted and task.status.preemptions < MOST_PREEMPTIONS:
            task.status.preemptions += 1
            self._enter(task, "waiting")
            return
        # A report may be out of date as soon as it is written; every other output is there or is not.
        if outcome.error is None and not task.stage.after_failures and not task.stage.is_done():
            outcome = Outcome("ended without an error, but its output is not complete")
            task.job.mark_failed(str(outcome.error))
        task.status.error = outcome.error or ""
        self._enter(task, "done" if outcome.error is None else "interrupted" if outcome.killed else "failed")

    def _advance(self, task: Task, peers: int, full: set[str]) -> None:
        """Start `task` if nobody has it and a share is free; else its kind of stage is `full` for this step."""
        now = time.monotonic()
        if now - task.looked < LOOK_SECONDS:
            return
        share = self._share(task, peers)
        if share is None and task.state == "waiting":
            full.add(task.stage.kind)
            return
        task.looked = now
        if task.stage.is_done():
            self._enter(task, "done")
        elif not self._taken(task) and share is not None and task.state == "waiting":
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
            self._enter(task, "blocked")
            return False
        return all(entry.state == "done" for entry in inputs)

    def _start(self, task: Task, share: Share) -> None:
        task.share = share
        self._running += 1
        task.job = self._executor.start(task.stage, share)
        before = task.status.preemptions
        task.status = Status(
            cpus=share.cpus,
            gpus=",".join(share.gpus),
            began=task.job.started,
            log=str(task.job.log),
            pid=task.job.pid,
            pid_started=locks.started_at(task.job.pid),
            preemptions=before,
        )
        self._enter(task, "running")

    def _taken(self, task: Task) -> bool:
        """Whether another live process has it; then this queue waits for that one, and takes its failure for its own."""
        owner, claim = locks.owner(task.stage.lock), self._claims(task.stage)
        if owner is None and (claim is None or not claim.alive):
            if task.state == "elsewhere":
                task.status.state = "waiting"
                if claim is not None and claim.error:
                    task.status.error = claim.error
                    self._enter(task, "failed")
            return task.state == "failed"
        task.status.elsewhere = str(owner) if owner is not None else claim.owner if claim else ""
        if task.state != "elsewhere":
            self._enter(task, "elsewhere")
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

    def _enter(self, task: Task, state: str) -> None:
        task.status.state = state
        if state not in OPEN:
            task.status.ended = time.time()
        self._display.changed(task)


def _fair_cores(machine: Machine, gpus: int, peers: int) -> int:
    """Cores divided by the jobs of one kind that could run side by side, within reason."""
    side_by_side = min(peers, len(machine.gpus) // gpus) if gpus else peers
    return min(max(1, machine.cores // max(1, side_by_side)), MOST_CORES)
