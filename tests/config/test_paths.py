"""A relative path means the folder of the YAML that has it, and hashes know it as it was written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tsae.checkpoint import RunFolder
from tsae.config import run as configuration
from tsae.config import schema
from tsae.config.paths import Located, restored
from tsae.sweep.cluster import load_cluster
from tsae.sweep.commandline import load_folder
from tsae.sweep.plan import LAUNCH_FILE, make_plan
from tsae.sweep.sweepfile import load_sweep

SETTINGS = {
    "model": {"name": "models/tiny"},
    "data": {"source": "data/a.jsonl"},
    "store": {"path": "stores/own"},
    "experiments": {
        "texts": {"categories": "table.csv"},
        "probe": {"dataset": "data/labelled.jsonl"},
        "tsne": {"dataset": "wikipedia"},
        "sequences": {"texts": ["one.txt", "a text of its own"]},
        "explain": {"answers": {"recorded": "answers", "model": "me/judge"}},
    },
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project's folder with what its run.yaml names."""
    folder = tmp_path / "project"
    for name in ("models/tiny/config.json", "data/a.jsonl", "data/labelled.jsonl", "one.txt", "wikipedia/x", "gpt2/x"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"text": "x"}')
    (folder / "run.yaml").write_text(yaml.safe_dump(SETTINGS))
    return folder


def named(config: configuration.RunConfig) -> list[str | None]:
    """Every path of `SETTINGS` in a configuration."""
    own = config.experiments
    texts = [own.texts.categories, own.probe.dataset, own.tsne.dataset, *own.sequences.texts]
    return [config.model.name, config.data.source, config.store.path, *texts, own.explain.answers.recorded]


def test_paths_mean_the_folder_of_their_file_from_anywhere(project: Path, tmp_path: Path, monkeypatch) -> None:
    inside = [str(project / name) for name in ("models/tiny", "data/a.jsonl", "stores/own", "table.csv")]
    expected = [
        *inside,
        str(project / "data/labelled.jsonl"),
        "wikipedia",
        str(project / "one.txt"),
        "a text of its own",
    ]
    for place in (project, tmp_path, tmp_path / "project" / "data"):
        monkeypatch.chdir(place)
        config = configuration.load(project / "run.yaml")
        assert named(config) == [*expected, str(project / "answers")]
        assert config.experiments.explain.answers.model == "me/judge"


def test_what_only_the_working_directory_has_is_found_there_as_before(
    project: Path, tmp_path: Path, monkeypatch
) -> None:
    elsewhere = tmp_path / "configs" / "run.yaml"
    elsewhere.parent.mkdir()
    elsewhere.write_text((project / "run.yaml").read_text())
    monkeypatch.chdir(project)
    assert configuration.load(elsewhere).data.source == str(project / "data/a.jsonl")


