"""`launch/sweep.py` and `launch/status.py` with Slurm behind them."""

from __future__ import annotations

import collections
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.system.slurm.slurm_commands import CLUSTER, CommandLine
from tests.system.slurm.slurm_sweep import SweepOnSlurm
from tsae.runtime.metadata import whole as read_whole_json
from tsae.sweep.attempt import attempts, job_name
from tsae.sweep.schedulers.slurm.query import run as slurm_command


def test_a_sweep_launched_twice_at_once_runs_once_on_two_nodes_and_can_be_extended_and_cancelled(
    sweep: SweepOnSlurm, tiny: CommandLine
) -> None:
    planned = tiny.sweep("--dry-run")
    assert "#SBATCH --ntasks-per-node=2" in planned
    assert not sweep.folder.exists()

    both = [tiny.start(), tiny.start()]
    said = ["".join(process.communicate()) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    (attempt,) = attempts(sweep.folder)
    jobs = {entry.label.split()[0] for entry in attempt.jobs()}
    assert jobs == {"harvest", "train", "evaluate", "report"}
    assert len({entry.job.partition("_")[0] for entry in attempt.jobs()}) == 4
    assert tiny.counts()["train"]["done"] == "0/2"
    sweep.wait_until_over()
    assert all(set(states) == {"done"} for states in tiny.counts().values()), tiny.status()
    assert list((sweep.folder).rglob("*.html"))

    trained = [entry for entry in attempt.jobs() if entry.label.startswith("train")]
    for entry in trained:
        nodes = collections.Counter(re.findall(r"node=(\d)\(2\), global_rank=\d\(4\)", logs_of(entry.log)))
        assert nodes == {"0": 2, "1": 2}
    assert "nothing to do" in tiny.sweep()

    tiny.write([0.2, 0.4, 0.6])
    slurm_command("scontrol", "update", "partitionname=main", "state=down")
    try:
        tiny.sweep()
        new = attempts(sweep.folder)[-1].jobs()
        assert sorted(entry.label.split()[0] for entry in new) == ["evaluate", "report", "train"]
        assert tiny.counts()["train"] == {"done": "2/3", "queued": "1"}
        assert "under way from before" in tiny.sweep()
        assert len(attempts(sweep.folder)) == 2
        other = ["sbatch", "--parsable", "--partition=urgent", "--output=/dev/null", "--wrap=sleep 30"]
        mine = subprocess.run(other, capture_output=True, text=True, check=True).stdout.strip()
        assert "cancelled" in tiny.sweep("--cancel")
        assert not sweep.alive()
        state = slurm_command("squeue", "--noheader", f"--jobs={mine}", "--format=%T").strip()
        assert state in ("PENDING", "RUNNING")
        slurm_command("scancel", mine)
    finally:
        slurm_command("scontrol", "update", "partitionname=main", "state=up")


def test_what_is_chained_is_one_job_of_one_process(sweep: SweepOnSlurm, tiny: CommandLine) -> None:
    tiny.write([0.2, 0.4], resources={"chain": True})
    assert "--ntasks-per-node=2" not in tiny.sweep("--dry-run")  # which the cluster's file asks for
    tiny.sweep()
    (attempt,) = attempts(sweep.folder)
    jobs = {kind: [] for kind in ("harvest", "train", "evaluate", "report")}
    for entry in attempt.jobs():
        jobs[entry.label.split()[0]].append(entry.job)
    assert jobs["train"] == jobs["evaluate"]
    assert len(set(jobs["train"])) == 2
    assert len(jobs["harvest"]) == len(jobs["report"]) == 1
    sweep.wait_until_over()
    assert all(set(states) == {"done"} for states in tiny.counts().values()), tiny.status()
    assert tiny.counts()["evaluate"]["done"] == "2/2"
    assert "nothing to do" in tiny.sweep()


def logs_of(first: str) -> str:
    """The logs of all processes of a job, of whose first one is the log given."""
    path = Path(first)
    others = path.parent.glob(path.name.replace("_0_log", "_[0-9]_log"))
    return "".join(other.read_text() for other in others)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"partition": "nowhere"}, "nvalid partition"),
        ({"time": "12:00"}, "time: 12:00 is impossible; allowed: '90m'"),
        ({"qos": "nowhere"}, "nvalid qos"),
    ],
)
def test_what_cannot_run_is_one_line_and_leaves_nothing(
    sweep: SweepOnSlurm, tiny: CommandLine, change: dict[str, Any], words: str
) -> None:
    cluster = {**CLUSTER, "evaluate": change}
    (tiny.home / "cluster.yaml").write_text(yaml.safe_dump(cluster))
    said = tiny.sweep(code=2)
    assert re.search(words, said)
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert not sweep.alive()
    assert attempts(sweep.folder) == []


