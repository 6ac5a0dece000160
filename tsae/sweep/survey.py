"""Where each stage of a sweep stands: from its output, its job's record, and whoever may still be at work on it.

A stage's output decides whether it is done. Of the rest, a job says itself how it ended; schedulers and the process
table are asked only whether it lives. A job that ended without a word was ended from outside: `interrupted`, not failed.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tsae.runtime import job, locks
from tsae.runtime.errors import TsaeError
from tsae.runtime.state import State
from tsae.sweep import schedulers
from tsae.sweep.attempt import Attempt, Submitted, attempts, job_name
from tsae.sweep.plan import Plan
from tsae.sweep.queue.background import lock_of, read_queue
from tsae.sweep.queue.runner import Claim, Status
from tsae.sweep.schedulers.base import Seen
from tsae.sweep.stage import Stage

STATES = ("done", "running", "queued", "preempted", "failed", "interrupted", "blocked", "waiting")
"""waiting: nobody was asked to do it, or not by now; blocked: it waits for one that failed."""
LIVE = ("running", "queued", "preempted")


@dataclass(frozen=True)
class Standing:
    """Where one stage stands."""

    state: str
    node: str = ""
    since: float | None = None
    """When its job started, in seconds since the epoch."""
    until: float | None = None
    """When it ended."""
    error: str = ""
    log: str = ""
    job: str = ""
    """A scheduler's id, where it has one."""
    executor: str = ""
    """Who has it or had it last: a scheduler, local, or nobody of this sweep."""


@dataclass(frozen=True)
class _Local:
    """A local queue: who it is, and whether it lives."""

    attempt: Attempt
    owner: locks.Owner | None

    @cached_property
    def tasks(self) -> dict[str, Status]:
        return read_queue(self.attempt)


@dataclass
class Survey:
    """A look at a whole sweep, with one query of each scheduler at most."""

    plan: Plan
    whatever_answers: bool = False
    """Whether to go on, and believe what the jobs said last, where a scheduler does not answer; else that is a TsaeError."""
    silence: dict[str, str] = field(init=False, default_factory=dict)
    """For people: scheduler → what its command said in place of an answer."""
    sweep_attempts: list[Attempt] = field(init=False)
    jobs: dict[str, Submitted] = field(init=False)

    def __post_init__(self) -> None:
        self.sweep_attempts = attempts(self.plan.folder)
        self._queues: dict[str, _Local] = {}
        self._queued: dict[str, dict[str, Seen] | None] = {}
        self._accounted: dict[str, dict[str, Seen]] = {}
        self.jobs = {}
        newest: dict[tuple[str | None, str], str] = {}
        for attempt in self.sweep_attempts:
            for entry in attempt.jobs():
                self.jobs[entry.stage] = entry
                newest[entry.cluster, entry.job] = attempt.stamp
        # Ids begin again when a scheduler's state is wiped: the latest job with an id is the one that it means now.
        self._reused = {
            key
            for key, entry in self.jobs.items()
            if entry.executor != "local" and newest[entry.cluster, entry.job] != entry.attempt
        }

    def standings(self, stages: Iterable[Stage]) -> dict[str, Standing]:
        """Stage key → where it stands; `stages` come after their inputs."""
        found: dict[str, Standing] = {}
        for stage in stages:
            standing, entry = self._of(stage), self.jobs.get(stage.key)
            standing = replace(standing, executor=entry.executor if entry else "")
            broken = any(key in found and found[key].state in ("failed", "blocked") for key in stage.depends_on)
            if broken and not stage.after_failures and standing.state in ("waiting", "interrupted"):
                standing = Standing("blocked")
            found[stage.key] = standing
        return found

    def _of(self, stage: Stage) -> Standing:
        entry, state = self.jobs.get(stage.key), _record(stage)
        if stage.is_done():
            log = str(state.get("log") or (entry.log if entry else ""))
            return Standing("done", str(state.get("host", "")), state.get("started"), state.get("ended"), log=log)
        if entry is None:
            return self._without_job(stage)
        mine = state if state.get("attempt") == entry.attempt else {}
        if mine.get("state") == "done":
            return Standing("waiting")  # it was done, and its output was taken away or is out of date
        if entry.executor == "local":
            return self._on_this_machine(stage, entry, mine)
        return self._on_cluster(stage, entry, mine)

    def _without_job(self, stage: Stage) -> Standing:
        """Not of this sweep's doing: another sweep, or a person, may be at work on the same output."""
        owner = locks.owner(stage.lock)
        return Standing("running", owner.host, owner.since) if owner else Standing("waiting")

    def _on_this_machine(self, stage: Stage, entry: Submitted, state: Mapping[str, Any]) -> Standing:
        queue = self.queue(entry.attempt)
        task = queue.tasks.get(stage.key, Status())
        node = str(state.get("host", ""))
        began, log = task.began or state.get("started"), task.log or entry.log
        if task.state == "failed" or state.get("state") == "failed":
            error = task.error or str(state.get("error", ""))
            return Standing("failed", node, began, task.ended or state.get("ended"), error, log)
        if task.state in ("running", "elsewhere") and (queue.owner is not None or _lives(task, node)):
            return Standing("running", node or socket.gethostname(), began, log=log)
        owner = locks.owner(stage.lock)  # a job whose queue was killed, or one that the debugger's queue is busy with
        if owner is not None:
            return Standing("running", owner.host, began or owner.since, log=log)
        if queue.owner is not None and task.state == "waiting":
            return Standing("preempted" if task.preemptions else "queued", log=log)
        if not began:
            return Standing("waiting")
        error = task.error or "ended without a word"
        return Standing("interrupted", node, began, task.ended or state.get("ended"), error, log)

    def _on_cluster(self, stage: Stage, entry: Submitted, state: Mapping[str, Any]) -> Standing:
        own = Standing(
            str(state.get("state", "")),
            str(state.get("host", "")),
            state.get("started"),
            state.get("ended"),
            str(state.get("error", "")),
            str(state.get("log") or entry.log),
            entry.job,
        )
        if own.state == "failed":
            return own
        queued = self._queue_of(entry.executor)
        if queued is None:
            return replace(own, state=own.state or "queued", until=None)
        seen = None if stage.key in self._reused else queued.get(entry.job)
        if seen is not None and seen.alive:
            if seen.state == State.RUNNING:
                return replace(own, state="running", node=seen.node, since=seen.since, until=None)
            return replace(own, state="preempted" if state else "queued", node="", since=None, error=seen.why)
        owner = locks.owner(stage.lock)
        if owner is not None:
            return replace(own, state="running", node=owner.host, since=owner.since, until=None)
        if seen is None and stage.key not in self._reused:
            seen = self._accounts_of(entry.executor).get(entry.job)
        if seen is None and entry.exit_code.exists():
            seen = Seen(State.FAILED)
        return _ended_without_a_word(own, seen, begun=bool(state))

    def queue(self, stamp: str) -> _Local:
        """The local queue of an attempt."""
        if stamp not in self._queues:
            attempt = Attempt(self.plan.folder / "attempts" / stamp)
            self._queues[stamp] = _Local(attempt, locks.owner(lock_of(attempt)))
        return self._queues[stamp]

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


