"""What a site adds to every sweep: ~/.config/tsae/cluster.yaml, or the file that `--cluster` names."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from tsae.config import schema
from tsae.config.bounds import Count, Natural
from tsae.config.paths import Place, located
from tsae.runtime.environment import expanded
from tsae.sweep.jobscript import Variables
from tsae.sweep.resources import Resources, StageResources, laid_over

TOGETHER = ("harvest", "train", "evaluate")
"""Stages that several processes share, one for each GPU if nothing else is said; the others take one."""
DEFAULT = Path("~/.config/tsae/cluster.yaml")


@dataclass(frozen=True, kw_only=True)
class Cluster(Resources):
    """A site's defaults; what a sweep says about its own resources comes first."""

    defaults: StageResources = field(default_factory=StageResources)
    """Resources of every stage, below those of its own kind."""
    max_parallel: Count | None = None
    """Most jobs of one array that run at the same time; by default as many as the scheduler lets run."""
    max_restarts: Natural = 100
    """How often one job may be queued again after preemption, time-outs and lost nodes before it counts as failed."""
    signal_seconds: Count = 120
    """Notice that a job gets before its time is over, in which it saves its state."""
    setup: tuple[str, ...] = ()
    """Lines of shell that each job runs first, such as `module load cuda`."""
    environment: Variables = field(default_factory=dict)
    """Variables for each job, such as NCCL_SOCKET_IFNAME."""
    container: str | None = None
    """Image that jobs run in, as `--container` takes it."""
    binds: tuple[str, ...] = ()
    """Folders that a container needs beside TSAE_HOME, HF_HOME and the data: `/scratch` or `/scratch:/data`."""

    def resources_of(self, kind: str, asked: StageResources) -> StageResources:
        """What a stage of `kind` gets: what the sweep asks for, else the site's for that kind, else its defaults."""
        resources = laid_over(laid_over(asked, self.of(kind)), self.defaults)
        if kind in TOGETHER or resources.tasks is not None:
            return resources
        return dataclasses.replace(resources, tasks=1)


def load_cluster(path: Path | None = None) -> Cluster:
    """The site's defaults in `path`, or in the usual place if there is such a file.

    Raises TsaeError for a missing `path`, an unknown key and a value that cannot be.
    """
    chosen = path or expanded(DEFAULT)
    if path is None and not chosen.exists():
        return Cluster()
    site, folder = schema.build(Cluster, schema.read_yaml(chosen), str(chosen)), chosen.absolute().parent
    binds = (bind.partition(":") for bind in site.binds)
    return dataclasses.replace(
        site,
        container=located(site.container, folder, Place()),
        binds=tuple("".join((located(here, folder, Place(always=True)), *there)) for here, *there in binds),
    )
