"""How a stage is doing: one vocabulary and one record, for its job, the queues, the schedulers and the status.

A job keeps the record of itself in a folder with one file, state.json, whole at every moment. A local queue keeps one
for each of its stages in queue.json. What `status` and a launch know of a stage is such a record too.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from tsae.runtime import metadata
from tsae.runtime.metadata import NATURAL


class State(StrEnum):
    """How a stage is doing, in the order in which the status counts them; the words are also those on disk."""

    DONE = "done"
    RUNNING = "running"
    ELSEWHERE = "elsewhere"
    """Of a stage in a local queue: another queue, or another process, works on it."""
    QUEUED = "queued"
    """A scheduler or a queue has it and will run it."""
    PREEMPTED = "preempted"
    """Was asked to leave and has saved its state; it goes on by itself."""
    FAILED = "failed"
    """Ended by itself and is not complete; only --retry-failed tries it again."""
    INTERRUPTED = "interrupted"
    """Was ended from outside; the next launch continues it."""
    BLOCKED = "blocked"
    """Waits for one that failed."""
    WAITING = "waiting"
    """Its inputs are not there yet, or nobody was asked to do it, or not by now."""


LIVE = frozenset([State.RUNNING, State.QUEUED, State.PREEMPTED])
"""Somebody has it, and it will end without another launch."""
OPEN = frozenset([State.WAITING, State.RUNNING, State.ELSEWHERE])
"""Of a stage in a local queue: not settled."""
BROKEN = frozenset([State.FAILED, State.INTERRUPTED, State.BLOCKED])
"""Did not come to its end."""

IN_FILE = (
    *("state", "stage", "executor", "job", "cluster", "attempt", "restarts"),
    *("host", "pid", "gpus", "log", "started", "ended", "error"),
)
"""What state.json holds."""
IN_QUEUE = ("state", "error", "cpus", "gpus", "started", "ended", "log", "pid", "pid_started", "elsewhere", "restarts")
"""What queue.json holds of each stage, where it is not at its default."""
SHAPE = {
    **dict.fromkeys(("stage?", "executor?", "job?", "attempt?", "host?", "error?", "pid_started?", "elsewhere?"), str),
    **dict.fromkeys(("cluster?", "gpus?", "log?"), (None, str)),
    **dict.fromkeys(("started?", "ended?", "began?"), (None, float)),
    **dict.fromkeys(("restarts?", "preemptions?", "pid?", "cpus?"), (None, NATURAL)),
}
"""What records hold beside `state`."""
QUEUE = {str: {"state?": set(State), **SHAPE}}
"""What queue.json holds, by the stages' keys."""
QUEUE_WORDS = {"started": "began", "restarts": "preemptions"}
"""What queue.json calls them."""


@dataclass
class Record:
    """How one stage is doing: who works on it or worked on it last, and how that ended."""

    state: State = State.WAITING
    host: str = ""
    started: float | None = None
    """When its job started, in seconds since the epoch."""
    ended: float | None = None
    error: str = ""
    """Why it failed, was ended, or does not run: one line for people."""
    log: str = ""
    job: str = ""
    """A scheduler's id, or a process id."""
    executor: str = ""
    """Who has it or had it last: a scheduler, local, debug, or nobody of this sweep."""
    stage: str = ""
    """For people: `train split_fraction=0.2`."""
    cluster: str | None = None
    attempt: str = ""
    """Stamp of the launch that asked for it."""
    restarts: int = 0
    """How often it was started again, after a preemption for example."""
    pid: int = 0
    """Its process, or the process group of a local job."""
    pid_started: str = ""
    cpus: int = 0
    gpus: str | None = None
    elsewhere: str = ""
    """Who works on it instead of this queue."""

    @classmethod
    def of(cls, folder: Path) -> Record | None:
        """What the last job said of itself in `folder`; None if none has started, or what it said cannot be read."""
        found = metadata.whole(state_path(folder), {"state": set(State), **SHAPE})
        known = {name: value for name, value in found.items() if name in IN_FILE and value is not None}
        return cls(**{**known, "state": State(known["state"])}) if known else None

    def save(self, folder: Path) -> None:
        """Write state.json in `folder`."""
        metadata.write(state_path(folder), {name: getattr(self, name) for name in IN_FILE} | {"log": self.log or None})

    def enter(self, folder: Path, state: State, error: str = "") -> None:
        """Save this with `state`. Of several processes of one run that fail the first one tells why."""
        known = Record.of(folder)
        same = known is not None and (known.attempt, known.restarts) == (self.attempt, self.restarts)
        if state != State.DONE and same and known is not None and known.state == State.FAILED:
            return
        replace(self, state=state, ended=None if state == State.RUNNING else time.time(), error=error).save(folder)

    def for_queue(self) -> dict[str, Any]:
        """As queue.json has it."""
        changed = [name for name in IN_QUEUE if getattr(self, name) != getattr(Record, name)]
        return {QUEUE_WORDS.get(name, name): getattr(self, name) for name in changed}

    @classmethod
    def from_queue(cls, plain: Mapping[str, Any]) -> Record:
        """From queue.json, of this version or another."""
        words = {QUEUE_WORDS.get(name, name): name for name in IN_QUEUE}
        known = {words[word]: value for word, value in plain.items() if word in words}
        return cls(**{**known, "state": State(known.get("state", State.WAITING))})


def state_path(folder: Path) -> Path:
    """Where the record in `folder` lies."""
    return folder / "state.json"


def mark_failed(folder: Path, error: str) -> None:
    """Let the record in `folder` say that the stage failed, for a job that could not say so itself."""
    known = Record.of(folder) or Record()
    replace(known, state=State.FAILED, ended=time.time(), error=error).save(folder)
