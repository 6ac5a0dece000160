"""A launch: decides under a lock what is missing and whose it is, and gives it to an executor."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tsae.config import schema
from tsae.runtime import locks
from tsae.runtime.errors import TsaeError
from tsae.runtime.state import LIVE, Record, State
from tsae.sweep import schedulers
from tsae.sweep.attempt import Attempt, Rest, shell_path
from tsae.sweep.cancel import undo_half_submissions
from tsae.sweep.cluster import Cluster, load_cluster
from tsae.sweep.container import Container
from tsae.sweep.container import container as container_of
from tsae.sweep.cost import cost_of_launch
from tsae.sweep.plan import Plan
from tsae.sweep.queue import background
from tsae.sweep.queue.display import Terminal
from tsae.sweep.queue.runner import Task
from tsae.sweep.schedulers.base import Full, Scheduler
from tsae.sweep.schedulers.submission import Submission
from tsae.sweep.stage import KINDS, Stage
from tsae.sweep.survey import Survey
from tsae.training import trackers

WAIT_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says beside the sweep."""

    executor: str
    cluster: Path | None = None
    container: str | None = None
    retry_failed: bool = False
    inexact: bool = False
    """Whether the plan's trainings go on inexactly, for the job that makes the next launch."""
    detach: bool = False
    probe: bool = False
    """Whether to time a few seconds of the work on this machine first."""
    rest: Rest | None = None
    """Of an earlier launch: only that is started, by the job that the launch left for it."""


@dataclass(frozen=True)
class Choice:
    """The unfinished stages, by what becomes of them now."""

    start: tuple[Stage, ...]
    """To start, or to watch until a queue that has them is done with them."""
    own: tuple[Stage, ...]
    """Those of `start` that nobody has."""
    left: tuple[Stage, ...]
    """Running or queued by another launch: left alone."""
    failed: tuple[Stage, ...]
    """Failed before, and not to be tried again."""
    blocked: tuple[Stage, ...]
    """Need one that failed, or one that another executor has; or no part of what was to be started."""
    standings: dict[str, Record]

    @property
    def alive(self) -> dict[str, str]:
        """Stage key → a scheduler's job, of what is left alone."""
        return {stage.key: self.standings[stage.key].job for stage in self.left if self.standings[stage.key].job}


def choose(plan: Plan, executor: str, retry_failed: bool, rest: Rest | None = None) -> Choice:
    """What becomes of each unfinished stage, or of those of `rest`; nothing is started."""
    survey = Survey(plan)
    unfinished = [part for stage in plan.unfinished() for part in _added(stage, survey)]
    standings = survey.standings(unfinished)
    start: list[Stage] = []
    own: list[Stage] = []
    left: list[Stage] = []
    failed: list[Stage] = []
    blocked: list[Stage] = []
    out_of_reach: set[str] = set()
    for stage in unfinished:
        standing = standings[stage.key]
        if standing.state == State.FAILED and not retry_failed and not (rest and stage.key in rest.stages):
            failed.append(stage)
            out_of_reach.add(stage.key)
        elif standing.state in LIVE and standing.executor not in ("", executor):
            left.append(stage)
            out_of_reach.add(stage.key)
        elif any(key in out_of_reach for key in stage.depends_on):
            blocked.append(stage)
            out_of_reach.add(stage.key)
        elif standing.state in LIVE and standing.executor:
            # A scheduler needs no launcher; a local queue watches, so that it can take over what another one leaves.
            (left if executor in schedulers.SCHEDULERS else start).append(stage)
        elif rest is not None and not set(stage.points) & set(rest.points):
            blocked.append(stage)  # a person ended it meanwhile
            out_of_reach.add(stage.key)
        else:
            start.append(stage)
            own.append(stage)
    return Choice(tuple(start), tuple(own), tuple(left), tuple(failed), tuple(blocked), standings)


def _added(stage: Stage, survey: Survey) -> list[Stage]:
    """A chain without what the job that has it does not know of, and that: the sweep may list more stages than then."""
    entry = survey.jobs.get(stage.key)
    if not stage.then or entry is None or survey.standings([stage])[stage.key].state not in LIVE:
        return [stage]
    others = {one.key: survey.jobs.get(one.key) for one in stage.then}
    known = [key for key, job in others.items() if job and (job.job, job.attempt) == (entry.job, entry.attempt)]
    of_job = tuple(one for one in stage.then if one.key in known)
    return [replace(stage, then=of_job), *(one for one in stage.then if one.key not in known)]


