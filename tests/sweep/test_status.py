"""What `status.py` says of stages in every state; records and processes are real, schedulers are not needed."""

from __future__ import annotations

import json
import os
import subprocess
import time
from contextlib import contextmanager

import pytest

from tsae.cli import main
from tsae.runtime import files, locks, processes
from tsae.runtime.errors import TsaeError
from tsae.runtime.state import Record, state_path
from tsae.sweep.attempt import Attempt, Submitted
from tsae.sweep.curves import curves, sparkline
from tsae.sweep.dryrun import dry_run
from tsae.sweep.launcher import Options
from tsae.sweep.overview import counts, log_texts, point_rows
from tsae.sweep.queue.background import file_of, lock_of
from tsae.sweep.schedulers.slurm.query import seconds
from tsae.sweep.status import status_lines
from tsae.sweep.survey import Survey


@pytest.fixture
def plan(plan_of):
    """Two points that share a harvest."""
    return plan_of(grid={"sae.k": [8, 16]})


@pytest.fixture
def attempt(plan):
    """A launch that gave all stages to a local queue."""
    made = Attempt.begin(plan.folder, {}, {})
    common = {"cluster": None, "submitted": time.time(), "executor": "local", "attempt": made.stamp}
    made.add_jobs(
        Submitted(stage=stage.key, label=stage.label, job="1", log=f"{stage.kind}.log", **common)
        for stage in plan.stages
    )
    return made


def queue_says(attempt, *told):
    files.write_json(file_of(attempt), {stage.key: status.for_queue() for stage, status in told})


def record(stage, attempt, **state):
    files.write_json(state_path(stage.record), {"attempt": attempt.stamp, "host": os.uname().nodename, **state})


def states(plan):
    standings = Survey(plan).standings(plan.stages)
    return {stage.label: standings[stage.key].state for stage in plan.stages if stage.kind == "train"}


@contextmanager
def a_process():
    with subprocess.Popen(["sleep", "600"]) as process:
        try:
            yield process
        finally:
            process.kill()


def test_nobody_was_asked(plan):
    assert set(states(plan).values()) == {"waiting"}


def test_a_live_queue_has_what_waits_and_what_runs(plan, attempt):
    one, other = (stage for stage in plan.stages if stage.kind == "train")
    queue_says(attempt, (one, Record("running", started=time.time())), (other, Record()))
    with locks.hold(lock_of(attempt), "queue"):
        assert states(plan) == {one.label: "running", other.label: "queued"}
    assert states(plan) == {one.label: "interrupted", other.label: "waiting"}


def test_a_job_outlives_its_killed_queue_until_it_ends_itself(plan, attempt):
    train = next(stage for stage in plan.stages if stage.kind == "train")
    with a_process() as process:
        running = Record("running", started=time.time(), pid=process.pid, pid_started=processes.started_at(process.pid))
        queue_says(attempt, (train, running))
        record(train, attempt, state="running", started=time.time())
        assert states(plan)[train.label] == "running"
    assert states(plan)[train.label] == "interrupted"


def test_a_reused_process_id_is_no_life(plan, attempt):
    train = next(stage for stage in plan.stages if stage.kind == "train")
    with a_process() as process:
        queue_says(attempt, (train, Record("running", started=time.time(), pid=process.pid, pid_started="1")))
        assert states(plan)[train.label] == "interrupted"


def test_a_failure_is_told_with_its_last_line_and_blocks_what_needs_it(plan, attempt):
    train, other = (stage for stage in plan.stages if stage.kind == "train")
    queue_says(attempt, (train, Record("failed", error="it broke", started=1.0, ended=61.0, log="a.log")))
    record(train, attempt, state="failed", error="it broke", started=1.0, ended=61.0)
    standings = Survey(plan).standings(plan.stages)
    assert standings[train.key].error == "it broke"
    evaluations = {stage.subject: standings[stage.key].state for stage in plan.stages if stage.kind == "evaluate"}
    assert evaluations == {train.subject: "blocked", other.subject: "waiting"}
    lines = point_rows(plan, plan.stages, standings, 200)
    row = next(i for i, line in enumerate(lines) if line.startswith(train.subject))
    assert lines[row].split()[1:] == ["train", "failed", os.uname().nodename, "1:00"]
    assert [line.strip() for line in lines[row + 1 : row + 3]] == ["it broke", "log: a.log"]


