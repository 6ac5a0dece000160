"""The queue and its executors, with small real processes as stages."""

from __future__ import annotations

import dataclasses
import os
import re
import runpy
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jobs import DebugExecutor, LocalExecutor, last_line
from runner import Queue
from stage import Stage
from sweepfile import StageResources

from tsae import locks

SECOND = 1.0


class Silent:
    """A display that only remembers."""

    def __init__(self):
        self.events = []

    def changed(self, task):
        self.events.append((task.stage.subject, task.state))

    def refresh(self, tasks):
        pass


@pytest.fixture
def stage(tmp_path):
    """A stage that runs a shell script in a real process; by default it is done when `<subject>.out` exists."""

    def make(subject, script="touch $out", depends_on=(), cpus=None, gpus=None, kind="train"):
        out = tmp_path / f"{subject}.out"
        return Stage(
            kind=kind,
            key=subject,
            subject=subject,
            function=subprocess.check_call,
            arguments=(["sh", "-c", f"out={out}; log={tmp_path / 'events'}; " + script],),
            points=(subject,),
            depends_on=depends_on,
            progress=tmp_path / f"{subject}.progress",
            lock=tmp_path / f"{subject}.lock",
            logs=tmp_path / "logs" / subject,
            resources=StageResources(cpus=cpus, gpus=gpus),
            on_gpu=True,
            is_done=out.exists,
        )

    return make


def states(queue):
    return {task.stage.subject: task.state for task in queue.tasks}


def most_at_once(events: Path) -> int:
    now = most = 0
    for line in events.read_text().split():
        now += {"+": 1, "-": -1}[line]
        most = max(most, now)
    return most


SPAN = "echo + >> $log; sleep 0.3; echo - >> $log; touch $out"


@pytest.mark.parametrize(("cpus", "cores", "expected"), [(1, 2, 2), (2, 2, 1), (None, 3, 3)])
def test_no_more_jobs_run_at_once_than_their_cores_allow(stage, tmp_path, cpus, cores, expected):
    queue = Queue([stage(f"job{i}", SPAN, cpus=cpus) for i in range(4)], LocalExecutor(), Silent(), cores)
    assert queue.run() == []
    assert most_at_once(tmp_path / "events") == expected


def test_each_gpu_serves_one_job_at_a_time_and_is_the_only_one_the_job_sees(stage, tmp_path):
    script = "echo $CUDA_VISIBLE_DEVICES:$OMP_NUM_THREADS > $out; echo + >> $log; sleep 0.3; echo - >> $log"
    queue = Queue([stage(f"job{i}", script) for i in range(4)], LocalExecutor(), Silent(), 8, ("3", "5"))
    assert queue.run() == []
    assert most_at_once(tmp_path / "events") == 2
    assert {path.read_text().strip() for path in tmp_path.glob("job*.out")} == {"3:4", "5:4"}


def test_a_stage_starts_when_its_inputs_are_done(stage):
    display = Silent()
    chain = [stage("first"), stage("second", depends_on=("first",)), stage("third", depends_on=("first", "second"))]
    assert Queue(chain, LocalExecutor(), display, 8).run() == []
    order = [subject for subject, state in display.events if state == "done"]
    assert order == ["first", "second", "third"]


@pytest.mark.parametrize("executor", [LocalExecutor(), DebugExecutor()], ids=lambda executor: executor.name)
def test_a_failing_point_stops_only_what_needs_it(stage, executor):
    stages = [
        stage("bad", "exit 3"),
        stage("good"),
        stage("after-bad", depends_on=("bad",), kind="evaluate"),
        stage("after-good", depends_on=("good",), kind="evaluate"),
    ]
    queue = Queue(stages, executor, Silent(), 2)
    broken = queue.run()
    assert states(queue) == {"bad": "failed", "good": "done", "after-bad": "blocked", "after-good": "done"}
    failed = next(task for task in broken if task.state == "failed")
    assert re.search(r"CalledProcessError: .*exit status 3", failed.error)
    assert "exit status 3" in failed.job.log.read_text()


def test_a_job_that_is_killed_hard_is_a_failure_with_the_last_words_of_its_log(stage):
    queue = Queue([stage("victim", "echo half way; kill -9 $PPID")], LocalExecutor(), Silent(), 1)
    (task,) = queue.run()
    assert task.state == "failed"
    assert "ended without a result" in task.error


PREEMPTED_TWICE = """
import os, pathlib, signal, time
from tsae import preemption
marks = pathlib.Path({marks!r})
marks.open("a").write("+")
with preemption.watched():
    if len(marks.read_text()) < 3:
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(0.1)
        preemption.check()
pathlib.Path({out!r}).touch()
"""


