"""An upgrade costs nobody a run or a harvest: hashes stay, and leave out what came later and is neutral."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import yaml

from tsae.checkpoint import RunFolder
from tsae.config import run as configuration
from tsae.config import schema
from tsae.config.bounds import Added
from tsae.config.run import Counted, RunConfig
from tsae.config.sections import TrainingConfig
from tsae.runtime.environment import SWEEPS
from tsae.runtime.errors import TsaeError
from tsae.sweep.points import expand
from tsae.sweep.sweepfile import load_sweep

RECORDED = json.loads(Path(__file__).with_name("hashes_3195aa1.json").read_text())
"""As commit 3195aa1 computed them: of the bases, and of the points of every shipped sweep."""
EXPERIMENTS = ("probe", "tsne", "sequences", "align", "steer", "explain", "features")


def hashes(config: RunConfig) -> dict[str, str]:
    found = {"store": configuration.store_settings(config), "training": configuration.training_settings(config)}
    found |= {"evaluation": configuration.evaluation_settings(config)}
    found |= {f"experiments.{name}": configuration.experiment_settings(config, name) for name in EXPERIMENTS}
    return {name: schema.stable_hash(settings) for name, settings in found.items()}


def as_before(config: RunConfig) -> RunConfig:
    """With what it leaves open as that commit took it, and what its base said of the embedded model."""
    config = next(configuration.earlier_meanings(config), config)
    if config.model.name == "embedded" and config.training.dead_after == 20_000:
        return configuration.replace(config, training={"dead_after": 200_000})
    return config


@pytest.mark.parametrize("name", [name for name in RECORDED if name.startswith("bases/")])
def test_the_bases_hash_as_before(name):
    assert hashes(as_before(configuration.load(SWEEPS / f"{name}.yaml"))) == RECORDED[name]


@pytest.mark.parametrize("name", [name for name in RECORDED if not name.startswith("bases/")])
def test_the_points_of_the_shipped_sweeps_hash_as_before(name):
    points = expand(load_sweep(SWEEPS / f"{name}.yaml"))
    recorded = RECORDED[name]
    assert (points[0].name, len(points)) == (recorded["name"], recorded["points"])
    assert (
        schema.stable_hash([[point.name, as_before(point.config).evaluation_hash] for point in points])
        == recorded["all"]
    )


def test_the_presets_of_the_reference_leave_no_token_out_and_a_number_says_how_many():
    config = configuration.load(SWEEPS / "bases" / "embedded.yaml")
    assert config.counted == Counted(1, configuration.MAX_NORM_MULTIPLE)
    for preset in ("reference", "paper"):
        left_in = configuration.load(SWEEPS / "bases" / "embedded.yaml", [f"objective={preset}"])
        assert left_in.counted == Counted(1)
        earlier = next(configuration.earlier_meanings(left_in), left_in)
        assert left_in.training_hash == earlier.training_hash
    set_off = {
        configuration.replace(config, data=changed).training_hash
        for changed in ({"max_norm_multiple": 5.0}, {"max_norm_multiple": None}, {"exclude_tokens": (7,)}, {})
    }
    assert len(set_off) == 4
    asked = configuration.replace(config, data={"max_norm_multiple": configuration.MAX_NORM_MULTIPLE})
    assert asked.training_hash == config.training_hash
    assert configuration.store_settings(asked) == configuration.store_settings(as_before(config))


@dataclass(frozen=True, kw_only=True)
class LaterTraining(TrainingConfig):
    """The section after an upgrade."""

    momentum: Annotated[float, Added(0.0)] = 0.0
    """A setting that came later."""


@pytest.mark.parametrize(("hook", "layer"), [("blocks.3.hook_resid_post", 3), ("blocks.3.hook_resid_pre", 2)])
def test_a_block_is_one_place_however_it_is_called(hook, layer):
    tree = {"data": {"source": "x.jsonl"}, "model": {"name": "gpt2"}}
    called = configuration.from_mapping({**tree, "model": {"name": "gpt2", "hook_point": hook}}, "test")
    counted = configuration.from_mapping({**tree, "model": {"name": "gpt2", "layer": layer}}, "test")
    assert called.training_hash == counted.training_hash


def test_a_setting_that_came_later_counts_only_where_it_is_not_neutral():
    config = as_before(configuration.load(SWEEPS / "bases" / "embedded.yaml"))
    own = schema.to_plain(config.training)
    [upgraded, changed] = (
        dataclasses.replace(config, training=LaterTraining(**{**own, "save_steps": (), "trackers": (), **more}))
        for more in ({}, {"momentum": 0.9})
    )
    assert hashes(upgraded) == RECORDED["bases/embedded"]
    assert schema.to_plain(upgraded.training)["momentum"] == 0.0  # resolved.yaml says it all the same
    differing = {name for name, found in hashes(changed).items() if found != RECORDED["bases/embedded"][name]}
    assert differing == {"training", "evaluation", *(f"experiments.{name}" for name in EXPERIMENTS)}


@pytest.fixture
def resolved(tmp_path):
    """Write a run's resolved.yaml with further settings by key path; returns the folder."""
    config = configuration.load(SWEEPS / "bases" / "embedded.yaml")

    def write(**more):
        tree = {"training_hash": config.training_hash, **schema.to_plain(config)}
        for path, value in more.items():
            schema.put(tree, path.replace("__", "."), value)
        run = RunFolder(tmp_path)
        run.resolved.write_text(yaml.safe_dump(tree, sort_keys=False))
        return run

    return write


@pytest.mark.parametrize(
    "unknown",
    ["experiments__telepathy", "experiments__probe__depth", "evaluation__colour", "training__neutral", "magic"],
)
def test_what_another_version_resolved_is_read_where_it_decides_nothing(resolved, unknown):
    value = {"strength": 3} if unknown in ("experiments__telepathy", "magic") else 3
    config = resolved(**{unknown: value}).load_config()
    assert config == configuration.load(SWEEPS / "bases" / "embedded.yaml")


def test_what_decided_a_training_is_not_passed_over(resolved):
    run = resolved(training__momentum=0.9)
    text = run.resolved.read_text()
    run.resolved.write_text("training_hash: 0123456789ab\n" + text.partition("\n")[2])
    with pytest.raises(TsaeError, match=r"training\.momentum: unknown key; it decided this training"):
        run.load_config()


def test_a_resolved_file_as_the_configuration_of_a_command_follows_the_same_rule(resolved):
    assert configuration.load(resolved(experiments__probe__depth=3).resolved) == resolved().load_config()
    with pytest.raises(TsaeError, match=r"evaluation\.colour: unknown key"):
        configuration.load(resolved(evaluation__colour=3).resolved)
