"""Several processes that work together: to the same results, and to a common end when one of them dies or must leave."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.system.dying import while_another_dies, with_old_files
from tsae.checkpoint import RunFolder
from tsae.config import run as configuration
from tsae.config import schema
from tsae.config.run import RunConfig
from tsae.evaluation.driver import evaluate
from tsae.parallel import liveness
from tsae.runtime import preemption
from tsae.store.layout import StoreLayout
from tsae.sweep.schedulers.slurm.job import adopt_step, first_host
from tsae.training.run import train

UPDATE = "tsae.training.trainer:Trainer._track_thresholds"
WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
Ranks = Callable[..., list[int]]


def contents(run: RunFolder) -> dict[str, bytes]:
    files = [run.weights, run.metrics, *sorted(run.checkpoint(0).parent.iterdir())]
    return {path.name: path.read_bytes() for path in files}


def furthest(found: RunFolder, expected: RunFolder) -> float:
    """Largest distance of a final tensor, relative to its norm."""
    states = [torch.load(run.weights, weights_only=True) for run in (found, expected)]
    return max(float((states[0][name] - states[1][name]).norm() / states[1][name].norm()) for name in WEIGHTS)


@pytest.fixture
def training(config_file: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Arguments that train run `name`."""

    def arguments(name: str, *settings: str) -> list[str]:
        return ["train", str(config_file), *settings, "--checkpoints-path", str(tmp_path), "--run-name", name]

    return arguments


