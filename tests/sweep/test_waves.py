"""Sweeps larger than a limit on submitted jobs, on a scheduler that only counts; the real ones are in tests/system."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.sweep.test_arrays import stage
from tsae.sweep.attempt import Attempt
from tsae.sweep.cluster import Cluster
from tsae.sweep.schedulers.base import Full, Limits, Order
from tsae.sweep.schedulers.slurm.scheduler import Slurm
from tsae.sweep.schedulers.submission import Submission
from tsae.sweep.schedulers.wave import units_of
from tsae.sweep.stage import Stage


class Counting:
    """A scheduler that takes `room` jobs, of which all end at once when a test says so."""

    name = "slurm"
    title = "Counting"

    def __init__(self, room: int, max_array: int, array_counts_once: bool) -> None:
        self.room, self.known = room, Limits("here", max_array, array_counts_once)
        self.orders: dict[str, Order] = {}
        self.released: list[str] = []

    def limits(self) -> Limits:
        return self.known

    def used(self) -> int:
        return sum(1 if self.known.array_counts_once else len(order.calls) for order in self.orders.values())

    def submit(self, order: Order) -> list[str]:
        assert len(order.calls) <= self.known.max_array
        if self.used() + (1 if self.known.array_counts_once else len(order.calls)) > self.room:
            raise Full(f"{order.comment}: no room; nothing was submitted", "no room")
        number = str(order.folder.name.partition("-")[0])
        assert number not in self.orders
        self.orders[number] = order
        return [number] if len(order.calls) == 1 else [f"{number}_{index}" for index in range(len(order.calls))]

    def log(self, order: Order, job: str) -> Path:
        return order.folder / job

    def cancel(self, jobs: Iterable[str]) -> None:
        for job in jobs:
            del self.orders[job]

    def release(self, jobs: Iterable[str]) -> None:
        self.released += jobs

    def labels(self, job: str) -> list[str]:
        """What a job, or an array, works on."""
        number, _, index = job.partition("_")
        calls = self.orders[number].calls
        return [calls[int(index)].label] if index else [call.label for call in calls]


def points(count: int) -> list[Stage]:
    """A harvest, `count` points of three stages each, of which the last waits for two, and a report."""
    names = range(count)
    made = [stage("harvest0")]
    made += [stage(f"train{n}", "harvest0") for n in names]
    made += [stage(f"evaluate{n}", "harvest0", f"train{n}") for n in names]
    made += [stage(f"probe{n}", f"train{n}", f"evaluate{n}") for n in names]
    made += [stage("report", *(f"probe{n}" for n in names))]
    owners = {f"{kind}{n}": (str(n),) for kind in ("train", "evaluate", "probe") for n in names}
    owners["harvest0"] = tuple(map(str, names))
    return [Stage(**{**vars(entry), "points": owners.get(entry.key, ())}) for entry in made]


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("max_array", [1, 3, 100])
@pytest.mark.parametrize("room", [*range(1, 15), 100])
def test_waves_submit_everything_once_and_nothing_before_its_inputs(
    tmp_path: Path, room: int, max_array: int, once: bool
) -> None:
    todo, done, waves = points(4), set[str](), 0
    kept = [stage(f"after{waves}") for waves in range(99)]
    while todo:
        scheduler = Counting(room, max_array, once)
        attempt = Attempt(tmp_path / f"{waves}")
        attempt.folder.mkdir()
        submission = Submission(
            scheduler=scheduler,  # type: ignore[arg-type]
            sweep_folder=tmp_path,
            attempt=attempt,
            cluster=Cluster(),
            rest=kept[waves],
        )
        labels = {entry.label: entry for entry in submission.submit(todo)}
        rest = attempt.rest()
        taken = [entry for entry in todo if entry.label in labels]
        assert taken, "each wave takes something"
        assert {label for job in scheduler.orders for label in scheduler.labels(job)} == set(labels)
        assert scheduler.used() <= room
        for entry in taken:
            order = next(o for o in scheduler.orders.values() if entry.label in [call.label for call in o.calls])
            index = [call.label for call in order.calls].index(entry.label)
            waits = {label for job in order.inputs.jobs for label in scheduler.labels(job)}
            waits |= {scheduler.labels(array)[index] for array in order.inputs.one_by_one}
            inputs = {other.label for other in points(4) if other.key in entry.depends_on and other.key not in done}
            assert inputs == waits
            assert order.hold == (not waits)
        assert scheduler.released == [number for number, order in scheduler.orders.items() if order.hold]
        assert (rest is None) == (len(taken) == len(todo))
        if rest is not None:
            assert set(rest.stages) == {entry.key for entry in todo} - {entry.key for entry in taken}
            assert (rest.job is None) == (len(labels) == len(taken))
            assert rest.job or room == 1
            if rest.job:
                behind = scheduler.orders[rest.job].inputs
                assert behind.however_they_end
                assert {label for job in behind.jobs for label in scheduler.labels(job)} == {e.label for e in taken}
        done |= {entry.key for entry in taken}
        todo = [entry for entry in todo if entry.key not in done]
        waves += 1
    assert waves == 1 if room == 100 else waves >= 1


def test_points_come_whole_and_in_their_order() -> None:
    assert [[entry.key for entry in unit] for unit in units_of(points(2))] == [
        ["harvest0", "train0", "evaluate0", "probe0"],
        ["train1", "evaluate1", "probe1"],
        ["report"],
    ]


@pytest.mark.parametrize(
    ("settings", "longest"),
    [
        ("MaxArraySize = 0\nMaxJobCount = 10000", 1),
        ("MaxArraySize = 1001\nMaxJobCount = 10000", 1001),
        ("MaxArraySize = 1001\nMaxJobCount = 40", 10),
        ("MaxArraySize = 1001\nMaxJobCount = 10000\nSchedulerParameters = bf_interval=1,max_array_tasks=7", 7),
    ],
)
def test_no_array_is_longer_than_slurm_allows_and_without_arrays_jobs_are_single(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: str, longest: int
) -> None:
    program = tmp_path / "scontrol"
    program.write_text(f"#!/bin/sh\necho 'ClusterName = lab\n{settings}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert Slurm().limits() == Limits("lab", longest)
