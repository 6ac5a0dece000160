"""The words for how a stage is doing: one vocabulary for its job, the queues, the schedulers and the status."""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """How a stage is doing; the words are also those in state.json and queue.json."""

    DONE = "done"
    RUNNING = "running"
    ELSEWHERE = "elsewhere"
    """Another queue, or another process, works on it."""
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
    """Its inputs are not there yet, or nobody was asked to do it."""


LIVE = frozenset([State.RUNNING, State.QUEUED, State.PREEMPTED])
"""Somebody has it, and it will end without another launch."""
OPEN = frozenset([State.WAITING, State.RUNNING, State.ELSEWHERE])
"""Of a stage in a local queue: not settled."""
BROKEN = frozenset([State.FAILED, State.INTERRUPTED, State.BLOCKED])
"""Did not come to its end."""
