"""The stages of one point, in the order harvest → train → evaluate and experiments; and those of a sweep, merged.

Trainings that read the same batches become one job, which reads them once (`training.pack`); so do harvests of several
layers.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tsae import stages
from tsae.checkpoint import RunFolder
from tsae.config import run as configuration
from tsae.config import schema
from tsae.config.points import Point, file_name
from tsae.config.run import RunConfig
from tsae.experiments import driver
from tsae.experiments.registry import EXPERIMENTS
from tsae.runtime import environment
from tsae.sweep.resources import StageResources
from tsae.sweep.stage import Stage
from tsae.sweep.sweepfile import Sweep


class Chain:
    """Makes the stages of the points of one sweep, and knows the folders that belong to it."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        home = environment.home()
        self.folder = home / "sweeps" / sweep.folder_name
        self.checkpoints = home / "checkpoints" / sweep.folder_name
        self._runs: dict[str, RunFolder] = {}

    def run(self, point: Point) -> RunFolder:
        """Where `point` is trained and measured."""
        if point.name not in self._runs:  # a thousand points ask for theirs several times
            self._runs[point.name] = RunFolder.of(self.checkpoints, point.name)
        return self._runs[point.name]

    def harvests(self, point: Point) -> list[Stage]:
        """The harvest that `point` reads, as so many jobs as the sweep asks for."""
        config, resources = point.config, self.sweep.config.resources.harvest
        store, jobs = stages.store_path(config), resources.jobs or 1
        is_done = partial(stages.is_harvested, config)
        return [
            self._stage(
                kind="harvest",
                content=[str(store)] if jobs == 1 else [str(store), job, jobs],
                subject=store.name if jobs == 1 else f"{store.name} {job + 1} of {jobs}",
                function="tsae.stages:harvest_stage",
                point=point,
                arguments=(job, jobs),
                progress=stages.harvest_progress(store),
                lock=stages.harvest_lock(store, job, jobs),
                resources=resources,
                on_gpu=config.model.device != "cpu",
                is_done=is_done if jobs == 1 else partial(_share_is_harvested, config, store, job, jobs),
            )
            for job in range(jobs)
        ]

    def of(self, point: Point, harvests: list[Stage]) -> list[Stage]:
        """Everything after the harvest; what the sweep does not list is left out and must be done already."""
        config, run = point.config, self.run(point)
        read = tuple(stage.key for stage in harvests)
        # One that was killed while it cleared up is given again, and does nothing else.
        is_trained = lambda: run.is_trained(config) and not run.resume.exists()  # noqa: E731
        train = self._on_run(point, "train", config.training_hash, read, is_trained)
        inputs = (*read, train.key)
        evaluate = self._on_run(
            point, "evaluate", config.evaluation_hash, inputs, partial(stages.is_evaluated, config, run)
        )
        chain = {"train": train, "evaluate": evaluate}
        listed = [name for name in EXPERIMENTS if name in self.sweep.config.stages]
        for name in sorted(listed, key=lambda name: name != "explain"):
            explained = EXPERIMENTS[name].explained and "explain" in listed
            settings = schema.stable_hash(configuration.experiment_settings(config, name))
            before = (*inputs, chain["explain"].key) if explained else inputs
            chain[name] = self._on_run(point, name, settings, before, partial(driver.is_done, config, run, name))
        return [stage for kind, stage in chain.items() if kind in self.sweep.config.stages]

    def report(self, points: tuple[Point, ...], after: list[Stage], is_done: Callable[[], bool]) -> Stage:
        """The stage that writes the report of `points` once all of `after` have ended."""
        key = schema.stable_hash(["report", str(self.folder), [point.name for point in points]])
        return Stage(
            kind="report",
            key=key,
            subject=self.sweep.folder_name,
            function="tsae.sweep.report_job:report_stage",
            config=None,
            arguments=(list(self.sweep.overrides), self.sweep.folder_name),
            points=(),
            depends_on=tuple(one.key for stage in after for one in stage.apart),
            record=self.folder / "stages" / f"report-{key[:8]}",
            progress=self.folder / "report" / "progress.json",
            lock=self.folder / "report.lock",
            resources=self.sweep.config.resources.report,
            on_gpu=False,
            is_done=is_done,
            after_failures=True,
        )

    def submit(self, arguments: tuple[Any, ...]) -> Stage:
        """The stage that submits what a launch finds no room for, once that launch's jobs have ended."""
        return Stage(
            kind="submit",
            key=schema.stable_hash(["submit", str(self.folder)]),
            subject=f"the rest of {self.sweep.folder_name}",
            function="tsae.sweep.submit_job:submit_stage",
            config=None,
            arguments=arguments,
            points=(),
            depends_on=(),
            record=self.folder / "stages" / "submit",
            progress=self.folder / "stages" / "submit" / "progress.json",
            lock=self.folder / "submit.lock",
            resources=self.sweep.config.resources.report,
            on_gpu=False,
            is_done=lambda: False,
            after_failures=True,
        )

    def _on_run(
        self,
        point: Point,
        kind: str,
        settings: str,
        depends_on: tuple[str, ...],
        is_done: Callable[[], bool],
    ) -> Stage:
        run = self.run(point)
        experiment = kind in EXPERIMENTS
        return self._stage(
            kind=kind,
            content=[str(run.path), settings],
            subject=point.name,
            function="tsae.stages:experiment_stage" if experiment else f"tsae.stages:{kind}_stage",
            point=point,
            arguments=(str(self.checkpoints), point.name, *((kind,) if experiment else ())),
            depends_on=depends_on,
            progress=run.progress,
            lock=stages.run_lock(run, kind),
            resources=self.sweep.config.resources.of(kind),
            on_gpu=point.config.training.device != "cpu",
            is_done=is_done,
        )

    def _stage(
        self,
        *,
        kind: str,
        content: list[Any],
        subject: str,
        function: str,
        point: Point,
        arguments: tuple[Any, ...],
        progress: Path,
        lock: Path,
        resources: StageResources,
        on_gpu: bool,
        is_done: Callable[[], bool],
        depends_on: tuple[str, ...] = (),
    ) -> Stage:
        key = schema.stable_hash([kind, *content])
        return Stage(
            kind=kind,
            key=key,
            subject=subject,
            function=function,
            config=point.name,
            arguments=arguments,
            points=(point.name,),
            depends_on=depends_on,
            record=self.folder / "stages" / f"{file_name(f'{kind}-{subject}')}-{key[:8]}",
            progress=progress,
            lock=lock,
            resources=resources,
            on_gpu=on_gpu,
            is_done=is_done,
        )


