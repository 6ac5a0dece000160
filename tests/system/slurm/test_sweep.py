"""`launch/sweep.py` and `launch/status.py` with Slurm behind them."""

from __future__ import annotations

import collections
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from attempt import attempts
from slurm_query import run as slurm_command
from slurm_sweep import LAUNCH, SweepOnSlurm, tiny_run

CLUSTER = {
    "defaults": {"partition": "main", "time": "10m", "cpus": 1, "mem": "2G"},
    "train": {"nodes": 2, "tasks": 2},
}


class CommandLine:
    """A sweep over two points, each trained by two processes on each of two nodes, and the commands for it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.file = home / "tiny.yaml"
        (home / "base.yaml").write_text(yaml.safe_dump(tiny_run(home / "store")))
        (home / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER))
        self.write([0.2, 0.4])

    def write(self, fractions: list[float]) -> None:
        """Write the sweep."""
        grid = {"sae.split_fraction": fractions}
        self.file.write_text(yaml.safe_dump({"base": str(self.home / "base.yaml"), "grid": grid}))

    def start(self, *words: str) -> subprocess.Popen[str]:
        """`sweep.py`, while other things happen."""
        command = [
            sys.executable,
            str(LAUNCH / "sweep.py"),
            str(self.file),
            "--cluster",
            str(self.home / "cluster.yaml"),
        ]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([*command, *words], cwd=self.home, text=True, **pipes)  # type: ignore[call-overload]

    def sweep(self, *words: str, code: int = 0) -> str:
        """What `sweep.py` says, all of it; it must end with `code`."""
        process = self.start(*words)
        said = "".join(process.communicate())
        assert process.returncode == code, said
        return said

    def status(self) -> str:
        """What `status.py` says."""
        command = [sys.executable, str(LAUNCH / "status.py"), str(self.file)]
        return subprocess.run(command, cwd=self.home, text=True, capture_output=True, check=True).stdout

    def counts(self) -> dict[str, dict[str, str]]:
        """Kind of stage → state → how many, as `status.py` shows it."""
        lines = self.status().splitlines()
        first = next(number for number, line in enumerate(lines) if line.startswith("stage"))
        columns = re.split(r"\s{2,}", lines[first].strip())
        found = {}
        for line in lines[first + 1 : lines.index("", first)]:
            # A number stands under the end of its column's name.
            ends = {match.end(): match.group() for match in re.finditer(r"\S+", line)}
            kind, *_ = line.split()
            found[kind] = {
                name: ends[lines[first].index(f" {name}") + 1 + len(name)]
                for name in columns[1:]
                if lines[first].index(f" {name}") + 1 + len(name) in ends
            }
        return found


@pytest.fixture
def tiny(sweep: SweepOnSlurm) -> CommandLine:
    sweep.folder = sweep.home / "sweeps" / "tiny-base"
    return CommandLine(sweep.home)


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
        assert slurm_command("squeue", "--noheader", f"--jobs={mine}", "--format=%T").strip() == "RUNNING"
        slurm_command("scancel", mine)
    finally:
        slurm_command("scontrol", "update", "partitionname=main", "state=up")


def logs_of(first: str) -> str:
    """The logs of all processes of a job, of whose first one is the log given."""
    path = Path(first)
    others = path.parent.glob(path.name.replace("_0_log", "_[0-9]_log"))
    return "".join(other.read_text() for other in others)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"partition": "nowhere"}, "nvalid partition"),
        ({"time": "12:00"}, "'12:00' is no time limit"),
    ],
)
def test_what_cannot_run_is_one_line_and_leaves_nothing(
    sweep: SweepOnSlurm, tiny: CommandLine, change: dict[str, Any], words: str
) -> None:
    cluster = {**CLUSTER, "evaluate": change}
    (tiny.home / "cluster.yaml").write_text(yaml.safe_dump(cluster))
    said = tiny.sweep(code=2)
    assert words in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert not sweep.alive()
    assert attempts(sweep.folder) == []


def test_a_job_that_dies_without_a_word_is_failed_without_accounting_and_when_ids_are_used_again(
    sweep: SweepOnSlurm, tiny: CommandLine, slurm: Any
) -> None:
    """The controller's word is all there is; later it has forgotten the jobs, and others have their ids."""
    slurm("accounting", "off")
    tiny.sweep()
    record = next(iter(attempts(sweep.folder))).jobs()[0]
    sweep.wait(lambda: any(tiny.home.rglob("state.json")))
    (state,) = tiny.home.rglob("state.json")
    os.kill(json.loads(state.read_text())["pid"], signal.SIGKILL)
    sweep.wait_until_over()
    shown = tiny.status()
    assert tiny.counts()["harvest"] == {"done": "0/1", "failed": "1"}, shown
    assert tiny.counts()["train"] == {"done": "0/2", "blocked": "2"}, shown
    assert record.log.removeprefix(f"{sweep.folder}/") in shown

    said = tiny.sweep(code=1)
    assert "--retry-failed" in said
    assert len(attempts(sweep.folder)) == 1
    slurm("accounting", "on")
    for _ in range(8):
        slurm_command("sbatch", "--job-name=another", "--output=/dev/null", "--wrap=sleep 20")
    assert {key: set(found) for key, found in tiny.counts().items() if key in ("harvest", "train")} == {
        "harvest": {"done", "failed"},
        "train": {"done", "blocked"},
    }
    slurm_command("scancel", "--name=another")
    tiny.sweep("--retry-failed")
    assert tiny.counts()["harvest"].keys() & {"queued", "running"}
    tiny.sweep("--cancel")
