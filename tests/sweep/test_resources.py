"""What a sweep asks for, a site's defaults below it, and the time limits both may write."""

from __future__ import annotations

from pathlib import Path

import pytest

from tsae.runtime.errors import TsaeError
from tsae.sweep.cluster import Cluster, load_cluster
from tsae.sweep.resources import StageResources, to_minutes
from tsae.sweep.sweepfile import load_sweep


def test_a_sweep_comes_before_the_stage_and_the_stage_before_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(
        "defaults: {partition: gpu, account: us, extra: {nice: 10}}\n"
        "train: {partition: big, time: 2d, extra: {exclusive: true}}\n"
        "experiments: {time: 1h}\n"
    )
    cluster = load_cluster(file)
    asked = cluster.resources_of("train", StageResources(time="90m", gpus=4, nodes=2, extra={"nice": 1}))
    assert (asked.partition, asked.account, asked.minutes) == ("big", "us", 90)
    assert asked.extra == {"nice": 1, "exclusive": True}
    assert asked.processes == 8
    assert cluster.resources_of("probe", StageResources()).minutes == 60
    assert cluster.resources_of("report", StageResources()).partition == "gpu"
    processes = {kind: cluster.resources_of(kind, StageResources(gpus=2)).processes for kind in ("evaluate", "probe")}
    assert processes == {"evaluate": 2, "probe": 1}


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90m", 90), ("4h", 240), ("2d", 2880), ("12:00:00", 720), ("1-12:30:00", 2190), ("00:00:30", 1)],
)
def test_time_limits_are_minutes(text: str, minutes: int) -> None:
    assert to_minutes(text) == minutes


@pytest.mark.parametrize("text", ["12:00", "soon", "00:00:00", "-5m", "1.5h", "60", "0m"])
def test_a_time_limit_that_can_be_misread_is_refused(text: str) -> None:
    with pytest.raises(TsaeError, match=f"time: {text} is impossible; allowed: '90m'"):
        to_minutes(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("default: {}", "did you mean 'defaults'"),
        ("train: {gpu: 1}", "did you mean 'gpus'"),
        ("max_parallel: 0", "max_parallel: 0 is impossible"),
        ("train: {time: 4:00:00}", "train.time"),
        ("train: {time: tomorrow}", "train.time: tomorrow is impossible; allowed: '90m'"),
        ("train: {gpus: -1}", "train.gpus: -1"),
        ("train: {mem: 1.5G}", "train.mem: 1.5G is impossible; allowed: '32G'"),
        ("train: {gres: 'gpu:{count}', gpus: 1}", "gres"),
        ("defaults: {extra: {array: 1-5}}", "defaults.extra: .* is impossible; allowed: names of options"),
        ("train: {extra: {job_name: mine}}", "and none that tsae sets itself"),
    ],
)
def test_a_bad_cluster_file_is_refused_in_one_line(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    with pytest.raises(TsaeError, match=words) as caught:
        load_cluster(file)
    assert str(file) in str(caught.value)


def test_a_sweep_s_own_resources_are_checked_too(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("grid: {sae.k: [1, 2]}\nresources: {train: {time: '12:00'}}\n")
    with pytest.raises(TsaeError, match=r"sweep.yaml: resources.train.time: 12:00 is impossible; allowed: '90m'"):
        load_sweep(file)


def test_without_a_file_there_are_no_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_cluster() == Cluster()
    with pytest.raises(TsaeError, match="cannot be read"):
        load_cluster(tmp_path / "nowhere.yaml")