def test_the_record_of_an_earlier_launch_says_nothing_of_this_one(plan, attempt):
    train = next(stage for stage in plan.stages if stage.kind == "train")
    record(train, attempt, state="failed", error="long ago")
    assert states(plan)[train.label] == "failed"
    again = Attempt.begin(plan.folder, {}, {})
    entry = next(entry for entry in attempt.jobs() if entry.stage == train.key)
    again.add_jobs([Submitted(**{**vars(entry), "attempt": again.stamp})])
    assert states(plan)[train.label] == "waiting"


def test_where_slurm_does_not_answer_the_jobs_words_are_shown_and_said_to_be_no_more(
    plan, attempt, monkeypatch, tmp_path
):
    monkeypatch.setenv("PATH", str(tmp_path))
    entries = attempt.jobs()
    again = Attempt.begin(plan.folder, {}, {})
    again.add_jobs(Submitted(**{**vars(entry), "executor": "slurm", "attempt": again.stamp}) for entry in entries)
    one, other = (stage for stage in plan.stages if stage.kind == "train")
    record(one, again, state="running", started=time.time())
    with pytest.raises(TsaeError, match="squeue: not found"):
        states(plan)  # a launch must know
    survey = Survey(plan, whatever_answers=True)
    standings = survey.standings(plan.stages)
    assert [standings[stage.key].state for stage in (one, other)] == ["running", "queued"]
    assert "Slurm does not answer (squeue: not found" in status_lines(plan, 200)[0][2]


def test_a_damaged_record_counts_as_none_and_a_damaged_list_of_jobs_is_one_line(plan, attempt):
    train = next(stage for stage in plan.stages if stage.kind == "train")
    queue_says(attempt, (train, Record("interrupted", started=1.0)))
    record(train, attempt, state="failed")
    assert states(plan)[train.label] == "failed"
    state_path(train.record).write_text('{"state": "fai')
    assert states(plan)[train.label] == "interrupted"
    (attempt.folder / "jobs.json").write_text("[{")
    with pytest.raises(TsaeError, match=r"jobs\.json: damaged.*scancel --name=tsae\.little"):
        states(plan)


@pytest.mark.parametrize("what", ["run", "trainer", "record"])
def test_a_run_whose_folder_cannot_be_read_is_damaged_and_the_others_are_shown(write_sweep, home, what, capsys):
    file = write_sweep(grid={"sae.k": [8, 16]})
    run = home / "checkpoints" / "little-embedded" / "k=8"
    broken = {"run": run, "trainer": run / "trainer_0", "record": run / "trainer_0" / "resolved.yaml"}[what]
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"\xff\xfe")
    assert main(["status", str(file)]) == 0
    said = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:3] for line in said.splitlines() if line.startswith("k=")}
    assert rows == {"k=8": ["train", "failed"], "k=16": ["train", "waiting"]}
    assert f"    damaged: {run / 'trainer_0' / 'resolved.yaml'}: cannot be read: " in said
    assert main(["sweep", str(file), "--dry-run"]) == 2
    assert "resolved.yaml: cannot be read: " in capsys.readouterr().err
    assert main(["report", str(file)]) == 2
    assert capsys.readouterr().err.endswith("none of its 2 points has been trained or measured\n")
    assert not (home / "sweeps").exists()


