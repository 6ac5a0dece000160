"""`resources: {chain: true}`: what follows a training follows in its process, and comes to the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tsae.cli import main
from tsae.experiments import driver
from tsae.runtime import files, kept, locks
from tsae.runtime.errors import TsaeError
from tsae.runtime.state import Record, State, state_path
from tsae.sweep import sweepfile
from tsae.sweep.attempt import Attempt, Submitted
from tsae.sweep.dryrun import dry_run
from tsae.sweep.launcher import Options, choose
from tsae.sweep.plan import Plan, make_plan
from tsae.sweep.queue.background import OtherQueues, QueueFile, lock_of, read_queue
from tsae.sweep.queue.runner import Task
from tsae.sweep.schedulers.base import Seen
from tsae.sweep.schedulers.slurm.scheduler import Slurm
from tsae.sweep.stage import Stage
from tsae.sweep.status import status_lines
from tsae.sweep.survey import Survey

STAGES = ["harvest", "train", "evaluate", "sequences", "explain", "report"]


@pytest.fixture
def sweep_file(tmp_path: Path, tiny_model: Path, text: Path) -> Callable[..., Path]:
    """Write a sweep of two points on the tiny language model, whose trainings are packed."""
    base = {
        "model": {"name": str(tiny_model), "layer": 1, "device": "cpu"},
        "data": {"source": str(text), "context_length": 32, "min_length": 8, "holdout": 0.2},
        "sae": {"dict_size": 64, "k": 6},
        "training": {"steps": 40, "batch_size": 64, "lr": 1e-3, "warmup_steps": 5, "resume_every": 10, "device": "cpu"}
        | {"threshold_start_step": 10, "threshold_beta": 0.9, "pool_sequences": 64, "pack": 2},
        "evaluation": {"sequences": 20, "loss_sequences": 4},
    }

    def write(name: str, ks: tuple[int, ...] = (5, 6), **resources: Any) -> Path:
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(base))
        path = tmp_path / f"{name}.yaml"
        settings = {
            "base": "tiny.yaml",
            "grid": {"sae.k": list(ks)},
            "stages": ["harvest", "train", "evaluate", "features"],
        }
        path.write_text(yaml.safe_dump({**settings, "name": "same", "resources": resources}))
        return path

    return write


def launch(path: Path, *more: str) -> str:
    program = [sys.executable, "-m", "tsae.cli", "sweep", str(path), *more]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def results(home: Path) -> dict[str, Any]:
    """Weights and results of all runs, as bytes or without what tells of their making."""
    found: dict[str, Any] = {}
    for path in sorted(home.glob("checkpoints/*/*/trainer_0/*")):
        if path.suffix == ".pt":
            found[f"{path.parent.parent.name} {path.name}"] = path.read_bytes()
        elif path.name in ("eval_results.json", "features.json", "metrics.jsonl"):
            found[f"{path.parent.parent.name} {path.name}"] = path.read_text().replace(str(home), "HOME")
    return found


def records(home: Path) -> dict[str, Record]:
    folders = home.glob("sweeps/*/stages/*")
    return {record.stage: record for folder in folders if (record := Record.of(folder))}


def test_what_follows_in_one_process_comes_to_the_same_bytes(
    sweep_file: Callable[..., Path], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = launch(sweep_file("chained", chain=True))
    assert "then evaluate, features" in said
    found = records(home)
    of_runs = [record for label, record in found.items() if not label.startswith("harvest")]
    assert len(of_runs) == 5  # a training of both, and two of each
    assert {record.state for record in found.values()} == {"done"}
    assert len({record.pid for record in of_runs}) == 1
    assert "nothing to do" in launch(sweep_file("chained", chain=True))
    apart = home.with_name("apart")
    monkeypatch.setenv("TSAE_HOME", str(apart))
    launch(sweep_file("apart"))
    assert len({record.pid for label, record in records(apart).items() if not label.startswith("harvest")}) == 5
    expected = results(apart)
    assert len(expected) > 6
    assert results(home) == expected


def test_a_point_that_is_trained_is_measured_by_a_job_of_its_own(plan_of: Callable[..., Plan]) -> None:
    sections = {"base": "embedded", "grid": {"sae.k": [4, 5]}, "resources": {"chain": True}, "stages": STAGES}
    plan = plan_of(**sections)
    harvest, *trainings = plan.unfinished()
    assert harvest.kind == "harvest"
    assert [stage.kind for stage in trainings] == ["train", "train"]
    for training in trainings:
        # What shows explanations comes after them.
        assert [stage.kind for stage in training.then] == ["evaluate", "explain", "sequences"]
        assert training.depends_on == (harvest.key,)
        assert training.label == f"train {training.subject}, then evaluate, explain, sequences"
    report = plan.report()
    assert report is not None
    assert {one.key for training in trainings for one in training.apart} <= set(report.depends_on)
    apart = plan_of(**{**sections, "resources": {}})
    kinds = ["train", "evaluate", "explain", "sequences"]
    assert [stage.kind for stage in apart.unfinished()] == ["harvest", *(kind for kind in kinds for _ in range(2))]
    lines = dry_run(plan, Options(executor="debug"))
    assert sum(f"in the job of train {training.subject}" in line for line in lines for training in trainings) == 6
    assert "10 stages, 10 to run" in lines
    assert "0 of 10 stages done" in status_lines(plan, 200)[0][0]


@pytest.fixture
def on_slurm(plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Plan, list[Stage]]]:
    """A chain that Slurm has as one job, of which it says what it is told to; the training has begun, and no more."""
    kinds = ["harvest", "train", "evaluate", "sequences"]

    def make(seen: Seen, stages: Sequence[str] = kinds) -> tuple[Plan, list[Stage]]:
        sections = {"base": "embedded", "grid": {"sae.k": [4]}, "resources": {"chain": True}}
        plan = plan_of(**sections, stages=kinds)
        (chain,) = (stage for stage in plan.stages if stage.then)
        attempt = Attempt.begin(plan.folder, {}, {})
        common = {"cluster": None, "submitted": time.time(), "executor": "slurm", "attempt": attempt.stamp}
        attempt.add_jobs(
            Submitted(stage=one.key, label=one.label, job="7_0", log=str(attempt.folder / "log"), **common)  # type: ignore[arg-type]
            for one in chain.apart
        )
        monkeypatch.setattr(Slurm, "queued", lambda *_: {"7_0": seen} if seen.alive else {})
        monkeypatch.setattr(Slurm, "accounted", lambda *_: {"7_0": seen})
        said = {"attempt": attempt.stamp, "host": "node", "started": time.time()}
        files.write_json(state_path(chain.record), {"state": "running", **said})
        return plan_of(**sections, stages=list(stages)), [*chain.apart]

    return make


def test_what_a_dead_job_never_came_to_has_not_failed(on_slurm: Callable[..., tuple[Plan, list[Stage]]]) -> None:
    plan, (train, evaluate, sequences) = on_slurm(Seen(State.FAILED, why="out of memory"))
    files.write_json(state_path(evaluate.record), json.loads(state_path(train.record).read_text()))
    found = Survey(plan).standings([evaluate, sequences])
    assert found[evaluate.key].state == "failed"
    assert found[evaluate.key].error == "out of memory"
    assert found[sequences.key].state == "waiting"


def test_what_a_job_has_not_come_to_yet_is_queued(on_slurm: Callable[..., tuple[Plan, list[Stage]]]) -> None:
    plan, (train, evaluate, sequences) = on_slurm(Seen(State.RUNNING, node="node", since=1.0))
    files.write_json(state_path(evaluate.record), json.loads(state_path(train.record).read_text()))
    found = Survey(plan).standings([evaluate, sequences])
    assert [str(found[stage.key].state) for stage in (evaluate, sequences)] == ["running", "queued"]


def test_a_stage_that_is_added_while_the_job_runs_has_a_job_of_its_own(
    on_slurm: Callable[..., tuple[Plan, list[Stage]]],
) -> None:
    seen = Seen(State.RUNNING, node="node", since=1.0)
    plan, of_job = on_slurm(seen, ["harvest", "train", "evaluate", "sequences", "probe"])
    choice = choose(plan, "slurm", retry_failed=False)
    assert [stage.kind for stage in choice.start] == ["harvest", "probe"]
    (chain,) = choice.left
    assert [stage.key for stage in chain.apart] == [stage.key for stage in of_job]
    assert chain.key in choice.start[1].depends_on


def test_another_launch_leaves_to_a_job_what_follows_in_it(sweep_file: Callable[..., Path], home: Path) -> None:
    del home
    plan = make_plan(sweepfile.load_sweep(sweep_file("one", ks=(5,), chain=True)))
    (chain,) = (stage for stage in plan.stages if stage.then)
    task, attempt = Task(chain), Attempt.begin(plan.folder, {}, {})
    shown = QueueFile(attempt)
    task.status.state = State.RUNNING
    shown.changed(task)
    shown.refresh([task])
    claims = OtherQueues(plan, Attempt(attempt.folder.with_name("other")))
    with locks.hold(lock_of(attempt), "queue"):
        for stage in chain.then:
            claim = claims(stage)
            assert claim is not None
            assert claim.state == "waiting"
    Record(State.FAILED, error="no room").save(chain.then[0].record)
    task.status.state = State.FAILED
    shown.changed(task)
    shown.refresh([task])
    assert [str(read_queue(attempt)[stage.key].state) for stage in chain.then] == ["failed", "interrupted"]


def test_one_that_fails_keeps_no_other_from_being_done_and_is_tried_alone(
    sweep_file: Callable[..., Path],
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = sweep_file("one", ks=(5,), chain=True)
    real = driver.run

    def broken(*_: object) -> list[str]:
        raise TsaeError("no room for a page")

    monkeypatch.setattr(driver, "run", broken)
    assert main(["sweep", str(path), "--executor", "debug"]) == 1
    states = {label.split()[0]: record for label, record in records(home).items()}
    assert {kind: str(record.state) for kind, record in states.items()} == {
        **{"harvest": "done", "train": "failed", "evaluate": "done", "features": "failed"},
    }
    assert states["features"].error == "no room for a page"
    assert states["train"].error == "features k=5: no room for a page"
    assert "no room for a page" in capsys.readouterr().err
    monkeypatch.setattr(driver, "run", real)
    assert main(["sweep", str(path), "--executor", "debug"]) == 1  # only named
    assert "features k=5" in capsys.readouterr().err
    (weights,) = home.glob("checkpoints/*/*/trainer_0/ae.pt")
    before = weights.stat().st_mtime_ns
    assert main(["sweep", str(path), "--executor", "debug", "--retry-failed"]) == 0
    assert weights.stat().st_mtime_ns == before
    assert list(home.glob("checkpoints/*/*/trainer_0/features*"))


def test_several_processes_of_a_training_are_refused(write_sweep: Callable[..., Path]) -> None:
    path = write_sweep(base="synthetic", grid={"sae.k": [5]}, resources={"chain": True, "train": {"gpus": 4}})
    with pytest.raises(TsaeError, match=r"resources\.chain: true is impossible where train asks for 4 processes"):
        sweepfile.load_sweep(path)


def test_a_process_that_keeps_things_makes_them_once() -> None:
    make: Callable[[], object] = object
    assert kept.kept("model", 1, make) is not kept.kept("model", 1, make)
    with kept.keeping(wanted=True):
        first = kept.kept("model", 1, make)
        assert kept.kept("model", 1, make) is first
        other = kept.kept("model", 2, make)
        assert other is not first
        assert kept.kept("model", 1, make) is not first  # one at a time
    assert kept.kept("model", 1, make) is not kept.kept("model", 1, make)
