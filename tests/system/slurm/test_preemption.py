"""Jobs whose place or node is taken are queued again by themselves and end as if nothing had happened."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.slurm.slurm_sweep import SweepOnSlurm, tiny_run
from tsae.checkpoint import RunFolder
from tsae.config import run as configuration
from tsae.stages import harvest_stage
from tsae.store.layout import StoreLayout
from tsae.store.window import held
from tsae.sweep.schedulers.slurm.query import run


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """A run on a world that is harvested; no state is saved but the one of a training that leaves."""
    tree = tiny_run(tmp_path / "store", steps=200, resume_every=0)
    harvest_stage(configuration.from_mapping(tree, "test"))
    return tree


def urgent(node: str) -> None:
    """Take all GPUs of `node` away for a moment."""
    command = ["sbatch", "--partition=urgent", f"--nodelist={node}", "--gpus-per-node=4", "--output=/dev/null"]
    subprocess.run([*command, "--wrap=sleep 1"], check=True, capture_output=True)


def test_a_preempted_training_ends_with_the_bits_of_one_that_was_left_alone(
    sweep: SweepOnSlurm, config: dict[str, Any]
) -> None:
    """At once in `main`; with 20 seconds' notice in `grace`, where two processes train together."""
    checkpoints = sweep.home / "checkpoints"
    alone = {"cpus": 1, "mem": "2G", "partition": "main"}
    shapes: dict[str, dict[str, Any]] = {
        "main": {**alone, "gpus": 4, "tasks": 1, "extra": {"nodelist": "n1"}},
        "grace": {**alone, "gpus": 4, "tasks": 2, "extra": {"nodelist": "n2"}, "partition": "grace"},
        "undisturbed main": alone,
        "undisturbed grace": {**alone, "tasks": 2},
    }
    stages = []
    for name, asked in shapes.items():
        arguments = [str(checkpoints), name]
        function = "tsae.stages:train_stage"
        if not name.startswith("undisturbed"):
            function, arguments = (
                "tests.system.slurm.errands:train",
                [*arguments, str(sweep.home / f"{name} is under way")],
            )
        stages.append(sweep.stage(name, function, *arguments, config=name, **asked))
    for name in ("main", "grace"):
        note = str(sweep.home / f"{name} is evaluated")
        stages.append(sweep.stage(f"e {name}", "tests.system.slurm.errands:note", note, kind="evaluate", after=(name,)))
    submission = sweep.submission(configs=dict.fromkeys(shapes, config))
    jobs = {entry.stage: entry for entry in submission.submit(stages)}
    for name, node in (("main", "n1"), ("grace", "n2")):
        sweep.wait((sweep.home / f"{name} is under way").exists)
        urgent(node)
    sweep.wait_until_over()
    for name in ("main", "grace"):
        assert (sweep.state(name)["state"], sweep.state(name)["restarts"]) == ("done", 1)
        undisturbed = RunFolder.of(checkpoints, f"undisturbed {name}")
        assert RunFolder.of(checkpoints, name).weights.read_bytes() == undisturbed.weights.read_bytes()
        assert (sweep.home / f"{name} is evaluated").exists()  # what waited for it was not given up
        assert "state saved before step 101" in Path(jobs[name].log).read_text()
    assert "step ended with code 75" in Path(jobs["grace"].log).read_text()


def test_a_preempted_training_on_a_window_harvests_on_and_ends_with_the_same_bits(
    sweep: SweepOnSlurm, tmp_path: Path
) -> None:
    """Of five shards the window holds two: the world, which stands for a language model, is asked again and again."""
    tree = tiny_run(tmp_path / "rolling", steps=200, resume_every=0, pool_sequences=128)
    tree["store"]["window"] = "600kB"
    harvest_stage(configuration.from_mapping(tree, "test"))
    layout, checkpoints = StoreLayout(tmp_path / "rolling"), str(sweep.home / "checkpoints")
    under_way = sweep.home / "under way"
    alone = {"cpus": 1, "mem": "2G", "partition": "main"}
    stages = [
        sweep.stage(
            "w", "tests.system.slurm.errands:train", checkpoints, "w", str(under_way), config="w",
            **{**alone, "gpus": 4, "tasks": 1, "extra": {"nodelist": "n1"}},
        ),
        sweep.stage("undisturbed", "tsae.stages:train_stage", checkpoints, "undisturbed", config="w", after=("w",), **alone),
    ]  # fmt: skip
    jobs = {entry.stage: entry for entry in sweep.submission(configs={"w": tree}).submit(stages)}
    sweep.wait(under_way.exists)
    urgent("n1")
    sweep.wait_until_over()
    assert (sweep.state("w")["state"], sweep.state("w")["restarts"]) == ("done", 1)
    both = [RunFolder.of(checkpoints, name).weights.read_bytes() for name in ("w", "undisturbed")]
    assert both[0] == both[1]
    assert layout.kept.start == 5
    assert len(held(layout)) <= 2
    log = Path(jobs["w"].log).read_text()
    assert "state saved before step 101" in log
    assert "training waited" in log


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
    sweep.submit(sweep.stage("s", "tests.system.slurm.errands:count_up", str(counter), 40))
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
    jobs = sweep.submit(
        *[sweep.stage(name, "tests.system.slurm.errands:count_up", str(sweep.home / name), 50) for name in names]
    )
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
    (job,) = submission.submit([sweep.stage("s", "tests.system.slurm.errands:note", str(sweep.home / "s"))])
    sweep.wait(lambda: sweep.queue()[job.job][0] == "RUNNING")
    time.sleep(1)
    run("scancel", "--signal=USR2", job.job)
    sweep.wait_until_over()
    assert (sweep.state("s")["state"], sweep.state("s")["restarts"]) == ("done", 1)


def test_a_failure_of_one_process_is_no_preemption_of_the_others(sweep: SweepOnSlurm) -> None:
    """Slurm asks the others to leave; the job is not queued again for that."""
    counter = sweep.home / "counter"
    jobs = sweep.submit(sweep.stage("s", "tests.system.slurm.errands:fail_in_one", str(counter), tasks=2))
    sweep.wait_until_over()
    assert sweep.queue()[jobs["s"].job][0] == "FAILED"
    assert (sweep.state("s")["state"], sweep.state("s")["error"]) == ("failed", "ValueError: no luck in one")
    assert sweep.state("s")["restarts"] == 0
    assert "step ended with code 200" in Path(jobs["s"].log).read_text()
