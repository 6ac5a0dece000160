"""What commands say last: the numbers with their intervals and the pages, on stderr; stdout holds paths alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.experiments.conftest import checkpoints, experiment_home, labelled_text, run_config
from tsae import cli
from tsae.report.headline import of_experiment

__all__ = ["checkpoints", "experiment_home", "labelled_text", "run_config"]


@pytest.fixture
def run(checkpoints: Path, experiment_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TSAE_HOME", str(experiment_home))
    shutil.copytree(checkpoints / "temporal", tmp_path / "temporal")
    return tmp_path / "temporal" / "trainer_0"


def test_evaluate_prints_a_small_table_beside_the_path(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # measured now, and complete already
        assert cli.main(["evaluate", str(run.parent)]) == 0
        printed = capsys.readouterr()
        assert printed.out == f"{run}\n"
        results = json.loads((run / "eval_results.json").read_text())
        rows = {line[:17].strip(): line[17:].split() for line in printed.err.splitlines()}
        value, sign, half, *better = rows["FVE all"]
        assert (float(value), sign, better) == (
            pytest.approx(results["frac_variance_explained"], abs=6e-4),
            "±",
            ["higher", "is", "better"],
        )
        assert float(half) == pytest.approx(results["half_width_95"]["frac_variance_explained"], rel=0.5)
        assert float(rows["Alive"][0]) == pytest.approx(results["frac_alive"], abs=6e-4)
        assert f"picture: {run / 'eval_results.png'}" in printed.err


def test_train_and_harvest_say_what_they_left(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(run / "resolved.yaml")]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{run}\n"
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    (fve,) = (line.split()[1:] for line in printed.err.splitlines() if line.startswith("FVE "))
    assert [float(value) for value in fve] == [pytest.approx(line[key], abs=6e-4) for key in ("fve", "fve_0", "fve_1")]
    assert f"tsae evaluate {run.parent}" in printed.err
    assert cli.main(["harvest", str(run / "resolved.yaml")]) == 0
    printed = capsys.readouterr()
    assert f"Store {printed.out.strip()}: complete" in printed.err


def test_the_splits_of_an_experiment_stand_side_by_side(tmp_path: Path) -> None:
    paths = [tmp_path / f"steering_chunk{chunk}.json" for chunk in (0, 1)]
    for path, split, area in zip(paths, ("high-level", "low-level"), (0.5, 0.25), strict=True):
        results = {"split": split, "headline": {"pareto_area": area}, "half_width_95": {"pareto_area": 0.012}}
        path.write_text(json.dumps(results))
    paths[1].with_suffix(".png").write_bytes(b"")
    picture = f"picture: {paths[1].with_suffix('.png')}"
    assert of_experiment(paths) == [
        "                                high-level      low-level",
        "area under the Pareto front  0.500 ± 0.012  0.250 ± 0.012  higher is better",
        picture,
    ]
    paths[0].write_text(json.dumps({"split": "high-level", "headline": {"pareto_area": None, "lag": 1200.0}}))
    assert of_experiment(paths) == [
        "                             high-level      low-level",
        "lag                                1200              –",
        "area under the Pareto front           –  0.250 ± 0.012  higher is better",
        picture,
    ]
    paths[1].with_suffix(".html").write_text("")
    assert of_experiment(paths)[-1] == f"page: {paths[1].with_suffix('.html')}"