@pytest.fixture(scope="module")
def alone(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The run of one process."""
    run = RunFolder.of(tmp_path_factory.mktemp("alone"), "alone")
    train(config, run)
    return run


def test_a_killed_process_takes_the_others_down_with_one_line(
    run_ranks: Ranks, training: Callable[..., list[str]], tmp_path: Path
) -> None:
    assert run_ranks(2, training("run"), kill=(1, "in a step", 20)) == [2, -9]
    (line,) = [line for line in (tmp_path / "rank0.err").read_text().splitlines() if line.startswith("tsae:")]
    assert "process 0 of 2: ends, because another one has ended or cannot be reached" in line
    assert "Traceback" not in (tmp_path / "rank0.err").read_text()
    assert not (tmp_path / "run" / "trainer_0" / "ae.pt").exists()
    undisturbed, run = RunFolder.of(tmp_path, "undisturbed"), RunFolder.of(tmp_path, "run")
    assert run_ranks(2, training("undisturbed")) == [0, 0]
    wanted, random_moments = contents(undisturbed), random.Random(0)
    for moment in ("before a rename", "in a write", "after a rename"):
        codes = run_ranks(2, training("run"), kill=(0, moment, random_moments.randint(2, 7)))
        assert codes == [-9, 2]
    assert run_ranks(2, training("run")) == [0, 0]
    assert contents(run) == wanted


def test_a_process_that_works_alone_ends_when_another_dies(run_ranks: Ranks, tmp_path: Path) -> None:
    assert run_ranks(2, [], target=while_another_dies) == [liveness.LOST, -9]
    assert "tsae: process 0 of 2: ends, because another one" in (tmp_path / "rank0.err").read_text()


def test_torchrun_starts_all_processes_again_when_one_is_killed(
    training: Callable[..., list[str]], tmp_path: Path
) -> None:
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    command = [sys.executable, "-m", *launcher, str(Path(__file__).with_name("dying.py")), "1", *training("run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "failed (exitcode: -9)" in done.stderr
    assert RunFolder.of(tmp_path, "run").weights.exists()


def test_a_signal_to_one_process_lets_all_leave_together_and_the_same_command_continues(
    run_ranks: Ranks, training: Callable[..., list[str]], tmp_path: Path
) -> None:
    assert run_ranks(2, training("left"), preempt=(1, UPDATE, 17)) == [preemption.REQUEUE] * 2
    left, whole = (RunFolder.of(tmp_path, name) for name in ("left", "whole"))
    assert (left.resume / "latest").read_text() == "step_18"
    state = torch.load(left.resume / "step_18" / "state.pt", weights_only=True)
    assert len(state["random"]) == 2
    assert run_ranks(2, training("left")) == [0, 0]
    assert run_ranks(2, training("whole")) == [0, 0]
    assert contents(left) == contents(whole)


def test_a_signal_to_one_process_that_reads_its_first_pool_lets_all_leave_before_the_first_step(
    run_ranks: Ranks, training: Callable[..., list[str]], tmp_path: Path
) -> None:
    at = "tsae.store.reader:Store.read_chunks"
    assert run_ranks(2, training("run"), preempt=(1, at, 1)) == [preemption.REQUEUE] * 2
    assert not RunFolder.of(tmp_path, "run").resume.exists()


def test_processes_that_would_continue_at_different_steps_are_refused(
    run_ranks: Ranks, training: Callable[..., list[str]], tmp_path: Path
) -> None:
    assert run_ranks(2, training("run"), preempt=(1, UPDATE, 17)) == [preemption.REQUEUE] * 2
    assert run_ranks(2, training("run"), target=with_old_files) == [2, 2]
    assert (
        "process 1 has another step to continue at (0) than the first one (18)" in (tmp_path / "rank0.err").read_text()
    )
    assert not RunFolder.of(tmp_path, "run").weights.exists()
    assert run_ranks(2, training("run")) == [0, 0]
    assert run_ranks(2, training("whole")) == [0, 0]
    assert contents(RunFolder.of(tmp_path, "run")) == contents(RunFolder.of(tmp_path, "whole"))


@pytest.mark.parametrize("worlds", [(2, 1), (1, 2), (2, 4)], ids=lambda worlds: f"from {worlds[0]} to {worlds[1]}")
def test_another_number_of_processes_continues_exactly_to_rounding(
    run_ranks: Ranks, training: Callable[..., list[str]], alone: RunFolder, tmp_path: Path, worlds: tuple[int, int]
) -> None:
    before, after = worlds
    shard = "training.shard=" + ("optimizer" if after == 4 else "none")
    assert run_ranks(before, training("run", shard), preempt=(0, UPDATE, 30)) == [preemption.REQUEUE] * before
    assert run_ranks(after, training("run", shard)) == [0] * after
    assert furthest(RunFolder.of(tmp_path, "run"), alone) < 1e-5


def test_evaluation_by_several_processes_gives_the_numbers_of_one(
    run_ranks: Ranks, config_file: Path, alone: RunFolder
) -> None:
    settings = ("evaluation.loss_recovered=true", "evaluation.batch_size=2", "evaluation.loss_sequences=7")
    evaluate(configuration.load(config_file, list(settings)), alone)
    wanted = alone.eval_results.read_bytes()
    where = ["--checkpoints-path", str(alone.path.parents[1]), "--run-name", "alone"]
    arguments = ["evaluate", str(config_file), *settings, *where]
    alone.eval_results.unlink()
    assert run_ranks(2, arguments, preempt=(1, "tsae.evaluation.scores:Scores.add", 1)) == [preemption.REQUEUE] * 2
    assert not alone.eval_results.exists()
    for world in (2, 4):
        assert run_ranks(world, arguments) == [0] * world
        assert alone.eval_results.read_bytes() == wanted
        alone.eval_results.unlink()


def test_harvest_by_processes_and_array_tasks_writes_the_store_of_one(
    run_ranks: Ranks, config: RunConfig, config_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "shared"
    arguments = ["harvest", str(config_file), f"store.path={path}", "--tasks", "2", "--task"]
    assert run_ranks(2, [*arguments, "1"]) == [0, 0]
    assert not StoreLayout(path).attributes["complete"]
    assert run_ranks(2, [*arguments, "0"]) == [0, 0]
    alone = StoreLayout(configuration.Path(config.store.path or ""))
    assert StoreLayout(path).attributes["manifest"] == alone.attributes["manifest"]


def test_processes_that_srun_started_find_each_other(
    run_ranks: Ranks, training: Callable[..., list[str]], alone: RunFolder, tmp_path: Path
) -> None:
    assert run_ranks(2, training("run", "training.processes=2"), slurm=True) == [0, 0]
    assert furthest(RunFolder.of(tmp_path, "run"), alone) < 1e-5


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n[3-5,8],m1", "n3"), ("n2,n1", "n2"), ("r[01-02]n[003-9]-ib,x", "r01n003-ib")],
)
def test_the_first_host_of_a_list_is_read(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize("step", ["", "4294967290", "batch"])
def test_a_shell_inside_a_slurm_job_is_no_task_of_it(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in {"STEP_ID": step, "NTASKS": "4", "STEP_NUM_TASKS": "1", "PROCID": "0", "JOB_ID": "7"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    adopt_step()
    assert "WORLD_SIZE" not in os.environ


def test_accelerate_that_starts_one_process_instead_of_two_is_caught_before_the_harvest(
    unharvested: RunConfig, tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        json.dumps(schema.to_plain(configuration.replace(unharvested, store={"path": str(tmp_path / "s")})))
    )
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command = ["-m", "tsae.cli", "train", str(path), "training.processes=2"]
    done = subprocess.run([*launcher, *command], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode != 0
    assert "tsae: training.processes: 2 were asked for, but 1 is training" in done.stderr
    assert not (tmp_path / "s").exists()


def test_a_batch_that_cannot_be_shared_is_refused_in_one_line_before_the_harvest(
    run_ranks: Ranks, training: Callable[..., list[str]], tmp_path: Path
) -> None:
    arguments = training("run", "training.batch_size=63", f"store.path={tmp_path / 's'}")
    assert run_ranks(2, arguments) == [2, 2]
    assert (tmp_path / "rank0.err").read_text() == (
        "tsae: training.batch_size: 63 cannot be shared by 2 processes; use a multiple, such as 64\n"
    )
    assert not (tmp_path / "s").exists()


def test_processes_that_are_done_end_without_threads_that_could_abort_them(tmp_path: Path) -> None:
    """Such as those that did a collective's work, and want the interpreter's lock when there is no interpreter."""
    script = tmp_path / "leave.py"
    script.write_text(
        "import atexit, os, pathlib, torch\n"
        "def threads():\n"
        "    return ' '.join(path.read_text().strip() for path in pathlib.Path('/proc/self/task').glob('*/comm'))\n"
        f"told = pathlib.Path({str(tmp_path)!r}, 'threads' + os.environ['RANK'])\n"
        "atexit.register(lambda: told.write_text(threads()))  # what is registered first is called last\n"
        "from tsae.parallel.rendezvous import together\n"
        "with together(cpu=True) as group:\n"
        "    group.sum(torch.ones(100))\n"
        "    assert 'gloo' in threads()\n"
    )
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([sys.executable, *launcher, str(script)], check=True, timeout=300)
    for rank in range(2):
        assert "gloo" not in (tmp_path / f"threads{rank}").read_text()