def test_dry_run_and_status_count_the_same_stages(plan_of):
    plan = plan_of(grid={"sae.k": [8, 16]}, stages=["harvest", "train", "evaluate", "report"])
    lines = dry_run(plan, Options(executor="debug"))
    assert "6 stages, 6 to run" in lines
    assert ["report", plan.name, "to", "run"] in [line.split() for line in lines]
    assert "0 of 6 stages done" in status_lines(plan, 200)[0][0]


def test_what_another_process_works_on_runs(plan):
    train = next(stage for stage in plan.stages if stage.kind == "train")
    with locks.hold(train.lock, "train"):
        assert states(plan)[train.label] == "running"


def test_counts_name_only_states_that_occur(plan):
    standings = {stage.key: Record("done") for stage in plan.stages}
    assert [line.split() for line in counts(plan.stages, standings)] == [
        ["stage", "done"],
        ["harvest", "1/1"],
        ["train", "2/2"],
        ["evaluate", "2/2"],
    ]
    standings[plan.stages[1].key] = Record("preempted")
    assert [line.split() for line in counts(plan.stages, standings)][::2] == [
        ["stage", "done", "preempted"],
        ["train", "1/2", "1"],
    ]


def test_a_running_point_shows_how_far_and_how_fast(plan):
    train = next(stage for stage in plan.stages if stage.kind == "train")
    progress = {"stage": train.label, "done": 400, "total": 2000, "unit": "steps", "rate": 4.0}
    files.write_json(train.progress, {**progress, "message": "tokens/s 16384 loss 0.3", "time": time.time()})
    standings = {stage.key: Record("waiting") for stage in plan.stages}
    standings[train.key] = Record("running", "n7", time.time() - 100)
    row = next(line for line in point_rows(plan, plan.stages, standings, 200) if line.startswith(train.subject))
    assert row.split() == [train.subject, "train", "running", "n7", "1:40", "400/2000", "steps", "16.4k", "tokens/s"]


@pytest.mark.parametrize("state", ["running", "failed", "done"])
def test_a_point_that_has_begun_shows_what_of_each_split_lives_its_activity_and_what_it_explains(plan, state):
    point = plan.points[0]
    standings = {stage.key: Record("waiting") for stage in plan.stages}
    for stage in plan.stages:
        if stage.points == (point.name,):
            standings[stage.key] = Record(state)
    metrics = plan.run(point).metrics
    metrics.parent.mkdir(parents=True)
    old = {"step": 1, "tokens": 1, "alive_0": 0.9, "alive_1": 0.8}
    new = {**old, "share_0": 0.214, "share_1": 0.786, "fve_0": 0.1, "fve_1": 0.2}
    lines = [new, {**new, "alive_0": 0.35, "fve_0": 0.09, "fve_1": 0.704}]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"alive_0": 1.0, "al')

    def told() -> list[str]:
        header, *rows = point_rows(plan, plan.stages, standings, 200)
        return [header, *(next(row for row in rows if row.startswith(each.name)) for each in plan.points)]

    header, row, other = told()
    assert header.split()[-6:] == ["alive", "H/L", "share", "H/L", "FVE", "H/L"]
    assert row.split()[-3:] == ["0.35/0.80", "0.21/0.79", "0.09/0.70"]
    assert "/" not in other
    metrics.write_text(json.dumps(old) + "\n")  # as an older version left it
    header, row, _ = told()
    assert header.split()[-2:] == ["alive", "H/L"]
    assert row.split()[-1] == "0.90/0.80"


