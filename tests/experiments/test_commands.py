"""The flags that the experiments share: what is not there is refused in one line before anything is measured."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tsae import cli


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--run_name", "temporl"], "did you mean 'temporal'? runs found: "),
        (["--run_name", "temporal", "--checkpoint", "7"], "ae_7.pt: no such weights"),
        (["--run_name", "batch_topk", "--chunk", "0"], "--chunk 0: BatchTopKSAE has one group of latents"),
        (["--run_name", "temporal", "--layer", "0"], "--layer 0"),
        (["--run_name", "baseline_model", "--chunk", "0"], "baseline_model has no splits"),
        (["--run_name", "temporal", "sae.k=2"], "sae.k: was decided when the run was trained"),
    ],
)
def test_what_is_not_there_is_refused_before_anything_is_measured(
    checkpoints: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    before = set(checkpoints.rglob("[!.]*"))
    assert cli.main(["probe", "--checkpoints_path", str(checkpoints), *flags]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert set(checkpoints.rglob("[!.]*")) == before


def test_explanations_that_are_not_there_are_refused(checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--run_name", "temporal", "--checkpoints_path", str(checkpoints), "--explanation_path", "nowhere.json"]
    for command in ("sequences", "align", "steer", "features"):
        assert cli.main([command, *flags]) == 2
        assert (
            capsys.readouterr().err
            == "tsae: nowhere.json: no such file; an explanations.json or a result of SAEBench is expected\n"
        )


def test_a_layer_that_a_run_from_elsewhere_contradicts_is_refused(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "theirs" / "trainer_0"
    folder.mkdir(parents=True)
    for name in ("config.json", "ae.pt"):
        shutil.copy(checkpoints / "temporal" / "trainer_0" / name, folder)
    flags = ["--run_name", "theirs", "--checkpoints_path", str(tmp_path), "--layer", "0"]
    assert cli.main(["features", *flags]) == 2
    assert "was trained on layer 1; leave --layer out" in capsys.readouterr().err
