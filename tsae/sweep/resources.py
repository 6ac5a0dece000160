"""What the jobs of each stage may use: asked for by a sweep, with a site's defaults below."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Annotated

from tsae.config.bounds import Bound, Count, Natural, matching
from tsae.runtime.errors import TsaeError
from tsae.sweep.jobscript import OPTION, Option, Options, is_option

EXPERIMENTS = "experiments"
MINUTES = {"m": 1, "h": 60, "d": 24 * 60}
TIME_LIMITS = "allowed: '90m', '4h', '2d', '12:00:00', '1-12:00:00'"


def to_minutes(text: str) -> int:
    """Minutes in a time limit, rounded up. Raises TsaeError for one that Slurm would not take either."""
    short = re.fullmatch(r"0*([1-9]\d*)([mhd])", text)
    if short:
        return int(short[1]) * MINUTES[short[2]]
    clock = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text)
    if not clock or not any(int(part) for part in clock.groups("0")):
        raise TsaeError(f"time: {text} is impossible; {TIME_LIMITS}")
    days, hours, minutes, seconds = (int(part) for part in clock.groups("0"))
    return ((days * 24 + hours) * 60 + minutes) + (seconds > 0)


def _is_time(text: str) -> bool:
    try:
        to_minutes(text)
    except TsaeError:
        return False
    return True


Memory = Annotated[str, matching(r"(?ai)\d+([KMGT]B?)?", "allowed: '32G', '500M', '64000'")]
TimeLimit = Annotated[str, Bound(_is_time, TIME_LIMITS)]
GpuRequest = Annotated[
    str,
    Bound(
        lambda text: is_option(text.replace("{gpus}", "1")),
        f"only {{gpus}} is filled in, as in gpu:a100:{{gpus}}; {OPTION}",
    ),
]


@dataclass(frozen=True, kw_only=True)
class StageResources:
    """What one job of a stage may use; what is not said is the site's default, or else Slurm's own."""

    gpus: Natural | None = None
    """GPUs on each node; locally one by default where there are any."""
    nodes: Count | None = None
    """Nodes; by default 1."""
    tasks: Count | None = None
    """Processes on each node; by default one for each GPU, and one where there is none."""
    jobs: Count | None = None
    """Jobs that share one harvest, each with all that stands here; by default 1, and no other stage takes more."""
    cpus: Count | None = None
    """CPU cores of each process; locally a fair share of those at hand by default."""
    mem: Memory | None = None
    """Memory on each node, such as '32G'."""
    time: TimeLimit | None = None
    """Longest time that the job runs before it is stopped, saved and queued again: '90m', '4h', '2d', '12:00:00' or '1-12:00:00'."""
    partition: Option | None = None
    """Slurm's partition."""
    account: Option | None = None
    """Slurm's account."""
    qos: Option | None = None
    """Slurm's quality of service."""
    constraint: Option | None = None
    """Features that the nodes must have."""
    gres: GpuRequest | None = None
    """How this cluster wants GPUs to be asked for, if not by --gpus-per-node: 'gpu:a100:{gpus}'."""
    exclude: Option | None = None
    """Nodes that are not to be used."""
    extra: Options = field(default_factory=dict)
    """Any other option of sbatch: its name and value, true for one without a value."""

    @property
    def processes(self) -> int:
        """Processes of one job."""
        return (self.nodes or 1) * self.tasks_per_node

    @property
    def tasks_per_node(self) -> int:
        """Processes of one job on each node."""
        return self.tasks or max(1, self.gpus or 0)

    @property
    def minutes(self) -> int | None:
        """The time limit in minutes, rounded up; None for Slurm's own."""
        return None if self.time is None else to_minutes(self.time)

    @property
    def gpu_request(self) -> str | None:
        """The value of --gres, where GPUs are asked for in that way."""
        if self.gres is None or ("{" in self.gres and not self.gpus):
            return None
        return self.gres.replace("{gpus}", str(self.gpus))


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Resources of each stage."""

    harvest: StageResources = field(default_factory=StageResources)
    """Reading activations; several processes share the work."""
    train: StageResources = field(default_factory=StageResources)
    """Training one point; several processes train together."""
    evaluate: StageResources = field(default_factory=StageResources)
    """Measuring one point; several processes share the work."""
    experiments: StageResources = field(default_factory=StageResources)
    """One experiment on one point."""
    report: StageResources = field(default_factory=StageResources)
    """Writing the report."""

    def of(self, kind: str) -> StageResources:
        """Those of one kind of stage; every kind that has no entry of its own is an experiment."""
        found: StageResources = getattr(self, kind, self.experiments)
        return found


@dataclass(frozen=True, kw_only=True)
class SweepResources(Resources):
    """What a sweep asks for."""

    chain: bool = False
    """Whether the evaluation and the experiments of a point follow in the process that trained it, with what `train` may use: what they import and the language model are loaded once, and there are fewer jobs."""


def laid_over(over: StageResources, below: StageResources) -> StageResources:
    """`over`, with what it does not say from `below`."""
    values = {
        entry.name: getattr(below, entry.name)
        for entry in dataclasses.fields(over)
        if getattr(over, entry.name) is None
    }
    return dataclasses.replace(over, **values, extra={**below.extra, **over.extra})
