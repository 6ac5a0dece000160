"""Where each stage of a sweep stands: from its output, its job's record, and whoever may still be at work on it.

A stage's output decides whether it is done. Of the rest, a job says itself how it ended; schedulers and the process
table are asked only whether it lives. A job that ended without a word was ended from outside: `interrupted`, not failed.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from tsae.runtime import locks, processes
from tsae.runtime.errors import TsaeError
from tsae.runtime.state import Record, State
from tsae.sweep import schedulers
from tsae.sweep.attempt import Attempt, Submitted, attempts, job_name
from tsae.sweep.plan import Plan
from tsae.sweep.queue.background import lock_of, read_queue
from tsae.sweep.schedulers.base import Seen
from tsae.sweep.stage import Stage


@dataclass
class Survey:
    """A look at a whole sweep, with one query of each scheduler at most."""

    plan: Plan
    whatever_answers: bool = False
    """Whether to go on, and believe what the jobs said last, where a scheduler does not answer or a list of jobs is
    damaged; else that is a TsaeError."""
    silence: dict[str, str] = field(init=False, default_factory=dict)
    """For people: scheduler → what its command said in place of an answer."""
    damaged: list[str] = field(init=False, default_factory=list)
    """Files that could not be read, in words, where that is to be put up with."""
    sweep_attempts: list[Attempt] = field(init=False)
    jobs: dict[str, Submitted] = field(init=False)

    def __post_init__(self) -> None:
        self.sweep_attempts = attempts(self.plan.folder)
        self._queues: dict[str, tuple[dict[str, Record], locks.Owner | None]] = {}
        self._queued: dict[str, dict[str, Seen] | None] = {}
        self._accounted: dict[str, dict[str, Seen]] = {}
        self.jobs = {}
        self._first: dict[tuple[str, str, str], str] = {}  # the stage with which a job begins
        newest: dict[tuple[str | None, str], str] = {}
        for attempt in self.sweep_attempts:
            for entry in self._jobs_of(attempt):
                self.jobs[entry.stage] = entry
                newest[entry.cluster, entry.job] = attempt.stamp
                self._first.setdefault((entry.executor, entry.job, entry.attempt), entry.stage)
        # Ids begin again when a scheduler's state is wiped: the latest job with an id is the one that it means now.
        self._reused = {
            key
            for key, entry in self.jobs.items()
            if entry.executor != "local" and newest[entry.cluster, entry.job] != entry.attempt
        }

    def _jobs_of(self, attempt: Attempt) -> list[Submitted]:
        try:
            return attempt.jobs()
        except TsaeError as error:
            if not self.whatever_answers:
                raise
            self.damaged.append(str(error))
            return []

    def standings(self, stages: Iterable[Stage]) -> dict[str, Record]:
        """Stage key → where it stands; `stages` come after their inputs."""
        found: dict[str, Record] = {}
        for stage in stages:
            record, entry = self._of(stage), self.jobs.get(stage.key)
            record = replace(record, executor=entry.executor if entry else "")
            broken = any(key in found and found[key].state in (State.FAILED, State.BLOCKED) for key in stage.depends_on)
            if broken and not stage.after_failures and record.state in (State.WAITING, State.INTERRUPTED):
                record = Record(State.BLOCKED)
            found[stage.key] = record
        return found

    def submitter(self) -> Record:
        """How the job does that submits what found no room; WAITING if there is none, or it has done so."""
        stage = self.plan.submit()
        return self.standings([stage])[stage.key]

    def _of(self, stage: Stage) -> Record:
        if stage.kind != "harvest" and (damaged := self.plan.damaged.keys() & set(stage.points)):
            return Record(State.FAILED, error=self.plan.damaged[min(damaged)])
        entry, said = self.jobs.get(stage.key), Record.of(stage.record)
        if stage.is_done():
            done = replace(said or Record(), state=State.DONE, error="", job="")
            return replace(done, log=done.log or (entry.log if entry else ""))
        if entry is None:
            # Not of this sweep's doing: another sweep, or a person, may be at work on the same output.
            owner = locks.owner(stage.lock)
            return Record(State.RUNNING, owner.host, owner.since) if owner else Record()
        if said is not None and said.attempt != entry.attempt:
            said = None
        if said is not None and said.state == State.DONE:
            return Record()  # it was done, and its output was taken away or is out of date
        if entry.executor == "local":
            return self._on_this_machine(stage, entry, said)
        return self._on_cluster(stage, entry, said)

    def _on_this_machine(self, stage: Stage, entry: Submitted, said: Record | None) -> Record:
        """Of what a local queue has or had: what its job said is completed by what the queue says of it."""
        if entry.attempt not in self._queues:
            attempt = Attempt(self.plan.folder / "attempts" / entry.attempt)
            self._queues[entry.attempt] = read_queue(attempt), locks.owner(lock_of(attempt))
        tasks, queue = self._queues[entry.attempt]
        task, said = tasks.get(stage.key, Record()), said or Record()
        own = Record(
            host=said.host,
            started=task.started or said.started,
            ended=task.ended or said.ended,
            error=task.error or said.error,
            log=task.log or entry.log,
        )
        if State.FAILED in (task.state, said.state):
            return replace(own, state=State.FAILED)
        running = replace(own, state=State.RUNNING, ended=None, error="")
        if task.state in (State.RUNNING, State.ELSEWHERE) and (queue is not None or _lives(task, own.host)):
            return replace(running, host=own.host or socket.gethostname())
        owner = locks.owner(stage.lock)  # a job whose queue was killed, or one that the debugger's queue is busy with
        if owner is not None:
            return replace(running, host=owner.host, started=own.started or owner.since)
        if queue is not None and task.state == State.WAITING:
            return Record(State.PREEMPTED if task.restarts else State.QUEUED, log=own.log)
        if not own.started:
            return Record()
        return replace(own, state=State.INTERRUPTED, error=task.error or "ended without a word")

    def _on_cluster(self, stage: Stage, entry: Submitted, said: Record | None) -> Record:
        """Of what a scheduler has or had: its word on whether the job lives, and the job's own on how it ended."""
        own = replace(said or Record(State.QUEUED), job=entry.job)
        own.log = own.log or entry.log
        if own.state == State.FAILED:
            return own
        queued = self._queue_of(entry.executor)
        if queued is None:
            return replace(own, ended=None)
        seen = None if stage.key in self._reused else queued.get(entry.job)
        if said is None and self._first[entry.executor, entry.job, entry.attempt] != stage.key:
            # Its job has done what came before, and not come to it yet, or to its end before.
            lives = seen is not None and seen.alive
            return replace(own, state=State.QUEUED, error="") if lives else Record()
        if seen is not None and seen.alive:
            if seen.state == State.RUNNING:
                return replace(own, state=State.RUNNING, host=seen.node, started=seen.since, ended=None)
            waits = State.PREEMPTED if said else State.QUEUED
            return replace(own, state=waits, host="", started=None, error=seen.why)
        owner = locks.owner(stage.lock)
        if owner is not None:
            return replace(own, state=State.RUNNING, host=owner.host, started=owner.since, ended=None)
        if seen is None and stage.key not in self._reused:
            seen = self._accounts_of(entry.executor).get(entry.job)
        if seen is None and entry.exit_code.exists():
            seen = Seen(State.FAILED)
        return _ended_without_a_word(own, seen, begun=said is not None)

    def _queue_of(self, executor: str) -> dict[str, Seen] | None:
        """What a scheduler knows of the sweep's jobs; None where it does not answer."""
        if executor not in self._queued:
            scheduler = schedulers.find(executor)
            try:
                self._queued[executor] = scheduler.queued(job_name(self.plan.folder))
            except TsaeError as error:
                if not self.whatever_answers:
                    raise
                self.silence[scheduler.title] = str(error)
                self._queued[executor] = None
        return self._queued[executor]

    def _accounts_of(self, executor: str) -> dict[str, Seen]:
        """How jobs ended that a scheduler has forgotten."""
        if executor not in self._accounted:
            since = min(entry.submitted for entry in self.jobs.values() if entry.executor == executor)
            self._accounted[executor] = schedulers.find(executor).accounted(job_name(self.plan.folder), since)
        return self._accounted[executor]


