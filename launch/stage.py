"""A stage: one unit of work of a sweep, and where its traces are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweepfile import StageResources


@dataclass(frozen=True)
class Stage:
    """One unit of work: a function of `tsae.stages` with plain arguments, and where its traces are."""

    kind: str
    """harvest, train or evaluate."""
    key: str
    """Content hash: stages with equal keys are the same work."""
    subject: str
    """The store or the point that it makes."""
    function: Callable[..., object]
    """Does the work; jobs import it by name, so it belongs to an installed package."""
    arguments: tuple[Any, ...]
    points: tuple[str, ...]
    """Names of the points that need it."""
    depends_on: tuple[str, ...]
    """Keys of the stages whose output it reads."""
    progress: Path
    lock: Path
    logs: Path
    """Folder with one folder for each attempt."""
    resources: StageResources
    on_gpu: bool
    """Whether it uses a GPU where there is one."""
    is_done: Callable[[], bool]

    @property
    def label(self) -> str:
        """For people: `train split_fraction=0.2`."""
        return f"{self.kind} {self.subject}"
