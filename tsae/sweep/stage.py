"""A stage: one unit of work of a sweep, and where its traces are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsae.experiments.registry import EXPERIMENTS
from tsae.sweep.resources import StageResources

KINDS = ("harvest", "train", "evaluate", *sorted(EXPERIMENTS, key=lambda name: name != "explain"), "report")
"""Every kind of stage, in the order in which a plan lists them and a chain makes them: others show explanations."""


@dataclass(frozen=True)
class Stage:
    """One unit of work: a function with plain arguments, what it waits for, and where its traces are."""

    kind: str
    """One of `KINDS`, or `submit`: what a launch found no room for, by a job (chain.py)."""
    key: str
    """Content hash: stages with equal keys are the same work."""
    subject: str
    """The store or the point that it makes."""
    function: str
    """`module:name` of what does the work."""
    config: str | tuple[str, ...] | None
    """Point or points whose configuration file is the first argument, as a path or a list of paths; None: their folder."""
    arguments: tuple[Any, ...]
    """The arguments after it."""
    points: tuple[str, ...]
    """Names of the points that need it."""
    depends_on: tuple[str, ...]
    """Keys of the stages that come before it."""
    record: Path
    """Folder in which the job says what becomes of it."""
    progress: Path
    lock: Path
    resources: StageResources
    on_gpu: bool
    """Whether it uses a GPU where there is one."""
    is_done: Callable[[], bool]
    after_failures: bool = False
    """Whether it runs once those before it have ended, however that was; else all of them must be done."""
    then: tuple[Stage, ...] = ()
    """Stages that follow in its job, in this order (`chained` in chain.py)."""
    alone: Stage | None = None
    """Itself without them, where there are any."""

    @property
    def label(self) -> str:
        """For people: `train split_fraction=0.2`."""
        kinds = dict.fromkeys(stage.kind for stage in self.then)
        return f"{self.kind} {self.subject}" + (f", then {', '.join(kinds)}" if kinds else "")

    @property
    def apart(self) -> tuple[Stage, ...]:
        """Itself and those that follow in its job, each alone."""
        return (self.alone or self, *self.then)

    def then_in(self, configs: Path) -> list[dict[str, Any]]:
        """Those that follow, as `tsae.runtime.job.Call` has them."""
        records = {stage.key: str(stage.record) for stage in self.then}
        return [
            {
                "record": str(stage.record),
                "function": stage.function,
                "arguments": list(stage.arguments_in(configs)),
                "label": stage.label,
                "after": [records[key] for key in stage.depends_on if key in records],
            }
            for stage in self.then
        ]

    def arguments_in(self, configs: Path) -> tuple[Any, ...]:
        """What its function is called with, where folder `configs` holds the configuration of each point."""
        if self.config is None:
            return (str(configs), *self.arguments)
        if isinstance(self.config, str):
            return (str(config_file(configs, self.config)), *self.arguments)
        return ([str(config_file(configs, name)) for name in self.config], *self.arguments)


def config_file(folder: Path, point: str) -> Path:
    """The resolved configuration of `point` in `folder`."""
    return folder / f"{point}.yaml"
