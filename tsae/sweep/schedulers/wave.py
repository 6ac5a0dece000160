"""As many of a launch's stages as a scheduler has room for: whole points first, and a job behind them for the rest."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence, Sized
from contextlib import suppress
from pathlib import Path

from tsae.sweep.attempt import Submitted
from tsae.sweep.cluster import Cluster
from tsae.sweep.schedulers.arrays import Array, to_arrays
from tsae.sweep.schedulers.base import Full, Inputs, Order, Scheduler
from tsae.sweep.stage import Stage


class Wave:
    """What one launch submits, array by array; what waits for nothing is held."""

    def __init__(
        self,
        scheduler: Scheduler,
        cluster: Cluster,
        alive: Mapping[str, str],
        order: Callable[[int, Array, Inputs, bool], Order],
    ) -> None:
        self._scheduler, self._cluster, self._alive, self._order = scheduler, cluster, alive, order
        self._limits = scheduler.limits()
        self._orders = 0
        self._ids: dict[Array, str] = {}
        self.jobs: dict[str, Submitted] = {}
        """Stage key → what was submitted for it."""

    @property
    def held(self) -> list[str]:
        """Ids of the arrays that wait for their release."""
        return [array_id for array, array_id in self._ids.items() if array.is_free]

    def fill(self, stages: Sequence[Stage]) -> Full | None:
        """Submit `stages`, or the first of them that find room; why not all, where that is so.

        Raises TsaeError where the scheduler refuses one for another reason, `Full` where none finds room.
        """
        once = self._limits.array_counts_once
        units = [list(stages)] if once else units_of(stages)
        # How many units are tried at once; the stages of one by one, where not even one unit finds room.
        first, size, full = 0, 0 if once else len(units), None
        while first < len(units):
            part = [stage for unit in units[first : first + max(1, size)] for stage in unit]
            try:
                self._take(part, self._limits.max_array if size or once else 1, whole=size > 0)
            except Full as said:
                full = said
                if size == 0:
                    break
                size //= 2
            else:
                first += max(1, size)
        if full is not None and not self.jobs:
            raise full
        return full if len(self.jobs) < len(stages) else None

    def follow(self, stage: Stage) -> str | None:
        """Submit `stage` to run once all this has ended, instead of the last job if need be; its job, if there is room."""
        array = Array(stage.kind, self._cluster.resources_of("report", stage.resources), [stage])
        with suppress(Full):
            return self._behind(array)
        counted: Sized = self._ids if self._limits.array_counts_once else self.jobs
        if len(counted) == 1:
            return None
        last = list(self._ids)[-1]
        self._take_back([last])
        with suppress(Full):
            if not self._limits.array_counts_once and len(last.stages) > 1:
                self._take(last.stages[:-1], self._limits.max_array, whole=True)
            return self._behind(array)
        return None

    def _take(self, stages: Sequence[Stage], max_array: int, whole: bool) -> None:
        """Submit `stages` in arrays; if one is `Full`, which is raised, none of them stays where the `whole` is wanted."""
        before = dict(self._ids)
        ready = {**self._alive, **{key: entry.job for key, entry in self.jobs.items()}}
        try:
            for array in to_arrays(stages, self._cluster, max_array, ready):
                self._ids[array] = self._submit(array, array.inputs(self._ids), hold=array.is_free)
        except Full:
            if whole:
                self._take_back([array for array in self._ids if array not in before])
            raise

    def _take_back(self, arrays: Sequence[Array]) -> None:
        """Cancel `arrays`, of which none has run, as if they had not been submitted."""
        self._scheduler.cancel(self._ids.pop(array) for array in arrays)
        for array in arrays:
            shutil.rmtree(Path(self.jobs[array.stages[0].key].log).parent)
            for stage in array.stages:
                del self.jobs[stage.key]

    def _behind(self, array: Array) -> str:
        everything = Inputs(jobs=tuple(self._ids.values()), however_they_end=True)
        self._submit(array, everything, hold=False)
        return self.jobs[array.stages[0].key].job

    def _submit(self, array: Array, inputs: Inputs, hold: bool) -> str:
        """Submit one array; its id."""
        order = self._order(self._orders, array, inputs, hold)
        order.folder.mkdir()
        began = time.time()
        try:
            jobs = self._scheduler.submit(order)
        except Full:
            shutil.rmtree(order.folder)
            raise
        self._orders += 1
        for stage, call, job in zip(array.stages, order.calls, jobs, strict=True):
            self.jobs[stage.key] = Submitted(
                stage=stage.key,
                label=stage.label,
                job=job,
                cluster=self._limits.cluster,
                submitted=began,
                executor=self._scheduler.name,
                log=str(self._scheduler.log(order, job)),
                attempt=call.attempt,
            )
        return jobs[0].partition("_")[0]


def units_of(stages: Sequence[Stage]) -> list[list[Stage]]:
    """`stages` by the point that is the first to need them, the report last; no unit needs anything of a later one."""
    names = dict.fromkeys(stage.points[0] if stage.points else "" for stage in stages if not stage.after_failures)
    place = {name: number for number, name in enumerate(names)}
    of: dict[str, int] = {}
    units: dict[int, list[Stage]] = {}
    for stage in stages:
        own = len(place) if stage.after_failures else place[stage.points[0] if stage.points else ""]
        of[stage.key] = max([own, *(of[key] for key in stage.depends_on if key in of)])
        units.setdefault(of[stage.key], []).append(stage)
    return [units[number] for number in sorted(units)]
