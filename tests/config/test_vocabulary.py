"""A preset and a key beside it mean the preset and then the key: in any order, wherever they are given."""

from __future__ import annotations

import itertools

import pytest
import yaml

from tsae.config import run as configuration
from tsae.config import schema
from tsae.config.run import RunConfig
from tsae.runtime.errors import TsaeError
from tsae.sweep.points import expand
from tsae.sweep.sweepfile import load_sweep

WORDS = ["objective=reference", "objective.temporal_alpha=1.0", "synthetic=recover", "synthetic.scale=20"]


def require_both(config: RunConfig) -> None:
    objective, world = config.objective, config.synthetic
    assert (objective.preset, objective.similarity, objective.temporal_alpha) == ("reference", "dot", 1.0)
    assert (world.preset, world.n_fast, world.scale) == ("recover", 120, 20.0)


@pytest.mark.parametrize("order", list(itertools.permutations(WORDS)))
def test_on_a_command_line(tmp_path, order):
    path = tmp_path / "run.yaml"
    path.write_text("objective: {preset: paper, temperature: 3.0}\nsynthetic: {noise: 0.5}\n")
    config = configuration.load(path, list(order))
    require_both(config)
    assert config.objective.temperature == 1.0  # a preset's name takes the place of what the file says of the section
    assert config.synthetic.noise == 0.05


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("place", ["base", "overrides", "list", "zip", "grid", "random", "command line", "mixed"])
def test_in_every_place_of_a_sweep(tmp_path, place, flip):
    asked = {"objective": "reference", "objective.temporal_alpha": 1.0, "synthetic": "recover", "synthetic.scale": 20}
    pairs = list(reversed(asked.items())) if flip else list(asked.items())
    base = {"objective": {"temperature": 3.0}, "sae": {"dict_size": 80, "k": 4}}
    sweep: dict = {"base": "base.yaml", "grid": {"training.seed": [0, 1]}}
    words: list[str] = []
    if place == "base":
        base |= {
            "objective": {"preset": "reference", "temporal_alpha": 1.0},
            "synthetic": {"scale": 20, "preset": "recover"},
        }
    elif place == "overrides":
        sweep["overrides"] = dict(pairs)
    elif place == "list":
        sweep["list"] = [dict(pairs)]
    elif place in ("zip", "grid"):
        sweep[place] = {**({"training.seed": [0]} if place == "grid" else {}), **{key: [value] for key, value in pairs}}
        if place == "zip":
            sweep["grid"] = {"training.seed": [0]}
    elif place == "random":
        sweep["random"] = {"n": 1, "seed": 0, **{key: [value] for key, value in pairs}}
    elif place == "command line":
        words = [f"{key}={value}" for key, value in pairs]
    else:  # the presets swept, the keys given above or below them
        keys = [(key, value) for key, value in pairs if "." in key]
        sweep["grid"] |= {"objective": ["reference"], "synthetic": ["recover"]}
        sweep["overrides"], words = ({}, [f"{key}={value}" for key, value in keys]) if flip else (dict(keys), [])
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep, sort_keys=False))
    loaded = load_sweep(path, overrides=words)
    for point in expand(loaded):
        require_both(point.config)
        for key, value in point.axes.items():
            assert point.value(key) == value  # a point is what its name says
    if place == "command line":
        assert all(f"{key}=" in loaded.folder_name for key in asked)


def test_a_contradiction_is_refused_where_both_are_asked_for(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text("grid: {sae.split_fraction: [0.1, 0.2]}\n")
    for words in (["sae.group_fractions=[0.5,0.5]"], ["sae.split_fraction=0.3", "sae.group_fractions=[0.5,0.5]"]):
        with pytest.raises(
            TsaeError, match=r"sae\.split_fraction: it has no effect beside sae\.group_fractions|sweeps it"
        ):
            expand(load_sweep(path, overrides=words))
    (tmp_path / "groups_base.yaml").write_text("sae: {group_fractions: [0.5, 0.5]}\n")
    with pytest.raises(TsaeError, match=r"split_fraction: it has no effect beside sae\.group_fractions"):
        expand(load_sweep(path, str(tmp_path / "groups_base.yaml")))
    only = tmp_path / "groups.yaml"  # over a base that has a split_fraction
    only.write_text("grid: {sae.group_fractions: [[0.5, 0.5], [0.2, 0.8]]}\n")
    assert [point.config.sae.fractions for point in expand(load_sweep(only))] == [(0.5, 0.5), (0.2, 0.8)]


def test_what_a_store_has_already_is_refused_where_it_is_asked_for(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data: {source: store}\nstore: {path: here}\n")
    configuration.load(path)
    with pytest.raises(TsaeError, match=r"^command line: data\.holdout: it has no effect beside data\.source: store"):
        configuration.load(path, ["data.holdout=0.5"])


def test_a_preset_that_is_named_twice_is_refused(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text("grid: {objective.preset: [paper, reference]}\n")
    with pytest.raises(TsaeError, match=r"objective\.preset: objective names a preset too"):
        expand(load_sweep(path, overrides=["objective=paper"]))


def test_the_last_of_two_values_counts():
    assert schema.parse_overrides(["sae.k=3", "sae={k: 4, dict_size: 8}"]) == {"sae.k": 4, "sae.dict_size": 8}