def test_a_sweep_larger_than_the_submit_limit_goes_in_waves_that_nobody_watches(
    sweep: SweepOnSlurm, tiny: CommandLine
) -> None:
    """Six jobs at a time for twelve stages: two points each, and a job that submits the next."""
    fractions = [0.2, 0.3, 0.4, 0.5, 0.6]
    tiny.write(fractions)
    (tiny.home / "cluster.yaml").write_text(yaml.safe_dump({"defaults": {**CLUSTER["defaults"], "qos": "narrow"}}))
    slurm_command("scontrol", "update", "partitionname=main", "state=down")  # the first wave waits to be looked at
    try:
        said = tiny.sweep()
        (first,) = attempts(sweep.folder)
        *_, last = first.jobs()
        assert last.label == "submit the rest of tiny-base"
        assert len(first.jobs()) == 6
        told = f"7 stages of 3 points are not submitted yet (QOSMaxSubmitJobPerUserLimit): job {last.job} submits them"
        assert told in said
        assert "5 stages were submitted" in said
        assert told in tiny.status()
        assert tiny.counts()["train"] == {"done": "0/5", "queued": "2", "waiting": "3"}

        again = tiny.sweep()
        assert "5 are under way from before" in again
        assert told in again
        assert attempts(sweep.folder) == [first]
    finally:
        slurm_command("scontrol", "update", "partitionname=main", "state=up")

    sweep.wait_until_over()
    assert all(set(states) == {"done"} for states in tiny.counts().values()), tiny.status()
    assert "not submitted" not in tiny.status()
    every = [entry.stage for attempt in attempts(sweep.folder) for entry in attempt.jobs()]
    assert len(set(every)) == 13  # with the one that submits
    assert len(every) == 12 + len(attempts(sweep.folder)) - 1  # nothing twice
    commits = {read_whole_json(attempt.folder / "provenance.json")["commit"] for attempt in attempts(sweep.folder)}
    assert len(commits) == 1
    assert list(sweep.folder.rglob("*.html"))
    scripts = {path.parent for path in sweep.folder.glob("attempts/*/*/*_submission.sh")}
    assert scripts == {Path(entry.log).parent for attempt in attempts(sweep.folder) for entry in attempt.jobs()}


def test_where_one_job_is_all_that_is_allowed_the_same_command_submits_the_next(
    sweep: SweepOnSlurm, tiny: CommandLine
) -> None:
    (tiny.home / "cluster.yaml").write_text(yaml.safe_dump({"defaults": {**CLUSTER["defaults"], "qos": "tight"}}))
    said = tiny.sweep()
    assert "5 stages of 2 points are not submitted yet (QOSMaxSubmitJobPerUserLimit): the same command submits" in said
    sweep.wait_until_over()
    assert "4 stages of 2 points are not submitted yet" in tiny.sweep()
    other = ["sbatch", "--parsable", "--qos=tight", "--output=/dev/null", "--wrap=true"]
    sweep.wait_until_over()
    slurm_command("scontrol", "update", "partitionname=main", "state=down")
    try:
        taken = subprocess.run(other, capture_output=True, text=True, check=True).stdout.strip()
        said = tiny.sweep(code=2)
        assert "QOSMaxSubmitJobPerUserLimit" in said
        assert "nothing was submitted" in said
        slurm_command("scancel", taken)
    finally:
        slurm_command("scontrol", "update", "partitionname=main", "state=up")
    assert tiny.counts()["train"] == {"done": "1/2", "waiting": "1"}


@pytest.fixture
def full_disk(tiny: CommandLine) -> Iterator[Path]:
    """A TSAE_HOME with room for next to nothing."""
    home = tiny.home / "full"
    home.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(home)], check=True)
    yield home
    subprocess.run(["umount", str(home)], check=True)


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tiny: CommandLine, full_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TSAE_HOME", str(full_disk))
    said = tiny.sweep(code=2)
    assert "No space left on device" in said
    assert said.count("\n") == 1
    assert not list(full_disk.rglob("attempts/*"))
    assert not slurm_command("squeue", "--noheader", f"--name={job_name(full_disk / 'sweeps' / 'tiny-base')}")


@pytest.fixture
def deadly(tiny: CommandLine, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function that launches the sweep with an sbatch that does as it is told; `die` kills the launcher."""

    def launch(script: str) -> None:
        program = tiny.home / "bin" / "sbatch"
        program.parent.mkdir()
        program.write_text(f"""\
#!/bin/sh
submit() {{ PATH="${{PATH#*:}}" sbatch "$@"; }}
die() {{ kill -9 $PPID; }}
{script}
""")
        program.chmod(0o755)
        with monkeypatch.context() as path:
            path.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
            tiny.sweep(code=-signal.SIGKILL)

    return launch


@pytest.mark.parametrize(("second", "left"), [("die", 1), ('submit "$@"; die', 3)])
def test_what_a_killed_launcher_has_half_submitted_is_taken_back_by_the_next(
    sweep: SweepOnSlurm, tiny: CommandLine, deadly: Callable[[str], None], second: str, left: int
) -> None:
    """The first array is held, and waits for ever; the second one is not there, or nobody has noted it."""
    deadly(f'case "$*" in *01-train*) {second};; *) submit "$@";; esac')
    assert len(sweep.alive()) == left
    assert "under way" not in tiny.sweep()
    jobs = sweep.queue()
    assert len(sweep.alive()) == 6
    assert "JobHeldUser" not in {jobs[job][1] for job in sweep.alive()}


def test_cancelling_ends_what_a_killed_launcher_did_not_note(
    sweep: SweepOnSlurm, tiny: CommandLine, deadly: Callable[[str], None]
) -> None:
    deadly('submit "$@"; die')
    assert len(sweep.alive()) == 1
    assert "cancelled 1 Slurm job" in tiny.sweep("--cancel")
    assert not sweep.alive()
