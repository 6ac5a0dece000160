"""Sweeps on a real Grid Engine: what another scheduler than Slurm needs, in one folder of the package."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable

import torch

from tests.system.gridengine.conftest import GridSweep

Make = Callable[..., GridSweep]
POINTS = ("split_fraction=0.2", "split_fraction=0.4")


def test_a_sweep_runs_as_arrays_that_wait_for_each_other(sweep_of: Make) -> None:
    sweep = sweep_of()
    sweep.site(defaults={"time": "10m", "cpus": 1}, train={"tasks": 2, "gpus": 1, "mem": "3G"})
    planned = sweep.tsae("sweep", "--executor", "gridengine", "--dry-run")
    for option in (
        "-t 1-2",
        "-pe smp 2",
        "-l gpu=1",
        "-l mem_free=3072M",
        "-l h_rt=600,s_rt=480",
        "-hold_jid <00-harvest>",
        "-hold_jid_ad <01-train>",
    ):
        assert option in planned
    assert not sweep.folder.exists()
    sweep.run("qmod", "-d", "main.q")
    try:
        assert "6 stages were submitted" in sweep.tsae("sweep", "--executor", "gridengine")
        assert sweep.states()[POINTS[0]] == ["train", "queued"]
        assert "under way from before" in sweep.tsae("sweep", "--executor", "gridengine")
    finally:
        sweep.run("qmod", "-e", "main.q")
    sweep.wait_until_over()
    assert sweep.states() == {point: ["evaluate", "done"] for point in POINTS}
    assert (sweep.folder / "report" / "report.html").exists()
    assert "nothing to do" in sweep.tsae("sweep", "--executor", "gridengine")
    state = json.loads(next(sweep.folder.glob("stages/train-*/state.json")).read_text())
    assert (state["executor"], state["state"], state["restarts"]) == ("gridengine", "done", 0)
    assert sweep.states()  # from the records, when the qmaster has forgotten the jobs


def test_what_is_preempted_or_out_of_time_runs_again_and_ends_in_the_same_bits(sweep_of: Make) -> None:
    sweep = sweep_of(steps=1000, resume_every=100)
    sweep.tsae("sweep", "--executor", "gridengine")
    array = sweep.wait(
        lambda: {p.name.partition(".")[0] for p in sweep.folder.glob("attempts/*/01-train/*.order")}
    ).pop()
    runs = [sweep.weights(point).parent for point in POINTS]
    for run in runs:
        sweep.wait(lambda run=run: list(run.glob("resume/step_*")))
    assert sweep.states() == {**{point: ["train", "running"] for point in POINTS}, "report": ["report", "queued"]}
    # One task loses its place; the other gets what its script gets when its time is nearly over.
    sweep.run("qmod", "-rj", f"{array}.1")
    [script] = {int(pid) for pid in os.listdir("/proc") if pid.isdigit() and of_task(pid, array, "2")}
    os.killpg(os.getpgid(script), signal.SIGUSR1)
    sweep.wait(lambda: all(starts == 2 for starts in starts_of(sweep, array).values()))
    sweep.wait_until_over()
    assert sweep.states() == {point: ["evaluate", "done"] for point in POINTS}
    states = [json.loads(path.read_text()) for path in sweep.folder.glob("stages/train-*/state.json")]
    assert [state["restarts"] for state in states] == [1, 1]

    interrupted = {point: torch.load(sweep.weights(point), weights_only=True) for point in POINTS}
    shutil.rmtree(sweep.home / "checkpoints")
    sweep.tsae("sweep", "--executor", "debug")
    for point in POINTS:
        alone = torch.load(sweep.weights(point), weights_only=True)
        assert all(torch.equal(alone[name], tensor) for name, tensor in interrupted[point].items())


def of_task(pid: str, array: str, task: str) -> bool:
    """Whether a process is the batch script of a task."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as stream:
            variables = stream.read().split(b"\0")
        with open(f"/proc/{pid}/cmdline", "rb") as stream:
            command = stream.read()
    except OSError:
        return False
    mine = {f"JOB_ID={array}".encode(), f"SGE_TASK_ID={task}".encode()} <= set(variables)
    return mine and b"job_scripts" in command


def starts_of(sweep: GridSweep, array: str) -> dict[str, int]:
    """Task → how often its script was started."""
    paths = sweep.folder.glob(f"attempts/*/01-train/{array}.*.starts")
    return {path.name: len(path.read_text().splitlines()) for path in paths}


