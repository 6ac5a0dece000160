"""A stage as a job of its own process, and the record it keeps; on Slurm in tests/system/slurm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tsae.runtime.job import Call, run_stage
from tsae.runtime.metadata import whole as read_whole_json
from tsae.runtime.state import Record, State, state_path


def call(tmp_path: Path, function: str, *arguments: Any, **more: Any) -> Call:
    settings = {"label": "train x", "attempt": "1", "executor": "local", **more}
    return Call(record=str(tmp_path / "record"), function=function, arguments=arguments, **settings)


def state(tmp_path: Path) -> dict[str, Any]:
    return read_whole_json(state_path(tmp_path / "record"))


def start(tmp_path: Path, wanted: Call) -> subprocess.Popen[str]:
    wanted.save(tmp_path / "call.json")
    command = [sys.executable, "-m", "tsae.runtime.job", str(tmp_path / "call.json")]
    return subprocess.Popen(command, text=True, stderr=subprocess.PIPE)


def test_a_job_says_that_it_runs_and_that_it_is_done(tmp_path: Path) -> None:
    assert state(tmp_path) == {}
    process = start(tmp_path, call(tmp_path, "time:sleep", 0.5, log="here.log"))
    while not state(tmp_path):
        time.sleep(0.01)
    running = state(tmp_path)
    assert (running["state"], running["pid"], running["log"]) == ("running", process.pid, "here.log")
    assert process.wait() == 0
    assert (state(tmp_path)["state"], state(tmp_path)["started"]) == ("done", running["started"])
    assert state(tmp_path)["ended"] >= running["started"] + 0.5


def test_a_failure_is_one_line_in_the_record_and_a_traceback_in_the_log(tmp_path: Path) -> None:
    process = start(tmp_path, call(tmp_path, "json:loads", "{\n"))
    said = process.communicate()[1]
    assert process.returncode == 1
    assert "Traceback" in said
    assert state(tmp_path)["state"] == "failed"
    assert state(tmp_path)["error"].startswith("JSONDecodeError: Expecting property name")
    assert "\n" not in state(tmp_path)["error"]


def test_a_job_that_is_asked_to_leave_while_it_waits_for_a_lock_is_preempted(tmp_path: Path) -> None:
    from tsae.runtime import locks

    with locks.hold(tmp_path / "lock", "mine"):
        wanted = call(tmp_path, "test_job:take", str(tmp_path / "lock"))
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        wanted.save(tmp_path / "call.json")
        process = subprocess.Popen(
            [sys.executable, "-m", "tsae.runtime.job", str(tmp_path / "call.json")],
            text=True,
            stderr=subprocess.PIPE,
            env=environment,
        )
        assert process.stderr is not None
        assert process.stderr.readline().startswith("waiting: ")
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 75
    assert state(tmp_path)["state"] == "preempted"


def take(path: str) -> None:
    """A stage that needs the lock at `path`."""
    from tsae.runtime import locks

    with locks.hold(Path(path), "stage"):
        pass


def left_badly() -> None:
    try:
        raise KeyboardInterrupt
    finally:
        raise AttributeError("of a library that was left half way")


def test_an_interrupt_that_a_library_hides_is_no_failure(tmp_path: Path) -> None:
    with pytest.raises(AttributeError):
        run_stage(call(tmp_path, f"{__name__}:left_badly"))
    assert state(tmp_path)["state"] == "running"  # as of any stage that ended without a word


def test_fewer_processes_than_were_asked_for_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="4 processes were asked for and 1 started"):
        run_stage(call(tmp_path, "os:getcwd", processes=4))
    assert state(tmp_path)["state"] == "failed"


def test_the_first_failure_of_a_run_is_told_and_the_next_run_begins_anew(tmp_path: Path) -> None:
    folder, first, second = tmp_path / "record", Record(attempt="1"), Record(attempt="1")
    second.enter(folder, State.FAILED, "the reason")
    for later in (State.RUNNING, State.PREEMPTED):
        first.enter(folder, later)
    first.enter(folder, State.FAILED, "because of the other")
    assert (state(tmp_path)["state"], state(tmp_path)["error"]) == ("failed", "the reason")
    Record(attempt="1", restarts=1).enter(folder, State.RUNNING)
    assert state(tmp_path)["state"] == "running"
