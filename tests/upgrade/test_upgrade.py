"""What a user has on disk from before an upgrade goes on working.

before_3195aa1.tar.xz was made by commit 3195aa1: a store, a sweep with two complete points and one whose training was
killed at step 45 of 60 (its last resumable state is of step 40), the text that they read, and the weights and results
that the third point ended with when it was not killed.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tsae.cli import main

ARCHIVE = Path(__file__).with_name("before_3195aa1.tar.xz")
SWEEP_FOLDER = "home/sweeps/before-base"


@pytest.fixture
def before(tmp_path: Path) -> Path:
    """The folder of that user, in which commands are given."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


class Done(NamedTuple):
    """How a command ended, and what it said."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def tsae(before: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Give a `tsae` command in that folder."""
    monkeypatch.chdir(before)
    monkeypatch.setenv("TSAE_HOME", "home")

    def give(*words: str) -> Done:
        capsys.readouterr()
        return Done(main(list(words)), *capsys.readouterr())

    return give


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_sweep_from_before_is_continued_where_it_was(before: Path, tsae: Callable[..., Done]) -> None:
    run = before / "home/checkpoints/before-base"
    complete = {name: contents(run / name) for name in ("k=4", "k=8")}
    store = contents(before / "home/stores")
    # A training that began anew would write this line again.
    metrics = run / "k=16/trainer_0/metrics.jsonl"
    first = metrics.read_text().splitlines()[1]
    marked = first[:-2] + str((int(first[-2]) + 1) % 10) + first[-1]
    metrics.write_text(metrics.read_text().replace(first, marked))
    planned = tsae("sweep", "before.yaml", "--dry-run").stdout
    # Nothing is harvested or trained again; what older results were made from was not recorded, so they are made again.
    assert "8 stages, 5 to run" in planned
    assert "train     k=4                           1       complete" in planned
    done = tsae("sweep", "before.yaml", "--executor", "debug")
    assert done.returncode == 0, done.stderr
    assert marked in metrics.read_text()
    # Bit-identical where the processor is the one that made the recording; elsewhere products are rounded differently.
    [made, expected] = (
        torch.load(path, weights_only=True) for path in (run / "k=16/trainer_0/ae.pt", before / "expected_k16.pt")
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(made[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    results, wanted = (
        json.loads(path.read_text())
        for path in (run / "k=16/trainer_0/eval_results.json", before / "expected_k16.json")
    )
    assert results["frac_variance_explained"] == pytest.approx(wanted["frac_variance_explained"], abs=1e-3)
    assert results["config_hash"] == wanted["config_hash"]
    for name, files in complete.items():
        kept = contents(run / name)
        measured = {path for path in files if "eval_results" in path or "progress" in path}
        assert {path: kept[path] for path in files if path not in measured} == {
            path: content for path, content in files.items() if path not in measured
        }
        [path] = (path for path in measured if path.endswith("results.json"))
        was, now = json.loads(files[path]), json.loads(kept[path])
        assert now["frac_variance_explained"] == pytest.approx(was["frac_variance_explained"], rel=1e-3)
        assert now["made_from"]["settings"] == was["config_hash"]
    assert contents(before / "home/stores") == store
    assert (before / SWEEP_FOLDER / "report/report.html").exists()
    assert "nothing to do" in tsae("sweep", "before.yaml").stderr


def test_a_folder_from_before_names_its_sweep_whatever_became_of_the_file(
    before: Path, tsae: Callable[..., Done]
) -> None:
    (before / "before.yaml").write_text("name: before\ngrid: {sae.k: [99]}\n")
    said = tsae("status", SWEEP_FOLDER)
    assert said.returncode == 0, said.stderr
    assert "before-base: 3 points, 3 of 8 stages done" in said.stdout
    (before / "before.yaml").unlink()
    assert "k=16" in tsae("report", SWEEP_FOLDER).stdout
    assert "3 complete" in tsae("sweep", SWEEP_FOLDER, "--executor", "debug").stderr


def test_runs_from_before_are_listed_and_measured_again(before: Path, tsae: Callable[..., Done]) -> None:
    listed = tsae("runs").stdout
    assert [line.split()[:2] for line in listed.splitlines()[2:5]] == [
        ["k=16", "temporal"],
        ["k=4", "temporal"],
        ["k=8", "temporal"],
    ]
    assert "40/60" in listed
    assert "interrupted" in listed
    results = before / "home/checkpoints/before-base/k=8/trainer_0/eval_results.json"
    measured = json.loads(results.read_text())
    results.unlink()
    config = str(before / "home/sweeps/before-base/attempts/20261128-055606/points/k=8.yaml")
    done = tsae("evaluate", config, "--checkpoints-path", "home/checkpoints/before-base", "--run-name", "k=8")
    assert done.returncode == 0, done.stderr
    again = json.loads(results.read_text())
    for name, value in measured.items():
        if isinstance(value, float):
            assert again[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    assert again["config_hash"] == measured["config_hash"]


def test_a_run_from_before_is_not_measured_on_a_store_that_holds_out_other_documents(
    before: Path, tsae: Callable[..., Done]
) -> None:
    shutil.rmtree(before / "home/stores")
    config = str(before / "home/sweeps/before-base/attempts/20261128-055606/points/k=8.yaml")
    assert tsae("harvest", config).returncode == 0
    run = ("--checkpoints-path", "home/checkpoints/before-base", "--run-name", "k=8")
    done = tsae("evaluate", config, *run)
    assert done.returncode == 2
    assert "was harvested anew, with other text or other held-out documents" in done.stderr
    accepted = tsae("evaluate", config, *run, "--accept-new-data")
    assert accepted.returncode == 0, accepted.stderr