def _share_is_harvested(config: RunConfig, store: Path, job: int, jobs: int) -> bool:
    """Whether one job's share is written; if all shares are but nobody declared the store complete, none is done."""
    from tsae.store.layout import StoreLayout

    if stages.is_harvested(config):
        return True
    layout = StoreLayout(store)
    if not layout.exists():
        return False
    written = [layout.is_settled(shard) for shard in layout.measured]
    return all(written[job::jobs]) and not all(written)


def merge(points: Iterable[Point], plan: Sequence[Stage]) -> list[Stage]:
    """The stages with those merged that read the same; what follows waits for all of them.

    Unfinished trainings on the same batches, at most `training.pack` in one, and unfinished harvests that read one text
    by one language model at different places.
    """
    configs = {point.name: point.config for point in points}
    groups: dict[str, list[Stage]] = defaultdict(list)
    for stage in plan:
        if stage.kind not in TOGETHER or stage.is_done():
            continue
        config = configs[str(stage.config)]
        if stage.kind == "harvest" or config.training.pack > 1:
            share = stage.arguments if stage.kind == "harvest" else ()
            groups[schema.stable_hash([stage.kind, TOGETHER[stage.kind][1](config), share])].append(stage)
    merged: dict[str, Stage] = {}
    for members in groups.values():
        size = len(members)
        if members[0].kind == "train":
            size = min(configs[stage.subject].training.pack for stage in members)
        for first in range(0, len(members), size):
            part = members[first : first + size]
            if len(part) > 1:
                merged |= dict.fromkeys((stage.key for stage in part), _merged(part))
    changed = [merged.get(stage.key, stage) for stage in plan]
    return [_after(stage, merged) for stage in {stage.key: stage for stage in changed}.values()]


TOGETHER = {
    "harvest": ("tsae.stages:harvest_places_stage", configuration.text_settings),
    "train": ("tsae.stages:train_pack_stage", configuration.reading_settings),
}
"""Kind of stage → what makes several of it, and what they must have in common."""


def _merged(members: Sequence[Stage]) -> Stage:
    """One stage that does the work of all of `members`; it shows the progress of the first."""
    one, names = members[0], tuple(str(stage.config) for stage in members)
    key = schema.stable_hash([stage.key for stage in members])
    return dataclasses.replace(
        one,
        key=key,
        subject=f"{one.subject} and {len(members) - 1} more",
        function=TOGETHER[one.kind][0],
        config=names,
        arguments=one.arguments if one.kind == "harvest" else (one.arguments[0], names),
        record=one.record.with_name(f"{one.kind}-pack-{key}"),
        points=tuple(dict.fromkeys(name for stage in members for name in stage.points)),
        is_done=partial(_all_done, members),
    )


def chained(plan: Sequence[Stage]) -> list[Stage]:
    """The stages with what reads an unfinished training put behind it, into one job of one process."""
    trainings = {stage.key for stage in plan if stage.kind == "train" and not stage.is_done()}
    behind: dict[str, list[Stage]] = defaultdict(list)
    for stage in plan:
        for key in trainings.intersection(stage.depends_on):
            behind[key].append(stage)
    following = {stage.key for members in behind.values() for stage in members}
    return [
        _followed(stage, tuple(behind[stage.key])) if stage.key in behind else stage
        for stage in plan
        if stage.key not in following
    ]


def _followed(training: Stage, members: tuple[Stage, ...]) -> Stage:
    return dataclasses.replace(
        training,
        then=members,
        alone=training,
        points=tuple(dict.fromkeys(name for stage in (training, *members) for name in stage.points)),
        resources=dataclasses.replace(training.resources, nodes=1, tasks=1),
        is_done=partial(_all_done, (training, *members)),
    )


def _all_done(members: Sequence[Stage]) -> bool:
    return all(stage.is_done() for stage in members)


def _after(stage: Stage, merged: dict[str, Stage]) -> Stage:
    inputs = dict.fromkeys(merged[key].key if key in merged else key for key in stage.depends_on)
    return dataclasses.replace(stage, depends_on=tuple(inputs))