class OtherQueues:
    """What the live queues of other launches of the same sweep say; looked at anew once a second."""

    def __init__(self, plan: Plan, own: Attempt) -> None:
        self._plan, self._own = plan, own
        self._looked = 0.0
        self._claims: dict[str, Claim] = {}

    def __call__(self, stage: Stage) -> Claim | None:
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
            if owner is None and not any(claim.alive for claim in self._claims.values()):
                continue
            for key, status in read_queue(attempt).items():
                known = self._claims.get(key)
                if owner is not None or (known is not None and known.owner == attempt.stamp):
                    alive = owner is not None and status.state in ("waiting", "running")
                    error = status.error if status.state == "failed" else ""
                    self._claims[key] = Claim(attempt.stamp, alive, error)


def _record(stage: Stage) -> dict[str, Any]:
    return job.read_state(Path(stage.record)) or {}


def _lives(task: Status, node: str) -> bool:
    here = node in ("", socket.gethostname())
    return here and bool(task.pid) and locks.started_at(task.pid) == task.pid_started


def _ended_without_a_word(own: Standing, seen: Seen | None, begun: bool) -> Standing:
    """A scheduler's job that lives no more and did not say how it ended; the accounting may lag, or there may be none."""
    word = seen.state if seen is not None else None
    node, why = own.node or (seen.node if seen is not None else ""), seen.why if seen is not None else ""
    if not begun and word != State.FAILED:
        return Standing("waiting")
    if not begun:
        return replace(own, state="failed", node=node, error=why or "ended before the stage began; its log may say why")
    if word == State.FAILED and why:
        return replace(own, state="failed", node=node, error=why)
    if word == State.INTERRUPTED:
        return replace(own, state="interrupted", node=node, error=own.error or why)
    # A scheduler counts a job as failed when its process ends by itself, as one does that runs out of memory.
    state = "failed" if word else "interrupted"
    return replace(own, state=state, node=node, error=own.error or "ended without a word (killed, or out of memory?)")
