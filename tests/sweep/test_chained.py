"""`resources: {chain: true}`: what follows a training follows in its process, and comes to the same bytes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tsae.cli import main
from tsae.experiments import driver
from tsae.runtime import kept
from tsae.runtime.errors import TsaeError
from tsae.runtime.state import Record
from tsae.sweep import sweepfile
from tsae.sweep.plan import Plan

STAGES = ["harvest", "train", "evaluate", "sequences", "features", "report"]


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
    sections = {"base": "synthetic", "grid": {"sae.k": [4, 5]}, "resources": {"chain": True}, "stages": STAGES}
    plan = plan_of(**sections)
    harvest, *trainings = plan.unfinished()
    assert harvest.kind == "harvest"
    assert [stage.kind for stage in trainings] == ["train", "train"]
    for training in trainings:
        assert [stage.kind for stage in training.then] == ["evaluate", "sequences", "features"]
        assert training.depends_on == (harvest.key,)
        assert training.label == f"train {training.subject}, then evaluate, sequences, features"
    report = plan.report()
    assert report is not None
    assert {training.key for training in trainings} <= set(report.depends_on)
    apart = plan_of(**{**sections, "resources": {}})
    assert [stage.kind for stage in apart.unfinished()] == [
        "harvest",
        *(kind for kind in STAGES[1:-1] for _ in range(2)),
    ]


def test_one_that_fails_keeps_no_other_from_being_done_and_is_tried_alone(
    sweep_file: Callable[..., Path],
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(kept, "_kept", None)  # this process goes on to other tests
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


def test_a_process_that_keeps_things_makes_them_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_kept", None)
    make: Callable[[], object] = object
    assert kept.kept("model", 1, make) is not kept.kept("model", 1, make)
    kept.keep()
    first = kept.kept("model", 1, make)
    assert kept.kept("model", 1, make) is first
    other = kept.kept("model", 2, make)
    assert other is not first
    assert kept.kept("model", 1, make) is not first  # one at a time
