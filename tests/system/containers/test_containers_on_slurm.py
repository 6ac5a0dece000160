"""`launch/sweep.py --container tsae.sif` on a real Slurm."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.system.containers.container_lab import PATIENCE_SECONDS, REPOSITORY, Lab, run

SLURM_LAB = REPOSITORY / "tests" / "system" / "slurm" / "lab"
SLURM_CONF = Path(os.environ.get("LAB", "/run/tsae-slurm")) / "etc" / "slurm.conf"
BASE = {
    "data": {"source": "synthetic", "context_length": 32, "holdout": 0.1, "skip_positions": 0},
    "synthetic": {"sequences": 900, "activation_dim": 16, "n_slow": 6, "k_slow": 1, "n_fast": 10, "k_fast": 2},
    "store": {"dtype": "float32"},
    "sae": {"dict_size": 20, "k": 3, "split_fraction": 0.3},
    "training": {"steps": 600, "batch_size": 128, "device": "cpu", "resume_every": 0, "log_every": 1},
    "evaluation": {"sequences": 64},
}
# In `grace` a job is told 20 seconds before its place is taken.
CLUSTER = {
    "defaults": {"partition": "grace", "time": "20m", "cpus": 1, "mem": "2G", "gpus": 0},
    "train": {"nodes": 2, "tasks": 2, "gpus": 4},
}


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch, sif_build: str) -> Iterator[None]:
    """Two nodes; ended again unless they were there before."""
    del sif_build
    monkeypatch.setenv("SLURM_CONF", str(SLURM_CONF))
    ran = shutil.which("scontrol") is not None and subprocess.run(["scontrol", "ping"], check=False).returncode == 0
    run([str(SLURM_LAB), "start"])
    yield
    if not ran:
        run([str(SLURM_LAB), "stop"])


def test_a_sweep_in_the_image_is_preempted_on_two_nodes_and_ends_all_the_same(
    lab: Lab, slurm: None, tmp_path: Path
) -> None:
    del slurm
    home = tmp_path / "home,with=commas"
    sweep = write_sweep(tmp_path)
    launch = [sys.executable, str(REPOSITORY / "launch" / "sweep.py"), str(sweep), "--executor", "slurm"]
    cluster = ["--cluster", str(tmp_path / "cluster.yaml"), "--container", str(lab.sif)]
    run([*launch, *cluster], tmp_path, {"TSAE_HOME": str(home)})
    wait_for(home, lambda: any(lines(path) > 20 for path in home.rglob("metrics.jsonl")))
    urgent = [
        "sbatch",
        "--partition=urgent",
        "--nodelist=n1",
        "--gpus-per-node=4",
        "--output=/dev/null",
        "--wrap=sleep 1",
    ]
    run(urgent)
    wait_for(home, lambda: list(home.rglob("eval_results.json")))
    wait_for(home, lambda: not jobs())
    (train,) = [state for state in states(home) if state["stage"].startswith("train")]
    assert (train["state"], train["restarts"]) == ("done", 1)
    said = Path(train["log"]).read_text()
    assert "state saved before step" in said
    assert "global_rank=0(4)" in said
    assert {state["state"] for state in states(home)} == {"done"}
    provenance = json.loads(next(home.rglob("trainer_0/provenance.json")).read_text())
    assert provenance["command"][0].startswith("/opt/venv/"), "the training did not run in the image"


def write_sweep(folder: Path) -> Path:
    """A sweep of one point, with its base and cluster.yaml beside it."""
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    (folder / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER))
    sweep = folder / "tiny.yaml"
    sweep.write_text(yaml.safe_dump({"base": str(folder / "base.yaml"), "grid": {"sae.split_fraction": [0.3]}}))
    return sweep


def wait_for(home: Path, condition: Callable[[], object]) -> None:
    """Return when `condition` holds; it must while jobs are there."""
    until = time.monotonic() + PATIENCE_SECONDS / 6
    while not condition():
        in_vain = time.monotonic() > until or (not jobs() and not condition())
        assert not in_vain, "".join(f"\n== {path}\n{path.read_text()[-3000:]}" for path in home.rglob("*.out"))
        time.sleep(0.3)


def jobs() -> list[str]:
    return run(["squeue", "--noheader", "--format=%i %T"]).stdout.splitlines()


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def states(home: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in home.rglob("state.json")]