def test_hashes_know_a_path_as_it_was_written(project: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(project)
    config = configuration.load("run.yaml")
    plain = configuration.from_mapping(SETTINGS, "here")  # as version 3195aa1 read it
    for settings in (configuration.store_settings, configuration.evaluation_settings):
        assert settings(config) == settings(plain)
    for name in ("probe", "sequences", "explain"):
        found, expected = (configuration.experiment_settings(each, name) for each in (config, plain))
        assert schema.stable_hash(found) == schema.stable_hash(expected)
    run = RunFolder.of(tmp_path / "runs", "one")
    run.claim(config)
    monkeypatch.chdir(tmp_path)
    again = run.load_config()
    assert (again, again.training_hash) == (config, plain.training_hash)
    assert yaml.safe_load(run.resolved.read_text())["data"]["source"] == str(project / "data/a.jsonl")
    assert configuration.load(run.resolved).evaluation_hash == plain.evaluation_hash
    changed = configuration.load(run.resolved, ["data.source=project/data/labelled.jsonl"])
    assert changed.data.source == str(project / "data/labelled.jsonl")
    assert changed.training_hash != plain.training_hash


def test_a_hub_id_is_a_folder_only_where_a_model_lies_there(project: Path, monkeypatch) -> None:
    monkeypatch.chdir(project.parent)
    path = project / "hub.yaml"
    for name, expected in (("gpt2", "gpt2"), ("me/tiny", "me/tiny"), ("models/tiny", str(project / "models/tiny"))):
        path.write_text(yaml.safe_dump({"model": {"name": name}}))
        assert configuration.load(path).model.name == expected
    (project / "embedded").mkdir()
    assert configuration.load(path, ["data.source=embedded"]).data.source == "embedded"


def test_a_command_line_means_the_working_directory(project: Path, monkeypatch) -> None:
    monkeypatch.chdir(project / "data")
    config = configuration.load(project / "run.yaml", ["data.source=labelled.jsonl", "store.path=new"])
    assert config.data.source == str(project / "data/labelled.jsonl")
    assert config.store.path == str(project / "data/new")


def test_a_sweep_and_its_base_have_folders_of_their_own(project: Path, tmp_path: Path, monkeypatch) -> None:
    sweeps = project / "sweeps"
    sweeps.mkdir()
    (sweeps / "b.jsonl").write_text("")
    sweep = {"base": "../run.yaml", "container": "image.sif"}
    sweep["zip"] = {"data.source": ["b.jsonl", "embedded"], "store.path": ["one", "two"]}
    (sweeps / "image.sif").write_text("")
    (sweeps / "both.yaml").write_text(yaml.safe_dump(sweep))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TSAE_HOME", str(tmp_path / "home"))
    made = load_sweep(sweeps / "both.yaml", overrides=["experiments.steer.judge.recorded=here"])
    plan = make_plan(made)
    assert [point.name for point in plan.points] == ["source=b.jsonl,path=one", "source=embedded,path=two"]
    assert [point.config.data.source for point in plan.points] == [str(sweeps / "b.jsonl"), "embedded"]
    assert {point.config.model.name for point in plan.points} == {str(project / "models/tiny")}
    assert [point.config.store.path for point in plan.points] == [str(sweeps / "one"), str(sweeps / "two")]
    assert {point.config.experiments.steer.judge.recorded for point in plan.points} == {str(tmp_path / "here")}
    assert made.config.container == str(sweeps / "image.sif")
    # The copies that a launch makes lie elsewhere and mean the same.
    attempt = plan.folder / "attempts" / "20260101-000000"
    attempt.mkdir(parents=True)
    for name, text in plan.sources().items():
        (attempt / name).write_text(text)
    monkeypatch.chdir(project)
    copied = make_plan(load_folder(plan.folder))
    assert [point.config for point in copied.points] == [point.config for point in plan.points]
    assert [point.config.evaluation_hash for point in copied.points] == [
        point.config.evaluation_hash for point in plan.points
    ]
    # As jobs read them.
    for point in plan.points:
        text = plan.config_texts(list(plan.stages))[point.name]
        (tmp_path / "point.yaml").write_text(text)
        assert configuration.load(tmp_path / "point.yaml").evaluation_hash == point.config.evaluation_hash
    # A launch from before says nothing of folders; its paths were those of its working directory.
    record = json.loads((attempt / LAUNCH_FILE).read_text())
    del record["folders"], record["digest"]
    (attempt / LAUNCH_FILE).write_text(json.dumps(record))
    (attempt / "provenance.json").write_text(json.dumps({"working_directory": str(sweeps)}))
    assert make_plan(load_folder(plan.folder)).points[0].config.data.source == str(sweeps / "b.jsonl")


def test_a_site_file_has_its_own_folder(tmp_path: Path, monkeypatch) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "tsae.sif").write_text("")
    (site / "cluster.yaml").write_text("container: tsae.sif\nbinds: ['scratch:/data', /opt]\n")
    monkeypatch.chdir(tmp_path)
    found = load_cluster(Path("site/cluster.yaml"))
    assert found.container == str(site / "tsae.sif")
    assert found.binds == (f"{site}/scratch:/data", "/opt")


@pytest.mark.parametrize(
    ("path", "written", "fits"),
    [
        ("/p/data/a", "data/a", True),
        ("/p/data/a", "../x/../data/a", True),
        ("/p/data/b", "data/a", False),
        ("/p", ".", True),
    ],
)
def test_words_that_cannot_be_the_path_s_own_are_passed_over(path: str, written: str, fits: bool) -> None:
    found = restored(path, written)
    assert found == path
    assert isinstance(found, Located) == fits
