"""A stage as a job of this machine: what it is called with, where it writes, and what is said for it if it cannot."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from tsae.runtime import files, job
from tsae.sweep.attempt import Attempt
from tsae.sweep.stage import Stage

LAST_WORDS = 4096
"""Bytes from the end of a log in which a job's last line is looked for."""


def call_of(stage: Stage, attempt: Attempt, executor: str, processes: int = 1) -> job.Call:
    """`stage` as a job of `attempt` on this machine."""
    return job.Call(
        record=str(stage.record),
        function=stage.function,
        arguments=stage.arguments_in(attempt.points),
        label=stage.label,
        attempt=attempt.stamp,
        executor=executor,
        processes=processes,
        log=str(log_path(stage, attempt)),
    )


def log_path(stage: Stage, attempt: Attempt) -> Path:
    """Where a local job of `attempt` writes."""
    return attempt.folder / "logs" / f"{stage.record.name}.log"


def mark_failed(record: Path, error: str) -> None:
    """Let the record say that the stage failed."""
    state: dict[str, Any] = job.read_state(record) or {}
    files.write_json(job.state_path(record), {**state, "state": "failed", "ended": time.time(), "error": error})


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    try:
        with open(log, "rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - LAST_WORDS))
            lines = stream.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
