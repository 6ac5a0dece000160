"""The flags that the experiments share: what is not there is refused in one line before anything is measured."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tsae import cli
from tsae.experiments.request import arguments_of
from tsae.lm.hook import hidden_of
from tsae.lm.model import load_language_model
from tsae.runtime import metadata


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--run_name", "temporl"], "did you mean 'temporal'? runs found: "),
        (["--run_name", "temporal", "--checkpoint", "7"], "ae_7.pt: no such weights"),
        (["--run_name", "batch_topk", "--chunk", "0"], "--chunk 0: BatchTopKSAE has one group of latents"),
        (["--run_name", "temporal", "--layer", "0"], "--layer 0"),
        (["--run_name", "baseline_model", "--chunk", "0"], "baseline_model has no splits"),
        (["--run_name", "temporal", "sae.k=2"], "sae.k: was decided when the run was trained"),
        (["temporal", "sae.k=2"], "sae.k: was decided when the run was trained"),
        (["--chunk", "0", "batch_topk"], "--chunk 0: BatchTopKSAE has one group of latents"),
        (["temporl", "--protocol", "reference"], "did you mean 'temporal'? runs found: "),
        (["--protocol", "reference"], "probe: which run? Its name or folder is expected: tsae probe RUN"),
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


@pytest.fixture
def theirs(checkpoints: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes the folder of a run `theirs` that holds what other programs write; arguments replace what it tells."""

    def make(**told: object) -> Path:
        folder = tmp_path / "theirs" / "trainer_0"
        folder.mkdir(parents=True)
        shutil.copy(checkpoints / "temporal" / "trainer_0" / "ae.pt", folder)
        written = json.loads((checkpoints / "temporal" / "trainer_0" / "config.json").read_text())
        metadata.write(folder / "config.json", {**written, "trainer": {**written["trainer"], **told}})
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("told", "flags", "words"),
    [
        ({}, ["--layer", "0"], "--layer 0: "),
        ({}, ["--layer", "0"], "was trained on layer 1; leave --layer out"),
        ({"submodule_name": None}, ["--layer", "0"], "was trained on layer 1; leave --layer out"),
        ({"submodule_name": None}, ["--model", "gpt2"], "leave --model out"),
        (
            {"submodule_name": "blocks.1.hook_mlp_out"},
            ["--layer", "1"],
            "was trained on module gpt_neox.layers.1.mlp; leave --layer out",
        ),
        ({"submodule_name": None, "layer": None}, [], "does not tell the layer; give --layer"),
        ({"lm_name": None}, [], "does not tell the model; give --model"),
        ({}, ["model.hook_point=gpt_neox.layers.1.mlp"], "model.hook_point: was decided when the run was trained"),
    ],
)
def test_a_place_that_a_run_from_elsewhere_contradicts_is_refused(
    theirs: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    told: dict[str, object],
    flags: list[str],
    words: str,
) -> None:
    assert cli.main(["features", "--run_name", "theirs", "--checkpoints_path", str(theirs(**told)), *flags]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("told", "flags", "path"),
    [
        ({"submodule_name": None}, [], "gpt_neox.layers.1"),
        ({"submodule_name": None, "layer": None}, ["--layer", "2"], "gpt_neox.layers.2"),
        ({"submodule_name": "resid_post_layer_0", "layer": 0}, ["--layer", "0"], "gpt_neox.layers.0"),
        ({"submodule_name": "blocks.1.hook_mlp_out", "layer": None}, [], "gpt_neox.layers.1.mlp"),
        ({"submodule_name": "blocks.0.hook_resid_pre", "layer": None}, [], "gpt_neox.embed_in"),
    ],
)
def test_a_run_from_elsewhere_is_read_where_its_file_says(
    theirs: Callable[..., Path], told: dict[str, object], flags: list[str], path: str
) -> None:
    options = argparse.Namespace(run_name="theirs", checkpoints_path=theirs(**told), model=None, layer=None, out=None)
    options.overrides, options.dataset, options.checkpoint = ["model.device=cpu"], None, None
    options.layer = int(flags[1]) if flags else None
    config = arguments_of("probe", options)["config"]
    tokens, seen = torch.arange(2, 12).reshape(2, 5), list[torch.Tensor]()
    lm = load_language_model(config.model)
    lm.module.get_submodule(path).register_forward_hook(lambda *call: seen.append(hidden_of(call[-1])))
    read = lm.read(tokens, torch.tensor([5, 5]))
    lm.logits(tokens, torch.tensor([5, 5]))
    assert torch.equal(read, seen[-1])


def test_latents_of_a_run_from_elsewhere_are_its_dictionarys(
    theirs: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its settings tell no size: the default of a training must not decide which latents there are."""
    options = argparse.Namespace(run_name="theirs", checkpoints_path=theirs(), model=None, layer=None, out=None)
    options.overrides, options.dataset, options.checkpoint = ["experiments.sequences.latents=[50000]"], None, None
    assert arguments_of("sequences", options)["config"].experiments.sequences.latents == (50000,)
    words = ["theirs", "--checkpoints_path", str(options.checkpoints_path), "experiments.sequences.latents=[64]"]
    assert cli.main(["sequences", *words]) == 2
    assert "latents are counted from 0 to 63" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["probe", "tsne"])
def test_texts_without_a_tagger_are_refused_before_they_are_harvested(
    command: str,
    checkpoints: Path,
    labelled_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TSAE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "spacy", None)
    flags = ["--run_name", "temporal", "--checkpoints_path", str(checkpoints), "--dataset", str(labelled_text)]
    assert cli.main([command, *flags]) == 2
    assert f"set experiments.{command}.tagger=surface" in capsys.readouterr().err
    assert not (tmp_path / "stores").exists()