@dataclass(frozen=True)
class Launched:
    """What a launch came to."""

    choice: Choice
    broken: tuple[Task, ...] = ()
    """Stages that did not come to their end while it was watched."""
    submitted: int = 0
    """Stages that were given to a scheduler, or to a queue that nobody follows."""
    rest: Rest | None = None
    """What a scheduler had no room for."""


def launch(plan: Plan, options: Options) -> Launched:
    """Start what is missing; locally, follow it to its end unless `detach` is asked for."""
    scheduler = resolve(options.executor)
    executor = scheduler.name if scheduler else "debug" if options.executor == "debug" else "local"
    site = load_cluster(options.cluster) if scheduler or options.cluster else Cluster()
    with _launch_lock(plan):
        undo_half_submissions(plan.folder)
        choice = choose(plan, executor, options.retry_failed, options.rest)
        for stage in plan.stages:
            if stage.lock.exists():  # of one that was killed after its work, and is not given again
                locks.clear(stage.lock.parent, stage.lock.name)
        if not choice.start:
            return Launched(choice)
        image = container_for(plan, options, site, executor)
        if image is None:  # which may have other packages, and is told no keys of this machine
            require_packages(plan, choice.start)
        cost = cost_of_launch(plan, choice.start, site if scheduler else None)
        cost.require()
        if options.probe:
            from tsae.sweep.probe import probe

            print("\n".join(probe(cost.works)), file=sys.stderr)
        stages = [*choice.start, *(stage for stage in [plan.report()] if stage)]
        # A local queue may have to take over what another one has now.
        attempt = _begin(plan, choice.start, image)
        if scheduler:
            launched = _submit(submission_of(plan, scheduler, attempt, site, image, choice, options), stages, choice)
            print("\n".join(cost.lines), file=sys.stderr)  # what the scheduler refuses is one line
            return launched
        print("\n".join(cost.lines), file=sys.stderr)
        own = [*choice.own, *stages[len(choice.start) :]]
        terminal = Terminal()
        if executor == "local":
            queue = background.start(plan, stages, own, attempt, image)
        terminal.say(_headline(plan, choice, attempt, len(stages)))
    if executor == "debug":
        return Launched(choice, tuple(background.run_here(plan, stages, attempt, terminal)))
    if options.detach:
        return Launched(choice, submitted=len(own))
    return Launched(choice, tuple(background.follow(stages, attempt, queue, terminal)))


def resolve(executor: str) -> Scheduler | None:
    """The scheduler that `executor` means; None for this machine. Raises TsaeError where one is asked for in vain."""
    if executor == "auto":
        return schedulers.answering()
    if executor not in schedulers.SCHEDULERS:
        return None
    scheduler = schedulers.find(executor)
    if not scheduler.answers():
        raise TsaeError(f"--executor {executor}: {scheduler.silence}; --executor local runs on this machine")
    return scheduler


@contextmanager
def _launch_lock(plan: Plan) -> Iterator[None]:
    """One launcher of a sweep at a time decides what is missing; the next one sees what it has started."""
    path, waits = plan.folder / "launch.lock", False
    while True:
        holding = locks.hold(path, f"launch {plan.name}")
        try:
            holding.__enter__()
            break
        except locks.LockHeld as held:
            # Said once; an owner on another machine that was killed counts as alive for two minutes.
            if not waits:
                print(f"waiting: {held}", file=sys.stderr)
            waits = True
            time.sleep(WAIT_SECONDS)
    try:
        yield
    finally:
        holding.__exit__(None, None, None)


def require_packages(plan: Plan, stages: Sequence[Stage]) -> None:
    """Refuse what jobs on this machine would miss hours later: trackers, or keys of theirs, and taggers. Raises TsaeError."""
    from tsae.experiments.shared.tags import find_tagger

    points = {point.name: point.config for point in plan.points}
    configs = {
        kind: [points[name] for stage in stages for one in stage.apart if one.kind == kind for name in one.points]
        for kind in KINDS
    }
    trackers.require(name for config in configs["train"] for name in config.training.trackers)
    named = {("tsne", config.experiments.tsne.tagger, config.experiments.tsne.dataset) for config in configs["tsne"]}
    probes = [config.experiments.probe for config in configs["probe"]]
    named |= {("probe", probe.tagger, probe.dataset) for probe in probes if "syntax" in probe.tasks}
    for name, tagger, dataset in sorted(named):
        if tagger.partition(":")[0] in ("auto", "spacy"):  # a function of the user's may be found by jobs alone
            find_tagger(tagger, dataset, f"experiments.{name}.tagger")


