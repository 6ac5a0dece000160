"""A stage that is asked to leave saves its state once, exits with 75, and ends as if nothing had happened."""

from __future__ import annotations

import logging
import os
import random
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.system.dying import signalled
from tsae import stages
from tsae.checkpoint import RunFolder
from tsae.config import run as configuration
from tsae.config.run import RunConfig
from tsae.evaluation.identity import is_evaluated
from tsae.runtime import locks, preemption
from tsae.runtime.errors import TsaeError
from tsae.training.resume import ResumeStates, random_state, set_random_state
from tsae.training.run import train


def outputs(run: RunFolder) -> dict[str, bytes]:
    files = (run.weights, run.metrics, run.checkpoint(20), run.checkpoint(41), run.config_json)
    return {path.name: path.read_bytes() for path in files}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
@pytest.mark.parametrize("saved", [2, 14, 17], ids=["first step", "at a state", "between states"])
def test_a_preempted_training_saves_once_and_continues_to_the_same_bytes(
    config: RunConfig, tmp_path: Path, run_process: Callable[..., int], number: int, saved: int
) -> None:
    """The signal comes during an update, one more follows; and it comes again each time a state is being saved."""
    run = RunFolder.of(tmp_path, "preempted")
    arguments = (config, tmp_path, "preempted")
    code = run_process(
        signalled, "train_stage", arguments, "tsae.training.trainer:Trainer._track_thresholds", saved - 1, number
    )
    assert code == preemption.REQUEUE
    assert (run.resume / "latest").read_text() == f"step_{saved}"
    assert not list(run.path.rglob(".*.tmp"))
    assert locks.owner(stages.run_lock(run, "train")) is None
    stages.train_stage(*arguments)
    train(config, RunFolder.of(tmp_path, "whole"))
    assert outputs(run) == outputs(RunFolder.of(tmp_path, "whole"))


@pytest.mark.parametrize("at", ["tsae.store.reader:Store.open", "tsae.store.reader:Store.read_chunks"])
def test_a_training_asked_to_leave_before_its_first_step_makes_none(
    config: RunConfig, tmp_path: Path, run_process: Callable[..., int], at: str
) -> None:
    code = run_process(signalled, "train_stage", (config, tmp_path, "run"), at, 1, signal.SIGTERM)
    assert code == preemption.REQUEUE
    assert not RunFolder.of(tmp_path, "run").resume.exists()


def test_a_preempted_evaluation_is_done_again(
    config: RunConfig, tmp_path: Path, run_process: Callable[..., int]
) -> None:
    arguments, run = (config, tmp_path, "run"), RunFolder.of(tmp_path, "run")
    stages.train_stage(*arguments)
    at = "tsae.evaluation.scores:Scores.add"
    assert run_process(signalled, "evaluate_stage", arguments, at, 2, signal.SIGTERM) == preemption.REQUEUE
    assert not run.eval_results.exists()
    stages.evaluate_stage(*arguments)
    assert is_evaluated(config, run)


@pytest.mark.parametrize("at", ["tsae.lm.model:begin_reading", "tsae.data.contexts:make_contexts"])
def test_a_preempted_harvest_keeps_its_finished_shards(
    unharvested: RunConfig, tmp_path: Path, run_process: Callable[..., int], at: str
) -> None:
    config = configuration.replace(unharvested, store={"path": str(tmp_path / "store")})
    count = 1 if at.endswith("make_contexts") else 4
    assert run_process(signalled, "harvest_stage", (config,), at, count, signal.SIGUSR2) == preemption.REQUEUE
    assert not stages.is_harvested(config)
    assert run_process(signalled, "harvest_stage", (config,), at, 0, signal.SIGUSR2) == 0
    assert stages.is_harvested(config)


def test_a_command_says_that_it_was_preempted() -> None:
    script = (
        "import os, signal, sys; from tsae import cli, stages; from tsae.runtime import preemption\n"
        "def stage(*_):\n  os.kill(os.getpid(), signal.SIGTERM)\n  preemption.check()\n"
        "stages.harvest_stage = preemption.watched()(stage)\n"
        "code = cli.main(['harvest', sys.argv[1]])\nos.kill(os.getpid(), signal.SIGTERM)\nsys.exit(code)"
    )
    config = Path(__file__).parents[2] / "sweeps" / "bases" / "embedded.yaml"
    ended = subprocess.run([sys.executable, "-c", script, str(config)], capture_output=True, text=True, check=False)
    assert ended.stderr == "tsae: preempted (SIGTERM); the same command continues\n"
    assert ended.returncode == preemption.REQUEUE


def test_handlers_of_others_are_put_back() -> None:
    before = [signal.getsignal(number) for number in preemption.SIGNALS]
    with preemption.watched():
        os.kill(os.getpid(), signal.SIGUSR2)
        assert preemption.requested()
    assert [signal.getsignal(number) for number in preemption.SIGNALS] == before
    assert not preemption.requested()