@pytest.mark.parametrize(("bound", "state"), [(2, "done"), (1, "failed")])
def test_a_preempted_job_runs_again_up_to_a_bound(stage, tmp_path, monkeypatch, bound, state):
    monkeypatch.setattr("runner.MOST_PREEMPTIONS", bound)
    script, out = tmp_path / "script.py", tmp_path / "job.out"
    script.write_text(PREEMPTED_TWICE.format(marks=str(tmp_path / "marks"), out=str(out)))
    job = dataclasses.replace(stage("job"), function=runpy.run_path, arguments=(str(script),))
    queue = Queue([job], LocalExecutor(), Silent(), 1)
    queue.run()
    assert states(queue) == {"job": state}
    assert (tmp_path / "marks").read_text() == "+" * (bound + 1)


def test_jobs_import_no_code_from_the_working_directory(stage, tmp_path, monkeypatch):
    (tmp_path / "submitit").mkdir()
    (tmp_path / "submitit" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    assert Queue([stage("job")], LocalExecutor(), Silent(), 1).run() == []


def test_a_job_that_returns_without_its_output_is_a_failure(stage):
    (task,) = Queue([stage("empty", "true")], LocalExecutor(), Silent(), 1).run()
    assert "its output is not complete" in task.error


def test_what_another_live_process_works_on_is_waited_for_and_not_run_twice(stage, tmp_path):
    work = stage("shared", "echo run >> $log; touch $out")
    script = f"from tsae import locks; import time, pathlib\nwith locks.hold(pathlib.Path({str(work.lock)!r}), 'x'):\n"
    script += (
        f"  print('held', flush=True); time.sleep({SECOND}); pathlib.Path({str(tmp_path / 'shared.out')!r}).touch()"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        display = Silent()
        assert Queue([work], LocalExecutor(), display, 1).run() == []
    assert display.events == [("shared", "elsewhere"), ("shared", "done")]
    assert not (tmp_path / "events").exists()


def test_work_left_by_a_killed_process_is_taken_over(stage):
    work = stage("left")
    script = f"from tsae import locks; import os, pathlib\nwith locks.hold(pathlib.Path({str(work.lock)!r}), 'x'):\n"
    script += "  os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", script], check=False)
    assert work.lock.exists()
    display = Silent()
    assert Queue([work], LocalExecutor(), display, 1).run() == []
    assert display.events == [("left", "running"), ("left", "done")]


def test_ending_the_queue_ends_its_jobs_and_their_children(stage, tmp_path):
    queue = Queue([stage("long", "echo $$ > $out.pid; sleep 600")], LocalExecutor(), Silent(), 1)
    child = tmp_path / "long.out.pid"

    def stop_once_it_runs(seconds):
        if child.exists() and child.read_text().strip():
            raise KeyboardInterrupt
        time.sleep(seconds)

    with pytest.raises(KeyboardInterrupt):
        queue.run(sleep=stop_once_it_runs)
    assert locks.started_at(int(child.read_text())) == ""


def test_a_lock_is_refused_to_a_second_process_and_named(tmp_path):
    path = tmp_path / "x.lock"
    with locks.hold(path, "train x"):
        assert locks.owner(path).pid == os.getpid()
        me = rf"train x: process {os.getpid()} on .* is already working on it"
        with pytest.raises(locks.LockHeld, match=me), locks.hold(path, "train x"):
            pass
    assert locks.owner(path) is None


def test_a_reused_process_id_does_not_hold_a_lock(tmp_path):
    path = tmp_path / "x.lock"
    with locks.hold(path, "x"):
        stale = path.read_text().replace(locks.started_at(os.getpid()), "1")
    path.write_text(stale)
    assert locks.owner(path) is None


def test_a_silent_owner_on_another_host_loses_its_lock(tmp_path):
    path = tmp_path / "x.lock"
    with locks.hold(path, "x"):
        elsewhere = path.read_text().replace(socket.gethostname(), "another-host")
    path.write_text(elsewhere)
    assert locks.owner(path).host == "another-host"
    past = time.time() - 2 * locks.SILENT_SECONDS
    os.utime(path, (past, past))
    assert locks.owner(path) is None


def test_the_last_line_of_a_traceback_is_what_people_read():
    assert last_line("Traceback:\n  x\ntsae.errors.TsaeError: a: b; c\n\n") == "a: b; c"
    assert last_line("Traceback:\ntorch.OutOfMemoryError: no room") == "OutOfMemoryError: no room"
    assert last_line("just words: here") == "just words: here"