def test_a_dictionary_without_splits_shows_its_own_numbers(plan_of):
    plan = plan_of(grid={"sae.kind": ["batch_topk"]})
    metrics = plan.run(plan.points[0]).metrics
    metrics.parent.mkdir(parents=True)
    metrics.write_text(json.dumps({"step": 0, "tokens": 1, "alive_0": 0.97, "fve": 0.8}) + "\n")
    standings = {stage.key: Record("done") for stage in plan.stages}
    assert point_rows(plan, plan.stages, standings, 200)[1].split()[-2:] == ["0.97", "0.80"]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_lines_fit_the_terminal_and_names_are_never_cut(plan_of, width):
    seeds, rules = [0, 1], ["previous", "within:8"]
    grid = {"training.pair_rule": rules, "objective.temporal_alpha": [0.1, 0.25], "training.seed": seeds}
    plan = plan_of(grid=grid)
    standings = {stage.key: Record("running", "node-0017", time.time() - 90000) for stage in plan.stages}
    lines = point_rows(plan, plan.stages, standings, width)
    assert all(len(line) <= width for line in lines)
    assert all(any(line.startswith(point.name) for line in lines) for point in plan.points)


def test_of_many_points_those_that_need_a_look_come_first_and_the_rest_is_counted(plan_of):
    plan = plan_of(grid={"sae.k": list(range(1, 101))})
    standings = {stage.key: Record("done") for stage in plan.stages}
    last = [stage for stage in plan.stages if stage.kind == "train"][-1]
    standings[last.key] = Record("failed", error="it broke")
    lines = point_rows(plan, plan.stages, standings, 100)
    assert lines[1].startswith(last.subject)
    assert lines[-1] == "... and 60 more: 60 done (--all shows them)"
    assert len(point_rows(plan, plan.stages, standings, 100, everything=True)) > 100


def test_logs_are_shown_from_their_end(plan, tmp_path):
    train, other = (stage for stage in plan.stages if stage.kind == "train")
    log = tmp_path / "a.log"
    log.write_text("\n".join(f"line {number}" for number in range(100)))
    lines = log_texts([train, other], {train.key: Record("failed", log=str(log)), other.key: Record("waiting")})
    assert lines[0] == f"== {train.label}: failed; the end of {log}"
    assert lines[-2:] == ["line 99", f"== {other.label}: waiting, no log"]


def test_progress_of_an_earlier_attempt_is_not_shown(plan):
    train = next(stage for stage in plan.stages if stage.kind == "train")
    train.progress.parent.mkdir(parents=True)
    train.progress.write_text(json.dumps({"stage": train.label, "done": 1, "total": 2, "unit": "steps", "time": 5.0}))
    standings = {stage.key: Record("running", started=time.time()) for stage in plan.stages}
    assert not any("steps" in line for line in point_rows(plan, plan.stages, standings, 200))


def test_slurm_s_times_are_understood():
    assert [seconds(text) for text in ("0:07", "3:04", "2:03:04", "1-02:03:04", "INVALID")] == [
        7,
        184,
        7384,
        93784,
        0,
    ]


def test_a_watch_draws_the_loss_and_the_variance_explained(plan, attempt):
    (stage, *_) = (stage for stage in plan.stages if stage.kind == "train")
    run = plan.run(next(point for point in plan.points if point.name in stage.points))
    run.path.mkdir(parents=True)
    lines = [{"step": step, "tokens": step + 1, "loss": 9.0 - step, "fve": 0.1 * step} for step in range(8)]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert curves(run.metrics) == ("█▇▆▅▄▃▂▁ 2", "▁▂▃▄▅▆▇█ 0.7")
    queue_says(attempt, (stage, Record("running", started=time.time())))
    with locks.hold(lock_of(attempt), "queue"):
        watched, plain = ("\n".join(status_lines(plan, 200, watch=watch)[0]) for watch in (True, False))
    assert "█▇▆▅▄▃▂▁ 2" in watched
    assert "▁▂▃▄▅▆▇█ 0.7" in watched
    assert "█" not in plain
    assert curves(plan.folder / "nothing") == ("", "")


def test_a_sparkline_has_the_means_of_neighbours():
    assert sparkline([0.0, 2.0, 7.0, 9.0], width=2) == "▁█"
    assert sparkline([1.0, 1.0]) == "▄▄"
    assert sparkline(list(range(1000))) == "▁▂▂▃▄▄▅▅▆▇▇█"
    assert sparkline([]) == ""
