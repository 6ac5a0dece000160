"""`tsae bench --sweep`: a real sweep on this machine; of a GPU only what nvidia-smi would print is made up."""

from __future__ import annotations

import json
import stat
import time
from pathlib import Path

import pytest

from tsae.bench import busy
from tsae.cli import main
from tsae.runtime.state import Record, State

SWEEP = """
base: synthetic
grid: {sae.k: [5]}
stages: [harvest, train, evaluate]
overrides:
  synthetic.sequences: 300
  training.steps: 40
  training.warmup_steps: 5
  training.threshold_start_step: 20
  training.batch_size: 64
  evaluation.sequences: 20
"""
NVIDIA_SMI = """#!/bin/sh
case "$*" in *utilization.gpu*) while :; do echo '0, 40, A card'; echo '1, 80, A card'; echo '2, [N/A], A part'; sleep 0.1; done;; esac
echo "No devices were found"
exit 9
"""


def test_the_first_step_is_that_of_the_stage_s_own_point() -> None:
    began = {"k=5": 10.0, "k=50": 15.0}
    for label, start, expected in (
        ("train k=5 and 2 more", 0.0, 10.0),
        ("train k=50", 5.0, 10.0),
        ("train k=5, then evaluate, probe", 4.0, 6.0),
        ("evaluate k=5", 11.0, None),
    ):
        record = Record(State.DONE, stage=label, started=100 + start, ended=120.0)
        assert busy._stage(record, [], 100.0, began)["first_step_after"] == expected


def test_without_a_driver_there_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "nvidia-smi"
    told.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed because it could not talk to the driver.'\nexec sleep 60\n")
    told.chmod(told.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with busy._gpus() as found:
        time.sleep(0.5)
        assert found == ({}, {})


def test_a_sweep_is_watched_from_nothing_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.yaml").write_text(SWEEP)
    told = tmp_path / "bin/nvidia-smi"
    told.parent.mkdir()
    told.write_text(NVIDIA_SMI)
    told.chmod(told.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(told.parent), prepend=":")
    out = tmp_path / "out"
    assert main(["bench", "--sweep", f"'{tmp_path / 'tiny.yaml'}' sae.dict_size=64", "--out", str(out)]) == 0
    found = json.loads((out / "sweep-tiny-sae.dict_size=64.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == [
        f"sweep-tiny-sae.dict_size=64.{kind}" for kind in ("json", "png")
    ]
    assert found["gpus"] == {"0": "A card", "1": "A card"}
    harvest, train, evaluate = found["stages"]
    assert [stage["stage"].split()[0] for stage in (harvest, train, evaluate)] == ["harvest", "train", "evaluate"]
    assert 0 < harvest["start"] < harvest["end"] <= train["start"] < train["end"] <= evaluate["start"]
    assert evaluate["end"] < found["seconds"]
    assert 0 < train["first_step_after"] < train["end"] - train["start"] + 1
    assert train["stage"] == "train k=5"
    assert harvest["first_step_after"] is evaluate["first_step_after"] is None
    for stage in found["stages"]:
        assert stage["cores"] > 0
        assert stage["gpus"] == pytest.approx(0.6)
    assert max(sample["cores"] for sample in found["samples"]) > 0.05
    assert "GPUs busy" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("", "name a sweep"),
        ("  ", "name a sweep"),
        ("'one", "cannot be read"),
        ("split_fractoin", "'split_fraction'"),
        ("split_fraction --dry-run", "--dry-run: beside the sweep"),
        ("split_fraction --base", "--base"),
    ],
)
def test_what_is_no_sweep_is_refused(given: str, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--sweep", given, "--out", str(tmp_path / "out")]) == 2
    complaint = capfd.readouterr().err
    assert said in complaint
    assert "Traceback" not in complaint
    assert not list(tmp_path.glob("out/*"))