def _begin(plan: Plan, stages: Sequence[Stage], image: Container | None) -> Attempt:
    points = plan.config_texts(list(stages))
    return Attempt.begin(plan.folder, plan.sources(), points, image.image if image else None)


def container_for(plan: Plan, options: Options, site: Cluster, executor: str) -> Container | None:
    """The image that the jobs run in, if any: the command line's, else the sweep's, else on a cluster the site's.

    Whatever the points' settings name and is there is seen inside. One that is not used is said on stderr. Raises
    TsaeError where `executor` cannot use it.
    """
    if executor == "debug" and options.container:
        raise TsaeError("--executor debug runs in this process, not in a container; --executor local starts one")
    on_cluster, own = executor in schedulers.SCHEDULERS, options.container or plan.sweep.config.container
    name = None if executor == "debug" else own or (site.container if on_cluster else None)
    if name is None:
        if unused := own or site.container:
            where = f"{plan.sweep.path}: " if own else f"{options.cluster}: "
            print(
                f"{where}container: {unused}: not used by --executor {executor}; --executor local --container {unused} "
                "runs in it here",
                file=sys.stderr,
            )
        return None
    named = {text for point in plan.points for text in _texts(schema.to_plain(point.config))}
    places, binds = [*sorted(named), *shell_path(in_image=True)], site.binds if on_cluster else ()
    image = container_of(name, places, binds, here=not on_cluster)
    if on_cluster and image.runtime == "docker":
        raise TsaeError(
            f"--container {name}: jobs of {schedulers.find(executor).title} run in Apptainer, not in Docker; "
            "`apptainer build tsae.sif docker-daemon:IMAGE:TAG` turns an image of Docker into a file"
        )
    return image


def _texts(plain: Any) -> Iterator[str]:
    """Every text in a tree of settings."""
    if isinstance(plain, str):
        yield plain
    elif isinstance(plain, dict | list):
        for part in plain.values() if isinstance(plain, dict) else plain:
            yield from _texts(part)


def submission_of(
    plan: Plan,
    scheduler: Scheduler,
    attempt: Attempt,
    site: Cluster,
    image: Container | None,
    choice: Choice,
    options: Options,
) -> Submission:
    """What goes to a scheduler in a launch of `plan`."""
    cluster = str(options.cluster.absolute()) if options.cluster else None
    rest = plan.submit(scheduler.name, cluster, options.container, options.inexact, os.pathsep.join(shell_path()))
    return Submission(
        scheduler=scheduler,
        sweep_folder=plan.folder,
        attempt=attempt,
        cluster=site,
        container=image,
        max_parallel=plan.sweep.config.max_parallel,
        alive=choice.alive,
        rest=rest if options.rest or Survey(plan).submitter().state not in LIVE else None,
    )


def _submit(submission: Submission, stages: Sequence[Stage], choice: Choice) -> Launched:
    try:
        jobs = submission.submit(stages)
    except Full as full:
        if submission.rest is not None and not choice.left:
            raise
        points = dict.fromkeys(point for stage in choice.start for point in stage.points)
        return Launched(choice, rest=Rest(tuple(stage.key for stage in stages), tuple(points), full.limit, None))
    rest = submission.attempt.rest()
    arrays: dict[str, list[str]] = {}
    for entry in jobs:
        arrays.setdefault(entry.job.partition("_")[0], []).append(entry.label)
    for number, labels in arrays.items():
        more = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
        print(f"job {number}: {labels[0]}{more}", file=sys.stderr)
    return Launched(choice, submitted=len(jobs) - bool(rest and rest.job), rest=rest)


def _headline(plan: Plan, choice: Choice, attempt: Attempt, to_run: int) -> str:
    complete = len(plan.stages) - len(choice.start) - len(choice.failed) - len(choice.blocked) - len(choice.left)
    return (
        f"{plan.name}: {len(plan.points)} points, {to_run} stages to run, {complete} complete; "
        f"logs in {attempt.folder / 'logs'}"
    )
