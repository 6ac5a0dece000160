"""Every command that measures a run takes anybody's: ours, an imported one, the authors'; also where nothing may be written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tsae import cli
from tsae.checkpoint import RunFolder, load_dictionary, save_dictionary
from tsae.interop.settings import settings_of


@pytest.fixture
def trained(home: Path, tiny_model: Path, text: Path, tmp_path: Path) -> Path:
    """The folder of a run of ours, named small."""
    tree: dict[str, Any] = {
        "model": {"name": str(tiny_model), "layer": 1, "device": "cpu"},
        "data": {"source": str(text), "context_length": 24, "min_length": 8, "holdout": 0.3},
        "sae": {"dict_size": 96, "k": 4},
        "training": {"steps": 40, "batch_size": 64, "device": "cpu", "lr": 3e-3},
        "evaluation": {"sequences": 16, "loss_sequences": 4},
        "experiments": {"features": {"sequences": 32}, "explain": {"sequences": 32, "window": 8}},
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(tree))
    assert cli.main(["train", "small.yaml"]) == 0
    return home / "checkpoints" / "small"


@pytest.fixture
def theirs(trained: Path, tmp_path: Path) -> Path:
    """The same dictionary as the authors' scripts leave one: weights never calibrated, and their config.json."""
    folder = tmp_path / "theirs" / "trainer_3"
    folder.mkdir(parents=True)
    dictionary, config = load_dictionary(trained)
    dictionary.threshold.fill_(-1)
    save_dictionary(folder / "ae.pt", dictionary)
    keys = (
        "dict_class",
        "trainer_class",
        "activation_dim",
        "dict_size",
        "k",
        "group_fractions",
        "group_weights",
        "lm_name",
    )
    trainer = {key: config["trainer"][key] for key in keys if key in config["trainer"]}
    trainer |= {"layer": 1, "submodule_name": None}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 24}}))
    return folder


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert cli.main(list(words)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


def test_our_run_is_evaluated_by_its_name_its_folder_and_its_resolved_file(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = trained / "trainer_0" / "eval_results.json"
    assert cli.main(["evaluate", "small"]) == 0
    first = results.read_bytes()
    for named in (str(trained), str(trained / "trainer_0"), str(trained / "trainer_0" / "resolved.yaml")):
        assert cli.main(["evaluate", named]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == str(results.parent)
    assert results.read_bytes() == first
    assert cli.main(["evaluate", "small", "evaluation.sequences=4"]) == 0
    assert json.loads(results.read_text())["contexts"] == 4
    assert "did you mean 'small'? runs found: small" in refused(capsys, "evaluate", "smal")
    assert "sae.k: was decided when the run was trained" in refused(capsys, "evaluate", "small", "sae.k=3")
    assert not (trained.parent / "resolved").exists()


def test_the_authors_run_is_calibrated_and_measured_on_a_store_of_its_own(
    theirs: Path, text: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = f"data.source={text}"
    said = refused(capsys, "evaluate", str(theirs), source)
    assert "never calibrated" in said
    assert "tsae calibrate RUN" in said
    stores = set((home / "stores").iterdir())
    assert cli.main(["calibrate", str(theirs), source, "data.min_length=8", "--target-l0", "4"]) == 0
    [store] = set((home / "stores").iterdir()) - stores
    settings = json.loads((store / "zarr.json").read_text())["attributes"]["settings"]
    assert (settings["model"]["layer"], settings["data"]["context_length"]) == (1, 24)
    own = [source, "data.min_length=8", "model.device=cpu"]
    assert cli.main(["evaluate", str(theirs), *own, "evaluation.loss_sequences=4"]) == 0
    results = json.loads((theirs / "eval_results.json").read_text())
    assert results["l0"] == pytest.approx(4, abs=0.5)
    before = (theirs / "eval_results.json").stat().st_mtime_ns
    assert cli.main(["evaluate", str(theirs), *own, "evaluation.loss_sequences=4"]) == 0
    assert (theirs / "eval_results.json").stat().st_mtime_ns == before
    for command in ("features", "explain"):
        words = [command, "--run-name", str(theirs), *own, f"experiments.{command}.sequences=32"]
        assert cli.main([*words, *(["experiments.explain.window=8"] if command == "explain" else [])]) == 0
        assert (theirs / {"features": "features.html", "explain": "explanations.json"}[command]).exists()
    # A store that is there is named: its own settings hold.
    named = f"store.path={store}"
    assert cli.main(["evaluate", str(theirs), named, "evaluation.sequences=4"]) == 0
    assert json.loads((theirs / "eval_results.json").read_text())["contexts"] == 4
    assert "--layer 0" in refused(capsys, "features", "--run-name", str(theirs), "--layer", "0")
    assert "training.lr: was decided" in refused(capsys, "evaluate", str(theirs), "training.lr=1")


def test_a_store_of_another_layer_is_no_store_of_the_run(
    theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["harvest", "small.yaml", "model.layer=0", "store.path=layer0"]) == 0
    said = refused(capsys, "calibrate", str(theirs), "store.path=layer0")
    assert f"{tmp_path}/layer0: holds layer 0, {theirs} was trained on layer 1" in said


def test_an_imported_run_is_measured(trained: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", str(trained), "--format", "sae_lens", "--out", "lens"]) == 0
    assert cli.main(["import", "lens", "--out", "imported"]) == 0
    own = [f"data.source={text}", "data.min_length=8"]
    assert cli.main(["evaluate", "imported", *own]) == 0
    assert cli.main(["features", "--run_name", "imported", "--checkpoints-path", ".", *own]) == 0
    assert Path("imported/trainer_0/features.html").exists()
    assert cli.main(["calibrate", "imported", *own, "--target-l0", "3"]) == 0
    assert "L0 3," in capsys.readouterr().out


def test_without_a_text_the_embedded_corpus_is_read(theirs: Path) -> None:
    data = settings_of(RunFolder(theirs)).data
    assert (data.source, data.context_length, data.max_tokens, data.holdout) == ("embedded", 24, 500_000, 0.5)


READ_ONLY = "mount --bind {0} {0} && mount -o remount,ro,bind {0} && "


@pytest.fixture
def read_only(require: Callable[..., None], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`read_only(folder, words)` gives a command where nothing may be written below `folder`."""
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    place = tmp_path / "mounted"
    place.mkdir()
    able = (
        shutil.which("unshare")
        and not subprocess.run(
            [*inside, READ_ONLY.format(place) + "! touch " + str(place / "x")], check=False, capture_output=True
        ).returncode
    )
    require("unshare", bool(able), "Linux that lets users make namespaces")

    def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
        command = " ".join([READ_ONLY.format(folder), sys.executable, "-m", "tsae.cli", *words])
        return subprocess.run([*inside, command], env=os.environ, capture_output=True, text=True, check=False)

    return run


def test_a_run_where_nothing_may_be_written_is_measured_elsewhere(
    trained: Path, read_only: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    before = sorted(path for path in trained.rglob("*"))
    commands = (
        ["evaluate", "small"],
        ["features", "--run-name", "small"],
        ["calibrate", "small", "--target-l0", "5"],
    )
    for words in commands:
        told = read_only(trained, *words)
        assert (told.returncode, told.stderr.count("\n")) == (2, 1), told.stderr
        assert "nothing may be written there; name a folder for the results: --out DIR" in told.stderr
    for words, made in zip(commands, ("eval_results.json", "features.html", "trainer_0/calibration.json"), strict=True):
        out = tmp_path / "out" / words[0]
        done = read_only(trained, *words, "--out", str(out))
        assert done.returncode == 0, done.stderr
        assert (out / made).exists()
        assert not list(out.glob("*.lock"))
    assert sorted(path for path in trained.rglob("*")) == before
    assert (
        RunFolder(tmp_path / "out" / "calibrate" / "trainer_0").load_config()
        == RunFolder.of(trained.parent, "small").load_config()
    )
    # What is complete is found there too.
    assert cli.main(["evaluate", "small"]) == 0
    assert read_only(trained, "evaluate", "small").returncode == 0
    assert cli.main(["features", "--run-name", "small"]) == 0
    assert read_only(trained, "features", "--run-name", "small").returncode == 0


def test_an_unknown_key_of_the_experiment_that_is_run_is_not_passed_over(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resolved = trained / "trainer_0" / "resolved.yaml"
    tree = yaml.safe_load(resolved.read_text())
    tree["experiments"]["probe"]["depth"] = 3
    del tree["digest"]
    resolved.write_text(yaml.safe_dump(tree, sort_keys=False))
    assert "experiments.probe.depth: unknown key" in refused(capsys, "probe", "--run-name", "small")
    assert cli.main(["features", "--run-name", "small"]) == 0
