"""Which stages share an array, and what each array waits for; Slurm itself is in tests/system/slurm."""

from __future__ import annotations

from pathlib import Path

from tsae.sweep.cluster import Cluster
from tsae.sweep.resources import StageResources
from tsae.sweep.schedulers.arrays import Array, to_arrays
from tsae.sweep.schedulers.slurm.scheduler import dependency
from tsae.sweep.stage import Stage


def stage(key: str, *after: str, gpus: int | None = None) -> Stage:
    """A stage whose kind is its key without the digits."""
    here = Path(key)
    return Stage(
        kind=key.rstrip("0123456789"),
        key=key,
        subject=key,
        function="os:getcwd",
        config=None,
        arguments=(),
        points=(),
        depends_on=after,
        record=here,
        progress=here,
        lock=here,
        resources=StageResources(gpus=gpus),
        on_gpu=False,
        is_done=lambda: False,
        after_failures=key == "report",
    )


def described(stages: list[Stage], max_array: int = 1000, alive: dict[str, str] | None = None) -> list[str]:
    """`a b after …` for each array; arrays are numbered from 0."""
    arrays = to_arrays(stages, Cluster(), max_array, alive)
    ids: dict[Array, str] = {array: f"#{number}" for number, array in enumerate(arrays)}
    lines = []
    for array in arrays:
        wanted = dependency(array.inputs(ids))
        lines.append(" ".join(entry.key for entry in array.stages) + (f" after {wanted}" if wanted else ""))
    return lines


def test_points_over_one_harvest_are_one_array_each_and_follow_each_other_one_by_one() -> None:
    names = range(3)
    stages = [stage("harvest0")]
    stages += [stage(f"train{n}", "harvest0") for n in names]
    stages += [stage(f"evaluate{n}", "harvest0", f"train{n}") for n in names]
    stages += [stage("report", *(f"evaluate{n}" for n in names))]
    assert described(stages) == [
        "harvest0",
        "train0 train1 train2 after afterok:#0",
        "evaluate0 evaluate1 evaluate2 after aftercorr:#1,afterok:#0",
        "report after afterany:#2",
    ]


def test_each_point_waits_for_its_own_harvest_only() -> None:
    """Two harvests with two points each, then a harvest for each point."""
    shared = [stage("harvest0"), stage("harvest1")]
    shared += [stage(f"train{n}", f"harvest{n // 2}") for n in range(4)]
    assert described(shared) == [
        "harvest0 harvest1",
        "train0 train1 after afterok:#0_0",
        "train2 train3 after afterok:#0_1",
    ]
    own = [stage("harvest0"), stage("harvest1"), stage("train0", "harvest1"), stage("train1", "harvest0")]
    assert described(own) == ["harvest0 harvest1", "train1 train0 after aftercorr:#0"]


def test_some_elements_of_an_array_are_waited_for_by_name() -> None:
    stages = [stage("harvest0"), stage("harvest1"), stage("harvest2"), stage("train0", "harvest0")]
    stages += [stage("train1", "harvest2"), stage("train2", "harvest1"), stage("train3", "harvest1")]
    assert described(stages) == [
        "harvest0 harvest1 harvest2",
        "train0 after afterok:#0_0",
        "train1 after afterok:#0_2",
        "train2 train3 after afterok:#0_1",
    ]


def test_a_harvest_that_several_jobs_share_is_waited_for_as_a_whole() -> None:
    stages = [stage("harvest0"), stage("harvest1")]
    stages += [stage(f"train{n}", "harvest0", "harvest1") for n in range(2)]
    assert described(stages)[1] == "train0 train1 after afterok:#0"


def test_arrays_are_cut_where_the_cluster_says_and_what_follows_is_cut_alike() -> None:
    stages = [stage(f"train{n}") for n in range(3)] + [stage(f"evaluate{n}", f"train{n}") for n in range(3)]
    assert described(stages, max_array=2) == [
        "train0 train1",
        "train2",
        "evaluate0 evaluate1 after aftercorr:#0",
        "evaluate2 after afterok:#1",
    ]


def test_other_resources_mean_another_array() -> None:
    stages = [stage("train0"), stage("train1", gpus=1), stage("train2")]
    assert described(stages) == ["train0 train2", "train1"]


def test_jobs_of_an_earlier_launch_are_waited_for() -> None:
    stages = [stage("train0", "harvest0"), stage("train1", "harvest0"), stage("evaluate0", "train7")]
    assert described(stages, alive={"harvest0": "12", "train7": "13_7", "train8": "13_8"}) == [
        "train0 train1 after afterok:12",
        "evaluate0 after afterok:13_7",
    ]
