"""The schedulers of clusters that sweeps can be given to. A new one is a folder here and a line in `SCHEDULERS`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from tsae.runtime.errors import TsaeError, suggestion

if TYPE_CHECKING:
    from tsae.sweep.schedulers.base import Scheduler

SCHEDULERS = {
    "slurm": "tsae.sweep.schedulers.slurm.scheduler:Slurm",
    "gridengine": "tsae.sweep.schedulers.gridengine.scheduler:GridEngine",
}
"""Name, as `--executor` takes it and jobs.json keeps it → `module:class`; `auto` takes the first that answers."""


def find(name: str) -> Scheduler:
    """The scheduler called `name`; its module is loaded now. Raises TsaeError for a name that is not registered."""
    if name not in SCHEDULERS:
        raise TsaeError(f"scheduler '{name}': unknown; {suggestion(name, SCHEDULERS)}there are {', '.join(SCHEDULERS)}")
    module, _, attribute = SCHEDULERS[name].partition(":")
    scheduler: Scheduler = getattr(importlib.import_module(module), attribute)()
    return scheduler


def everyone() -> list[Scheduler]:
    """All that are registered, whether there is one on this machine or not."""
    return [find(name) for name in SCHEDULERS]


def answering() -> Scheduler | None:
    """The first that answers on this machine."""
    return next((scheduler for scheduler in everyone() if scheduler.answers()), None)


def adopt_place() -> None:
    """Where a scheduler itself started several of this process, say so in torchrun's variables; set ones win."""
    for scheduler in everyone():
        scheduler.adopt_place()
