"""The queue and its executors, with small real processes as stages."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tsae.runtime import locks, metadata, processes
from tsae.runtime.state import Record, State
from tsae.sweep.attempt import Attempt
from tsae.sweep.queue.executors import DebugExecutor, LocalExecutor, last_line
from tsae.sweep.queue.machine import Machine
from tsae.sweep.queue.runner import Queue
from tsae.sweep.resources import StageResources
from tsae.sweep.stage import Stage

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
def attempt(tmp_path):
    """A launch that started nothing yet."""
    return Attempt.begin(tmp_path / "sweep", {}, {})


@dataclasses.dataclass(frozen=True)
class Scripted(Stage):
    """A stage whose one argument is a command."""

    script: str = ""

    def arguments_in(self, _configs):
        return (["sh", "-c", self.script],)


@pytest.fixture
def stage(tmp_path):
    """A stage that runs a shell script in a real process; by default it is done when `<subject>.out` exists."""

    def make(subject, script="touch $out", depends_on=(), kind="train", after_failures=False, **resources):
        out = tmp_path / f"{subject}.out"
        return Scripted(
            kind=kind,
            key=subject,
            subject=subject,
            function="subprocess:check_call",
            config=None,
            arguments=(),
            points=(subject,),
            depends_on=depends_on,
            record=tmp_path / "stages" / subject,
            progress=tmp_path / f"{subject}.progress",
            lock=tmp_path / f"{subject}.lock",
            resources=StageResources(**resources),
            on_gpu=True,
            is_done=out.exists,
            after_failures=after_failures,
            script=f"out={out}; log={tmp_path / 'events'}; {script}",
        )

    return make


@pytest.fixture
def queue_of(attempt):
    """A queue of processes on a machine of so many cores and GPUs."""

    def make(stages, cores=8, gpus=(), display=None, executor=None, **settings):
        return Queue(stages, executor or LocalExecutor(attempt), display or Silent(), Machine(cores, gpus), **settings)

    return make


def states(queue):
    return {task.stage.subject: task.state for task in queue.tasks}


def said(stage):
    """State and error in the record of a stage."""
    record = Record.of(stage.record)
    return record and (record.state, record.error)


def most_at_once(events: Path) -> int:
    now = most = 0
    for line in events.read_text().split():
        now += {"+": 1, "-": -1}[line]
        most = max(most, now)
    return most


SPAN = "echo + >> $log; sleep 0.3; echo - >> $log; touch $out"


@pytest.mark.parametrize(("cpus", "cores", "expected"), [(1, 2, 2), (2, 2, 1), (None, 3, 3)])
def test_no_more_jobs_run_at_once_than_their_cores_allow(stage, queue_of, tmp_path, cpus, cores, expected):
    assert queue_of([stage(f"job{i}", SPAN, cpus=cpus) for i in range(4)], cores).run() == []
    assert most_at_once(tmp_path / "events") == expected


def test_no_more_jobs_run_at_once_than_the_sweep_allows(stage, queue_of, tmp_path):
    assert queue_of([stage(f"job{i}", SPAN, cpus=1) for i in range(3)], most=1).run() == []
    assert most_at_once(tmp_path / "events") == 1


def test_each_gpu_serves_one_job_at_a_time_and_is_the_only_one_the_job_sees(stage, queue_of, tmp_path):
    script = "echo $CUDA_VISIBLE_DEVICES:$OMP_NUM_THREADS > $out; echo + >> $log; sleep 0.3; echo - >> $log"
    assert queue_of([stage(f"job{i}", script) for i in range(4)], 8, ("3", "5")).run() == []
    assert most_at_once(tmp_path / "events") == 2
    assert {path.read_text().strip() for path in tmp_path.glob("job*.out")} == {"3:4", "5:4"}


QUEUE_AND_JOB = """
import subprocess, time
from tsae.sweep.queue.machine import Machine
share, job = Machine(8, ("0", "1")).take(1, 1), subprocess.Popen(["sleep", "60"])
share.leases[0].hand_to(job.pid)
print(job.pid, flush=True)
time.sleep(60)
"""


def test_a_gpu_that_a_killed_queue_s_job_still_uses_is_given_to_nobody(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    queue = subprocess.Popen(
        [sys.executable, "-c", QUEUE_AND_JOB], env=os.environ | {"TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE
    )
    job = int(queue.stdout.readline())
    machine = Machine(8, ("0", "1"))
    for _ in range(2):
        share = machine.take(1, 1)
        assert share.gpus == ("1",)
        assert machine.take(1, 1) is None
        machine.give_back(share)
        queue.kill()
        queue.wait()
    os.kill(job, signal.SIGKILL)
    while processes.started_at(job):
        time.sleep(0.01)
    share = machine.take(1, 1)
    assert share.gpus == ("0",)
    machine.give_back(share)
    assert not list(tmp_path.rglob("*.lock"))


def test_a_stage_starts_when_its_inputs_are_done(stage, queue_of):
    display = Silent()
    chain = [stage("first"), stage("second", depends_on=("first",)), stage("third", depends_on=("first", "second"))]
    assert queue_of(chain, display=display).run() == []
    order = [subject for subject, state in display.events if state == "done"]
    assert order == ["first", "second", "third"]


@pytest.mark.parametrize("kind", [LocalExecutor, DebugExecutor], ids=lambda kind: kind.name)
def test_a_failing_point_stops_only_what_needs_it(stage, queue_of, attempt, kind):
    stages = [
        stage("bad", "exit 3"),
        stage("good"),
        stage("after-bad", depends_on=("bad",), kind="evaluate"),
        stage("after-good", depends_on=("good",), kind="evaluate"),
        stage("last", depends_on=("after-bad", "after-good"), kind="report", after_failures=True),
    ]
    queue = queue_of(stages, 2, executor=kind(attempt))
    broken = queue.run()
    expected = {"bad": "failed", "good": "done", "after-bad": "blocked", "after-good": "done", "last": "done"}
    assert states(queue) == expected
    failed = next(task for task in broken if task.state == "failed")
    assert re.search(r"CalledProcessError: .*exit status 3", failed.status.error)
    assert said(failed.stage) == ("failed", failed.status.error)
    assert "exit status 3" in Path(failed.status.log).read_text()


def test_a_job_that_is_killed_hard_is_interrupted_and_no_failure(stage, queue_of):
    queue = queue_of([stage("victim", "echo half way; kill -9 $PPID")])
    (task,) = queue.run()
    assert task.state == "interrupted"
    assert "was killed (SIGKILL" in task.status.error
    assert said(task.stage) == ("running", "")


def test_a_job_that_cannot_even_begin_is_a_failure_with_the_last_words_of_its_log(stage, queue_of):
    broken = dataclasses.replace(stage("broken"), function="tsae.nowhere:stage")
    queue = queue_of([broken])
    (task,) = queue.run()
    assert task.state == "failed"
    assert "tsae.nowhere" in said(broken)[1]


@pytest.mark.parametrize(("bound", "state"), [(2, "done"), (1, "failed")])
def test_a_preempted_job_runs_again_up_to_a_bound(stage, queue_of, tmp_path, monkeypatch, bound, state):
    monkeypatch.setattr("tsae.sweep.queue.runner.MOST_PREEMPTIONS", bound)
    script = "echo + >> $log; test $(wc -l < $log) -gt 2 && touch $out || { kill -USR2 $PPID; exit 1; }"
    queue = queue_of([stage("job", script)])
    queue.run()
    assert states(queue) == {"job": state}
    assert (tmp_path / "events").read_text().count("+") == bound + 1


def test_processes_that_work_together_know_their_rank_and_meeting_point(stage, queue_of, tmp_path):
    script = "echo $RANK/$LOCAL_RANK/$WORLD_SIZE/$MASTER_ADDR:$MASTER_PORT/$OMP_NUM_THREADS >> $log; touch $out"
    assert queue_of([stage("pair", script, tasks=2, cpus=3)]).run() == []
    lines = sorted((tmp_path / "events").read_text().split())
    port = lines[0].split(":")[1].split("/")[0]
    assert lines == [f"{rank}/{rank}/2/127.0.0.1:{port}/3" for rank in (0, 1)]
    assert int(port) > 1024


@pytest.mark.parametrize(("death", "state"), [("kill -9 $PPID", "interrupted"), ("exit 3", "failed")])
def test_a_process_that_dies_takes_those_it_works_with_down(stage, queue_of, tmp_path, death, state):
    script = f"if [ $RANK = 1 ]; then {death}; fi; echo $$ > $out.pid; sleep 600"
    queue = queue_of([stage("pair", script, tasks=2)])
    queue.run()
    assert states(queue) == {"pair": state}
    if state == "failed":
        assert said(queue.tasks[0].stage)[0] == "failed"
    assert processes.started_at(int((tmp_path / "pair.out.pid").read_text())) == ""


def test_jobs_import_no_code_from_the_working_directory(stage, queue_of, tmp_path, monkeypatch):
    (tmp_path / "tsae").mkdir()
    (tmp_path / "tsae" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    assert queue_of([stage("job")]).run() == []


def test_jobs_import_the_copy_of_the_code_that_their_launch_made(stage, queue_of, attempt):
    (attempt.code / "tsae" / "marker.py").write_text(
        "from pathlib import Path\ntouch = lambda words: Path(words[-1].split('=')[1].split(';')[0]).touch()\n"
    )
    assert queue_of([dataclasses.replace(stage("job"), function="tsae.marker:touch")]).run() == []


def test_jobs_find_the_packages_of_the_launching_shell_behind_the_copy_of_the_code(
    stage, queue_of, attempt, tmp_path, monkeypatch
):
    for folder in (tmp_path / "mine" / "mypackage", tmp_path / "mine" / "tsae"):
        folder.mkdir(parents=True)
    (tmp_path / "mine" / "tsae" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    (tmp_path / "mine" / "mypackage" / "__init__.py").write_text(
        "import json, os, sys, tsae\n"
        "def note(words):\n"
        "    out = words[-1].split('=')[1].split(';')[0]\n"
        "    json.dump([tsae.__file__, os.environ['PYTHONPATH'], os.environ['LOADEDMODULES']], open(out, 'w'))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "mine::/not/there")
    monkeypatch.setenv("LOADEDMODULES", "cuda/12")
    assert queue_of([dataclasses.replace(stage("job"), function="mypackage:note")]).run() == []
    code, path, modules = json.loads((tmp_path / "job.out").read_text())
    assert Path(code).is_relative_to(attempt.code)
    assert path.split(":") == [str(attempt.code), str(tmp_path / "mine"), "/not/there"]
    assert modules == "cuda/12"


def test_a_job_that_returns_without_its_output_is_a_failure(stage, queue_of):
    (task,) = queue_of([stage("empty", "true")]).run()
    assert "its output is not complete" in task.status.error
    assert said(task.stage) == ("failed", task.status.error)


def held_by_another(path, then):
    """A process that holds the lock at `path`, says so, and does `then`."""
    script = "import os, pathlib, sys, time\nfrom tsae.runtime import locks\n"
    script += f"with locks.hold(pathlib.Path({str(path)!r}), 'x'):\n  print('held', flush=True); {then}"
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    return other


def test_what_another_live_process_works_on_is_waited_for_and_not_run_twice(stage, queue_of, tmp_path):
    work = stage("shared", "echo run >> $log; touch $out")
    with held_by_another(work.lock, f"time.sleep({SECOND}); pathlib.Path({str(tmp_path / 'shared.out')!r}).touch()"):
        display = Silent()
        assert queue_of([work], display=display).run() == []
    assert display.events == [("shared", "elsewhere"), ("shared", "done")]
    assert not (tmp_path / "events").exists()


def test_what_another_queue_has_is_left_to_it_and_taken_over_when_that_ends(stage, queue_of):
    claims = iter([Record(State.RUNNING, attempt="other")] * 2 + [Record(State.INTERRUPTED, attempt="other")] * 9)
    display = Silent()
    queue = queue_of([stage("work")], display=display, claims=lambda _stage: next(claims))
    assert queue.run() == []
    assert display.events == [("work", "elsewhere"), ("work", "running"), ("work", "done")]


def test_the_failure_of_what_another_queue_has_is_not_tried_again(stage, queue_of, tmp_path):
    claims = iter([Record(State.RUNNING, attempt="other"), Record(State.FAILED, attempt="other", error="it broke")])
    queue = queue_of([stage("work", "touch $log")], claims=lambda _stage: next(claims))
    (task,) = queue.run()
    assert (task.state, task.status.error) == ("failed", "it broke")
    assert not (tmp_path / "events").exists()


def test_work_left_by_a_killed_process_is_taken_over(stage, queue_of):
    work = stage("left")
    held_by_another(work.lock, "os.kill(os.getpid(), 9)").wait()
    assert work.lock.exists()
    display = Silent()
    assert queue_of([work], display=display).run() == []
    assert display.events == [("left", "running"), ("left", "done")]


def test_ending_the_queue_ends_its_jobs_and_their_children(stage, queue_of, tmp_path):
    queue = queue_of([stage("long", "echo $$ > $out.pid; sleep 600")])
    child = tmp_path / "long.out.pid"

    def stop_once_it_runs(seconds):
        if child.exists() and child.read_text().strip():
            raise KeyboardInterrupt
        time.sleep(seconds)

    with pytest.raises(KeyboardInterrupt):
        queue.run(sleep=stop_once_it_runs)
    assert processes.started_at(int(child.read_text())) == ""
    assert states(queue) == {"long": "interrupted"}


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
        stale = {**json.loads(path.read_text()), "started": "1"}
    metadata.write(path, stale)
    assert locks.owner(path) is None


def test_a_silent_owner_on_another_host_loses_its_lock(tmp_path):
    path = tmp_path / "x.lock"
    with locks.hold(path, "x"):
        elsewhere = {**json.loads(path.read_text()), "host": "another-host"}
    metadata.write(path, elsewhere)
    assert locks.owner(path).host == "another-host"
    past = time.time() - 2 * locks.SILENT_SECONDS
    os.utime(path, (past, past))
    assert locks.owner(path) is None


def test_the_last_line_of_a_log_is_one_that_says_something(tmp_path):
    log = tmp_path / "log"
    assert last_line(log) == ""
    log.write_text("x\n" * 10000 + "the reason\n\n  \n")
    assert last_line(log) == "the reason"
