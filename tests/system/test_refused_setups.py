"""A setup that was refused leaves nothing behind: the corrected command takes the same name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from tsae import cli


@pytest.fixture
def settings(tiny_model: Path, text: Path, tmp_path: Path) -> Path:
    """The YAML of a run of 20 steps."""
    tree: dict[str, Any] = {
        "model": {"name": str(tiny_model), "layer": 1, "device": "cpu"},
        "data": {"source": str(text), "context_length": 32, "min_length": 8, "holdout": 0.2},
        "sae": {"dict_size": 96, "k": 4},
        "training": {"steps": 20, "batch_size": 64, "device": "cpu", "save_steps": [0, 5]},
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def contents(folder: Path) -> list[str]:
    """What lies below TSAE_HOME, but for the hashes of files that were looked at."""
    found = (str(path.relative_to(folder)) for path in folder.rglob("*"))
    return sorted(path for path in found if not path.startswith("contents"))


def test_a_training_that_was_refused_leaves_its_name_free(
    home: Path, settings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["harvest", str(settings)]) == 0
    before = contents(home)
    train = ["train", str(settings), "--run-name", "again"]
    for words, refusal in (
        (["training.batch_size=10000000"], "has only"),
        (["training.processes=2"], "were asked for"),
    ):
        assert cli.main([*train, *words]) == 2
        assert refusal in capsys.readouterr().err
        assert contents(home) == before
    assert cli.main(train) == 0
    assert (home / "checkpoints" / "again" / "trainer_0" / "checkpoints" / "ae_0.pt").exists()


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (["data.context_length=500"], "positions"),
        (["model.hook_point=gpt_neox.layers.9"], "has no module"),
        (["data.min_length=32", "data.context_length=32", "data.max_documents=2"], "at least 2 different documents"),
    ],
)
def test_a_harvest_that_was_refused_leaves_nothing(
    home: Path, settings: Path, words: list[str], refusal: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["harvest", str(settings), "store.path=home/own/store", *words]) == 2
    assert refusal in capsys.readouterr().err
    assert contents(home) == []


def test_a_harvest_that_is_refused_at_its_first_activations_leaves_its_place_free(
    home: Path, settings: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = tmp_path / "large"
    shutil.copytree(tiny_model, large)
    weights = load_file(large / "model.safetensors")
    save_file({name: 1e6 * tensor for name, tensor in weights.items()}, large / "model.safetensors", {"format": "pt"})
    harvest = ["harvest", str(settings), f"model.name={large}", "store.path=home/own/store"]
    assert cli.main([*harvest, "store.dtype=float16"]) == 2
    assert "are not finite" in capsys.readouterr().err
    assert contents(home) == []
    assert cli.main([*harvest, "store.dtype=float32"]) == 0


def test_what_is_asked_of_a_run_that_is_not_there_leaves_no_trace(
    home: Path, settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (
        ["evaluate", str(settings), "--run-name", "nowhere"],
        ["probe", "--run-name", "nowhere"],
        ["export", "nowhere", "--format", "sae_lens", "--out", "home/out/sae"],
        ["import", str(tmp_path), "--out", "home/out/run"],
        ["calibrate", "home/nowhere"],
        ["synthetic", "home/nowhere"],
    ):
        assert cli.main(words) == 2, words
        assert capsys.readouterr().err.count("\n") == 1
        assert contents(home) == [], words


def test_another_configuration_is_told_by_the_settings_that_differ(
    home: Path, settings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", str(settings), f"store.path={home}/store"]) == 0
    for command in ("train", "evaluate"):
        assert cli.main([command, str(settings), f"store.path={home}/store", "training.lr=0.5", "sae.k=3"]) == 2
        said = capsys.readouterr().err
        assert "another configuration (sae.k is 4 there, 3 here; training.lr is none there, 0.5 here)" in said
    assert cli.main(["harvest", str(settings), f"store.path={home}/store", "data.seed=1", "data.holdout=0.3"]) == 2
    assert "(data.holdout is 0.2 there, 0.3 here; data.seed is 0 there, 1 here)" in capsys.readouterr().err