@pytest.mark.parametrize("deaf", [False, True], ids=["in a terminal", "under nohup"])
def test_the_end_of_a_terminal_is_heard_unless_nohup_said_otherwise(deaf: bool) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if deaf else signal.SIG_DFL)
    try:
        with preemption.watched():
            os.kill(os.getpid(), signal.SIGHUP)
            assert preemption.requested() == (not deaf)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_forked_helper_ends_when_it_is_told_to() -> None:
    with preemption.watched():
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGUSR2)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM


def states_of(folder: Path, keep: int = 2, **origin: str) -> ResumeStates:
    return ResumeStates(folder, {"version of tsae": "1", **origin}, keep)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with the states of steps 10 and 20, of three that were saved."""
    states, value = states_of(tmp_path / "resume"), torch.zeros(100)
    for step in (5, 10, 20):
        states.save(step, {"value": value, "step": step}, first=lambda: None)
        value += 1  # what is being written is a copy
    states.wait()
    return tmp_path / "resume"


def test_the_last_states_are_kept(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["latest", "step_10", "step_20"]
    state = states_of(saved).load()
    assert state is not None
    assert state["step"] == 20
    assert torch.equal(state["value"], torch.full((100,), 2.0))


@pytest.mark.parametrize("damage", ["cut", "flip", "no record", "empty", "gone"])
def test_a_damaged_state_gives_way_to_the_one_before_it(
    saved: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    path = saved / "step_20" / "state.pt"
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[:-100])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        (path if damage == "gone" else path.with_suffix(".json")).unlink()
    with caplog.at_level(logging.WARNING, "tsae"):
        states = states_of(saved)
    state = states.load()
    assert state is not None
    assert state["step"] == 10
    assert "the state before it is taken" in caplog.text
    states.remove_leftovers()
    assert sorted(path.name for path in saved.iterdir()) == ["latest", "step_10"]


def test_a_state_that_latest_does_not_name_does_not_count(saved: Path) -> None:
    (saved / "latest").write_text("step_10")
    state = states_of(saved).load()
    assert state is not None
    assert state["step"] == 10


@pytest.mark.parametrize("named", ["", "garbage", "step_x"])
def test_a_damaged_pointer_gives_way_to_the_newest_state(
    saved: Path, caplog: pytest.LogCaptureFixture, named: str
) -> None:
    (saved / "latest").write_text(named)
    state = states_of(saved).load()
    assert state is not None
    assert state["step"] == 20
    assert "names no state" in caplog.text


def test_a_training_whose_states_are_all_damaged_says_that_it_begins_again(
    saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in saved.glob("step_*/state.pt"):
        path.write_bytes(b"")
    assert states_of(saved).load() is None
    assert caplog.text.count("the state before it is taken") == 1
    assert "step_10: state.pt is damaged" in caplog.text
    assert "training begins again" in caplog.text


def test_a_state_of_another_version_is_refused(saved: Path) -> None:
    with pytest.raises(
        TsaeError, match=r"another version of tsae \(1, now 2\).* remove .*resume to begin again"
    ) as said:
        states_of(saved, **{"version of tsae": "2"}).load()
    assert "\n" not in str(said.value)
    assert (saved / "step_20" / "state.pt").exists()


def test_states_are_written_in_the_background_one_at_a_time(tmp_path: Path) -> None:
    states, disk = states_of(tmp_path / "resume"), threading.Event()
    states.save(5, {"step": 5}, first=disk.wait)
    assert states.busy
    assert not (tmp_path / "resume").exists()
    disk.set()
    states.save(6, {"step": 6}, first=lambda: None)
    assert (tmp_path / "resume" / "step_5" / "state.json").exists()
    states.wait()
    assert not states.busy
    assert (tmp_path / "resume" / "latest").read_text() == "step_6"


def test_a_state_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "resume").write_text("a file where a folder is needed")
    states = states_of(tmp_path / "resume")
    states.save(5, {"step": 5}, first=lambda: None)
    with pytest.raises(TsaeError, match="could not be written"):
        states.wait()


def test_a_disk_without_room_is_named_and_keeps_what_was_whole(saved: Path) -> None:
    """A limit on the size of files stands for the disk."""
    states, before = states_of(saved), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        states.save(30, {"value": torch.zeros(10_000)}, first=lambda: None)
        with pytest.raises(TsaeError, match=r"could not be written: .*File too large$"):
            states.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    state = states_of(saved).load()
    assert state is not None
    assert state["step"] == 20
    assert not list(saved.rglob(".*.tmp"))


def test_a_state_is_due_after_minutes_too(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    monkeypatch.setattr(ResumeStates, "save", lambda _self, step, *_, **__: steps.append(step))
    often = configuration.replace(
        config, training={"resume_every": 0, "resume_minutes": 1e-9, "steps": 5, "save_steps": ()}
    )
    train(often, RunFolder.of(tmp_path, "often"))
    assert steps == [1, 2, 3, 4]


def test_every_generator_continues_where_it_was() -> None:
    def draws() -> list[float]:
        return [float(torch.rand(1)), float(np.random.rand()), float(np.random.randn()), random.random()]

    draws()
    state = random_state()
    first = draws()
    set_random_state(state)
    assert draws() == first
