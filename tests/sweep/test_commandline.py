"""What names a sweep on a command line: its YAML, the name of a shipped one, or its folder."""

from __future__ import annotations

import json
import os

import pytest

from tsae.cli import main
from tsae.sweep.commandline import load_folder
from tsae.sweep.plan import BASE_FILE, LAUNCH_FILE, SWEEP_FILE, make_plan
from tsae.sweep.sweepfile import load_sweep


@pytest.fixture
def launched(write_sweep):
    """The folder of a sweep with overrides that was launched once; nothing of it has run."""
    path = write_sweep(file="little", grid={"sae.k": [4, 8]})
    plan = make_plan(load_sweep(path, "embedded", ["training.steps=700"]))
    attempt = plan.folder / "attempts" / "20260101-000000"
    attempt.mkdir(parents=True)
    for name, text in plan.sources().items():
        (attempt / name).write_text(text)
    path.unlink()
    return plan.folder


def test_a_folder_names_the_sweep_as_it_was_launched(launched, monkeypatch, tmp_path):
    monkeypatch.setenv("TSAE_HOME", str(tmp_path / "elsewhere"))
    sweep = load_folder(launched)
    plan = make_plan(sweep)
    assert [point.config.training.steps for point in plan.points] == [700, 700]
    assert [point.name for point in plan.points] == ["k=4", "k=8"]
    assert plan.folder == launched
    assert os.environ["TSAE_HOME"] == str(launched.parents[1])


def test_before_overrides_were_recorded_the_command_tells_them(launched):
    attempt = launched / "attempts" / "20260101-000000"
    (attempt / LAUNCH_FILE).unlink()
    command = ["launch/sweep.py", "little.yaml", "--base", "embedded", "training.steps=700", "--executor", "debug"]
    (attempt / "provenance.json").write_text(json.dumps({"command": command}))
    assert load_folder(launched).overrides == ("training.steps=700",)
    assert {path.name for path in attempt.iterdir()} == {SWEEP_FILE, BASE_FILE, "provenance.json"}


def test_every_command_takes_a_folder(launched, capsys):
    assert main(["status", str(launched)]) == 0
    assert main(["claims", str(launched)]) == 2  # sae.k varies
    assert main(["report", str(launched)]) == 2  # nothing has run
    assert "nothing to report yet" in capsys.readouterr().err
    assert main(["sweep", str(launched), "--dry-run"]) == 0
    assert main(["cancel", str(launched)]) == 0
    assert "nothing is running or queued" in capsys.readouterr().out


def test_a_folder_below_the_home_goes_by_its_name_and_a_near_one_is_told(launched, capsys):
    assert main(["status", launched.name]) == 0
    assert "k=4" in capsys.readouterr().out
    assert main(["status", launched.name[:-1]]) == 2
    assert f"did you mean '{launched.name}'?" in capsys.readouterr().err


@pytest.mark.parametrize("more", ["training.steps=3", "--name=other", "--base=embedded"])
def test_a_folder_keeps_its_settings(launched, capsys, more):
    assert main(["status", str(launched), more]) == 2
    assert "a sweep's folder keeps its settings" in capsys.readouterr().err


def test_a_shipped_sweep_is_named_from_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "split_fraction", "--dry-run"]) == 0
    assert "split_fraction-embedded: 4 points" in capsys.readouterr().out
    (tmp_path / "split_fraction").mkdir()  # a folder of that name hides it, and is no sweep's
    assert main(["sweep", "split_fraction", "--dry-run"]) == 2
    assert "a folder without attempts/" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../other", "", "..", "a/b"])
def test_a_name_that_is_no_folder_name_is_refused(name, capsys):
    assert main(["sweep", "split_fraction", "--name", name, "--dry-run"]) == 2
    assert capsys.readouterr().err.startswith(
        f"tsae: --name {name!r}: a folder name below TSAE_HOME/sweeps is expected"
    )


def test_runs_without_any_is_one_line(home, capsys):
    assert main(["runs"]) == 2
    said = capsys.readouterr().err
    assert said == f"tsae: {home}: no runs and no sweeps; TSAE_HOME names the folder that holds them (default ./runs)\n"


def test_claims_without_a_sweep_are_the_shipped_ones_on_any_base(tiny_model, text, home, capsys):
    own = [f"model.name={tiny_model}", f"data.source={text}", "model.layer=1", f"experiments.probe.dataset={text}"]
    own += ["experiments.probe.tagger=surface"]
    for words in (["--base", "smollm2-135m", *own], [*own, "--base", "smollm2-135m"]):
        assert main(["claims", *words, "--dry-run"]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith("claims-smollm2-135m,model.name=")
        assert ": 15 points" in shown
        assert "harvest   tiny-neox-layer1-" in shown
        assert "kind=temporal,seed=4 " in shown
    assert main(["claims", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("claims-embedded: 15 points")
    assert not list(home.glob("sweeps/*"))


def test_an_empty_base_is_not_the_sweeps_own(capsys):
    assert main(["sweep", "claims", "--base", "", "--dry-run"]) == 2
    assert capsys.readouterr().err.startswith("tsae: --base: there is no base ''; allowed: embedded")


@pytest.mark.parametrize("words", [[], ["claims"]])
def test_claims_on_an_unknown_base_name_the_nearest(capsys, words):
    assert main(["claims", *words, "--base", "smolm2-135m"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "tsae: --base: there is no base 'smolm2-135m'; did you mean 'smollm2-135m'? allowed: embedded"
    )
    assert error.count("\n") == 1


def test_an_override_alone_is_no_sweep(capsys):
    assert main(["sweep", "sae.k=4"]) == 2
    assert "SWEEP: the sweep's YAML is missing" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
@pytest.mark.parametrize("stage", ["probe", "tsne"])
def test_a_tagger_that_is_not_here_is_refused_before_anything_is_trained(write_sweep, home, capsys, stage, more):
    path = write_sweep(grid={"sae.k": [4]}, stages=["harvest", "train", stage])
    asked = f"experiments.{stage}.tagger=spacy:xx_nothing_sm"
    assert main(["sweep", str(path), "--base=embedded", asked, *more]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert told[0].startswith(f"tsae: experiments.{stage}.tagger: ")
    assert not (home / "sweeps").exists() or not list(home.glob("sweeps/*/attempts/*"))
