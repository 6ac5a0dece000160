"""Jobs whose place or node is taken are queued again by themselves and end as if nothing had happened."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm_query import run
from slurm_sweep import SweepOnSlurm

from tsae import config as configuration
from tsae.checkpoint import RunFolder
from tsae.stages import harvest_stage, train_stage

TINY: dict[str, Any] = {
    "data": {"source": "synthetic", "context_length": 32, "holdout": 0.1, "skip_positions": 0},
    "synthetic": {"sequences": 900, "activation_dim": 16, "n_slow": 6, "k_slow": 1, "n_fast": 10, "k_fast": 2},
    "sae": {"dict_size": 20, "k": 3, "split_fraction": 0.3},
    "training": {"steps": 2500, "batch_size": 128, "threshold_beta": 0.9, "resume_every": 0, "device": "cpu"},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run on a world that is harvested."""
    tree = {**TINY, "store": {"path": str(tmp_path_factory.mktemp("world") / "store"), "dtype": "float32"}}
    harvest_stage(configuration.from_mapping(tree, "test"))
    return tree


def urgent(node: str, seconds: float) -> None:
    """Take all GPUs of `node` away for a while."""
    command = ["sbatch", "--partition=urgent", f"--nodelist={node}", "--gpus-per-node=4", "--output=/dev/null"]
    subprocess.run([*command, f"--wrap=sleep {seconds}"], check=True, capture_output=True)


def train(sweep: SweepOnSlurm, name: str, **resources: Any) -> Any:
    folder = str(sweep.home / "checkpoints")
    asked = {"gpus": 4, "tasks": 1, "cpus": 1, "mem": "2G", **resources}
    return sweep.stage(name, "tsae.stages:train_stage", folder, name, config=name, **asked)


def weights(sweep: SweepOnSlurm, name: str) -> bytes:
    return RunFolder.of(sweep.home / "checkpoints", name).weights.read_bytes()


@pytest.fixture
def trained_steps(sweep: SweepOnSlurm) -> Any:
    """Steps that a training has said it has done."""

    def steps(name: str) -> int:
        path = RunFolder.of(sweep.home / "checkpoints", name).progress
        return int(json.loads(path.read_text())["done"]) if path.exists() else 0

    return steps


def test_a_preempted_training_ends_with_the_bits_of_one_that_was_left_alone(
    sweep: SweepOnSlurm, config: dict[str, Any], trained_steps: Any
) -> None:
    """At once in `main`, with 20 seconds' notice in `grace`, where two processes train together."""
    places = {"main": ("n1", {}), "grace": ("n2", {"tasks": 2})}
    stages = [
        train(sweep, name, partition=name, extra={"nodelist": node}, **more) for name, (node, more) in places.items()
    ]
    later = [
        sweep.stage(f"e {name}", "errands:note", str(sweep.home / name), kind="evaluate", after=(name,))
        for name in places
    ]
    submission = sweep.submission(configs=dict.fromkeys(places, config))
    jobs = {entry.stage: entry for entry in submission.submit([*stages, *later])}
    for name, (node, _) in places.items():
        sweep.wait(lambda name=name: trained_steps(name) > 100)
        urgent(node, 1)
    whole = {**config, "training": {**config["training"], "resume_every": 200}}
    train_stage(configuration.from_mapping(whole, "test"), sweep.home / "checkpoints", "whole")
    sweep.wait_until_over()
    for name in places:
        assert (sweep.state(name)["state"], sweep.state(name)["restarts"]) == ("done", 1)
        assert weights(sweep, name) == weights(sweep, "whole")
        assert (sweep.home / name).exists()  # what waited for it was not given up
        log = Path(jobs[name].log).read_text()
        assert log.count("Starting with") == 2
    assert "step ended with code 75" in Path(jobs["grace"].log).read_text()


@pytest.fixture
def nodes() -> Iterator[Callable[..., None]]:
    """A function that changes a node's state; both are well afterwards."""

    def change(node: str, state: str) -> None:
        command = ["scontrol", "update", f"nodename={node}", f"state={state}", "reason=test"]
        subprocess.run(command, check=False, capture_output=True)

    yield change
    for node in ("n1", "n2"):
        change(node, "resume")


def test_a_job_whose_node_is_lost_runs_on_another(sweep: SweepOnSlurm, nodes: Callable[..., None]) -> None:
    counter = sweep.home / "counter"
    nodes("n1", "drain")
    sweep.submit(sweep.stage("s", "errands:count_up", str(counter), 40))
    sweep.wait(lambda: sweep.state("s").get("host") == "n2")
    nodes("n1", "resume")
    nodes("n2", "down")
    sweep.wait_until_over()
    state = sweep.state("s")
    assert (state["state"], state["restarts"], state["host"]) == ("done", 1, "n1")
    assert json.loads(counter.read_text())["counted"] == 40


def test_one_job_of_an_array_is_queued_again_alone(sweep: SweepOnSlurm) -> None:
    """The last one, whose id is also that of the whole array; it is told to leave before it can listen, too."""
    names = ("first", "last")
    jobs = sweep.submit(*[sweep.stage(name, "errands:count_up", str(sweep.home / name), 50) for name in names])
    sweep.wait(lambda: all(sweep.state(name) for name in names))
    run("scancel", "--signal=USR2", jobs["last"].job)
    sweep.wait(lambda: sweep.state("last")["state"] == "preempted")
    sweep.wait_until_over()
    assert [sweep.state(name)["restarts"] for name in names] == [0, 1]
    assert [json.loads((sweep.home / name).read_text())["counted"] for name in names] == [50, 50]


def test_a_job_that_is_asked_to_leave_before_it_listens_is_queued_again(sweep: SweepOnSlurm) -> None:
    slow_start = sweep.home / "sitecustomize"
    slow_start.mkdir()
    (slow_start / "sitecustomize.py").write_text("import time; time.sleep(2)")
    submission = sweep.submission()
    path = f"{slow_start}:{submission.cluster.environment['PYTHONPATH']}"
    submission.cluster.environment["PYTHONPATH"] = path
    (job,) = submission.submit([sweep.stage("s", "errands:note", str(sweep.home / "s"))])
    sweep.wait(lambda: sweep.queue()[job.job].state == "RUNNING")
    time.sleep(1)
    run("scancel", "--signal=USR2", job.job)
    sweep.wait_until_over()
    assert (sweep.state("s")["state"], sweep.state("s")["restarts"]) == ("done", 1)
