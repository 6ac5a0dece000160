"""What a scheduler of a cluster must be able to do for a sweep, and what it is told and tells in return.

A launch turns its missing stages into arrays (arrays.py) and submits one after the other, inputs first
(submission.py). An `Order` is one array as a scheduler gets it: how many jobs, which resources, what they wait for,
what each of them calls. The arrays that wait for nothing are submitted held and released at the end, so that nothing
has run if the scheduler refuses a later one:

    for array in arrays:        job ids = scheduler.submit(order of the array)      remembered in jobs.json
    at the end:                 scheduler.release(ids of the free arrays)
    if one of them is refused:  scheduler.cancel(every live job of the sweep's name)
    if it is `Full`:            scheduler.cancel(ids of the arrays that came with it), then fewer points, and so on; what
                                found no room is submitted by a job that waits for the rest (submission.py)

Nobody waits for the jobs. `status`, the next launch and `--cancel` look at the sweep's folder, where each job keeps a
record of itself, and ask the scheduler only which of the jobs live and how the others ended: once `queued`, and once
`accounted` if there are jobs that the queue has forgotten. All jobs of a sweep bear one name, by which they are found
whoever submitted them and when.

What runs in the end is `tsae.runtime.job.run_stage(call, place)`, in as many processes as the call says. The code of a
scheduler that starts it (schedulers/slurm/job.py) makes the `Place`: the job's own id as it stands in jobs.json, how
often it was started again, its host and log. Where several processes work together it sets torchrun's variables
(RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) before that. `run_stage` ends as follows, and the batch
script makes of it what the scheduler needs to hear:

    returns                  the stage is done; jobs that wait for it may start
    raises Preempted (75)    asked to leave by SIGTERM or SIGUSR2 and saved: run the same job again, under the same id
    raises anything else     failed: jobs that wait for it must never start (but those with `Inputs.however_they_end`)

A job that is killed from outside because its time is over, its place is wanted or its node is lost is run again too;
one that a person cancels is not.

Job ids are `123`, or `123_4` for the job of index 4, counted from 0, in array 123; a scheduler with another notation
translates where it talks to its commands.

To add one: a folder beside slurm/ with a class that has what `Scheduler` lists, and a line in `SCHEDULERS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tsae.config import schema
from tsae.runtime.errors import TsaeError
from tsae.runtime.job import Call
from tsae.runtime.state import State
from tsae.sweep.cluster import Cluster
from tsae.sweep.jobscript import is_one_line
from tsae.sweep.resources import StageResources


class Full(TsaeError):
    """A scheduler takes no more jobs now: a limit on how many may be submitted is reached, in its words `limit`."""

    def __init__(self, message: str, limit: str) -> None:
        super().__init__(message)
        self.limit = limit


@dataclass(frozen=True)
class Limits:
    """What the scheduler was configured with; by default of one that does not answer, for a dry run."""

    cluster: str = "unknown"
    """Its name of the cluster: ids of another one mean other jobs."""
    max_array: int = 1001
    """Most jobs in one array; 1 where there are no arrays."""
    array_counts_once: bool = False
    """Whether an array counts as one job where submitted jobs are counted, however long it is."""


@dataclass(frozen=True)
class Inputs:
    """What the jobs of an array wait for; nothing, if both are empty."""

    one_by_one: tuple[str, ...] = ()
    """Ids of arrays of the same length: job i waits for job i of each of them."""
    jobs: tuple[str, ...] = ()
    """Ids of jobs, or of whole arrays, that every job of this array waits for."""
    however_they_end: bool = False
    """Whether a failure of `jobs` will do too, as for the report; else all must end well."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """One array, all that a scheduler needs to know of it."""

    kind: str
    """Kind of its stages: harvest, train, …"""
    job_name: str
    """What all jobs of the sweep are called, and no others."""
    comment: str
    """For people: `train of split_fraction-pythia`."""
    folder: Path
    """Exists at `submit`; the script, the calls and the logs lie there."""
    calls: Sequence[Call]
    """What each job runs; as many jobs as there are calls."""
    resources: StageResources
    inputs: Inputs
    hold: bool
    """Whether its jobs wait for `release` besides."""
    max_parallel: int
    """Most of its jobs that run at the same time."""
    cluster: Cluster
    """The site's notice before the end of a job's time, and the like."""
    setup: Sequence[str]
    """Lines of shell that the script runs before python: the site's own, then the variables of the jobs."""
    python: Sequence[str]
    """The command before python's arguments: an interpreter, or a container's command that ends with one."""

    def __post_init__(self) -> None:
        """Raises TsaeError for what must not stand in a script, wherever it came from."""
        schema.build(StageResources, schema.to_plain(self.resources), self.comment, "resources")
        schema.build(Cluster, {"environment": self.cluster.environment}, self.comment)
        for text in (self.job_name, self.comment, str(self.folder), *self.inputs.one_by_one, *self.inputs.jobs):
            if not is_one_line(text):
                raise TsaeError(
                    f"{text!r}: stands in the scripts of jobs, where no line break or other control character is allowed"
                )


@dataclass(frozen=True)
class Seen:
    """What a scheduler knows of one job. How its stage is doing, the job's own record tells better."""

    state: State
    """QUEUED or RUNNING while it lives; then DONE, FAILED (ended by itself) or INTERRUPTED (was ended)."""
    node: str = ""
    since: float | None = None
    """When it started to run, in seconds since the epoch; of a job that runs."""
    why: str = ""
    """Why it will not run soon, or how it ended, where that is known: one line for people."""

    @property
    def alive(self) -> bool:
        """Whether it runs or will."""
        return self.state in (State.QUEUED, State.RUNNING)


class Scheduler(Protocol):
    """A scheduler; objects of it keep nothing. What it complains about is raised as a TsaeError of one line."""

    name: str
    """As in `SCHEDULERS`."""
    title: str
    """For people: `Slurm`."""
    command: str
    """The program that takes a script: `sbatch`."""
    silence: str
    """What is said where it is asked for and does not answer: `no controller answers \\`scontrol ping\\``."""

    def answers(self) -> bool:
        """Whether there is one to submit to from here; a machine may have its commands without one."""

    def limits(self) -> Limits:
        """What it says of itself."""

    def submit(self, order: Order) -> list[str]:
        """Submit one array; the ids of its jobs, in the order of `order.calls`. A single call needs no array.

        Raises `Full` where all of it finds no room now and less of it, or later, may.
        """

    def script(self, order: Order) -> str:
        """The batch script that `submit` would hand over; nothing is written. Ids in `inputs` may be words."""

    def log(self, order: Order, job: str) -> Path:
        """Where the first process of `job` writes its output, stdout and stderr."""

    def queued(self, job_name: str) -> dict[str, Seen]:
        """Job id → what is known of it, for all jobs of the name that it has not forgotten; one query."""

    def accounted(self, job_name: str, since: float) -> dict[str, Seen]:
        """Job id → how it ended, of jobs submitted after `since` (epoch seconds); one query.

        Empty where there are no accounts. They may lag behind the queue by seconds.
        """

    def cancel(self, jobs: Iterable[str]) -> None:
        """End jobs, whether they run or wait, for good; those that have ended already are left alone."""

    def release(self, jobs: Iterable[str]) -> None:
        """Let jobs, or whole arrays, start that were submitted with `hold`."""

    def ending(self, job_name: str) -> str:
        """The command line by which a person ends all jobs of the name."""

    def adopt_place(self) -> None:
        """Where it started several of this process, say so in torchrun's variables; set ones win. Else do nothing."""