def test_a_failure_blocks_what_waits_for_it_and_nothing_else(sweep_of: Make) -> None:
    sweep = sweep_of(resume_every=20)
    in_the_way = sweep.weights(POINTS[0]).with_name("resume")
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("a file where the folder of the states should be")
    sweep.tsae("sweep", "--executor", "gridengine")
    sweep.wait_until_over()
    assert sweep.states()[POINTS[0]] == ["train", "failed"]
    assert sweep.states()[POINTS[1]] == ["evaluate", "done"]
    assert (sweep.folder / "report" / "report.html").exists()
    blocked = [path.read_text() for path in sweep.folder.glob("attempts/*/02-evaluate/*.log")]
    assert sum("not begun: " in text for text in blocked) == 1
    in_the_way.unlink()
    assert "3 stages were submitted" in sweep.tsae("sweep", "--executor", "gridengine", "--retry-failed")
    sweep.wait_until_over()
    assert sweep.states() == {point: ["evaluate", "done"] for point in POINTS}


def test_cancelled_jobs_are_gone_and_go_on_when_asked_again(sweep_of: Make) -> None:
    sweep = sweep_of(steps=20000, resume_every=100)
    other = subprocess.run(
        ["qsub", "-terse", "-b", "y", "-o", "/dev/null", "-j", "y", "sleep", "100"],
        env=sweep.environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    sweep.tsae("sweep", "--executor", "gridengine")
    sweep.wait(lambda: list(sweep.weights(POINTS[0]).parent.glob("resume/step_*")))
    assert "cancelled" in sweep.tsae("cancel")
    sweep.wait(lambda: sweep.run("qstat").split()[-1:] and "tsae" not in sweep.run("qstat"))
    assert other in sweep.run("qstat")
    assert sweep.states()[POINTS[0]][1] in ("interrupted", "waiting", "preempted")
    assert "to run" in sweep.tsae("sweep", "--executor", "gridengine", "--dry-run")


def test_what_grid_engine_cannot_give_is_one_line(sweep_of: Make) -> None:
    sweep = sweep_of()
    sweep.site(train={"nodes": 2})
    said = sweep.tsae("sweep", "--executor", "gridengine", code=2)
    assert "resources.nodes: 2: on Grid Engine a job of ours has one node" in said
    sweep.site(train={"partition": "nowhere.q"})
    said = sweep.tsae("sweep", "--executor", "gridengine", code=2)
    assert "nowhere.q" in said.splitlines()[-1]
    assert len([line for line in said.splitlines() if line.startswith("tsae: ")]) == 1
    assert "Traceback" not in said
    assert not list(sweep.folder.glob("attempts/[0-9]*"))
    assert not sweep.run("qstat").strip()


def test_the_commands_are_missed_in_one_line(sweep_of: Make) -> None:
    sweep = sweep_of()
    sweep.environment["PATH"] = os.path.dirname(sys.executable)
    assert "no qmaster answers" in sweep.tsae("sweep", "--executor", "gridengine", code=2)


def test_a_sweep_of_more_arrays_than_a_user_may_have_goes_in_waves(sweep_of: Make) -> None:
    """Three at a time for four: the report, and the array before it, are submitted by a job."""
    sweep = sweep_of()
    settings = sweep.run("qconf", "-sconf", "global")

    def limit(jobs: int) -> None:
        lines = [line for line in settings.splitlines() if not line.startswith(("max_u_jobs", "#"))]
        (sweep.home / "global").write_text("\n".join([*lines, f"max_u_jobs {jobs}", ""]))
        sweep.run("qconf", "-Mconf", str(sweep.home / "global"))

    limit(3)
    try:
        said = sweep.tsae("sweep", "--executor", "gridengine")
        assert "3 stages of 2 points are not submitted yet (only 3 jobs are allowed per user): job " in said
        assert "3 stages were submitted" in said
        assert "not submitted yet" in sweep.tsae("status")
        sweep.wait(lambda: (sweep.folder / "report" / "report.html").exists())
        sweep.wait_until_over()
    finally:
        limit(0)
    assert sweep.states() == {point: ["evaluate", "done"] for point in POINTS}
    assert "not submitted yet" not in sweep.tsae("status")
    labels = [json.loads(path.read_text())["label"] for path in sorted(sweep.folder.glob("attempts/*/*/call-*.json"))]
    assert sorted(labels) == sorted(set(labels))