def _lives(task: Record, host: str) -> bool:
    here = host in ("", socket.gethostname())
    return here and bool(task.pid) and processes.started_at(task.pid) == task.pid_started


def _ended_without_a_word(own: Record, seen: Seen | None, begun: bool) -> Record:
    """A scheduler's job that lives no more and did not say how it ended; the accounting may lag, or there may be none."""
    if seen is None:
        seen = Seen(State.INTERRUPTED, why="ended without a word (killed, or out of memory?)")
    if not begun and seen.state != State.FAILED:
        return Record()
    own = replace(own, host=own.host or seen.node)
    if not begun:
        why = seen.why or _own_words(own.log) or "ended before the stage began; its log may say why"
        return replace(own, state=State.FAILED, error=why)
    if seen.state == State.INTERRUPTED:
        return replace(own, state=State.INTERRUPTED, error=own.error or seen.why)
    # A scheduler counts a job as failed when its process ends by itself, as one does that runs out of memory.
    error = seen.why or own.error or "ended without a word (killed, or out of memory?)"
    return replace(own, state=State.FAILED, error=error)


def _own_words(log: str) -> str:
    """The last line of a log in which `tsae` speaks."""
    if not log or not Path(log).is_file():
        return ""
    lines = Path(log).read_text(errors="replace").splitlines()
    return next((line.removeprefix("tsae: ") for line in reversed(lines) if line.startswith("tsae: ")), "")
