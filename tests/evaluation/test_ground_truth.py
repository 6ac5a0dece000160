"""A synthetic world from store to report, with no language model anywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tsae.checkpoint import RunFolder
from tsae.cli import main
from tsae.config import run as configuration
from tsae.config.run import RunConfig
from tsae.data.synthetic import World
from tsae.evaluation.driver import evaluate
from tsae.evaluation.identity import is_evaluated
from tsae.runtime.errors import TsaeError
from tsae.store.harvest import harvest
from tsae.store.layout import StoreLayout, store_path
from tsae.store.reader import Store
from tsae.store.verify import verify
from tsae.training.run import train


def tree(store: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A small world and a short run."""
    settings: dict[str, dict[str, Any]] = {
        "data": {"source": "synthetic", "context_length": 32, "holdout": 0.1, "skip_positions": 0},
        "synthetic": {"sequences": 900, "activation_dim": 16, "n_slow": 6, "k_slow": 1, "n_fast": 10, "k_fast": 2},
        "store": {"path": str(store), "dtype": "float32"},
        "sae": {"dict_size": 20, "k": 3, "split_fraction": 0.3},
        "objective": {"preset": "reference", "temporal_alpha": 1.0},
        "training": {"steps": 200, "batch_size": 128, "lr": 3e-3, "warmup_steps": 20, "threshold_start_step": 50},
    }
    settings["training"] |= {"threshold_beta": 0.9, "device": "cpu"}
    return {name: {**settings.get(name, {}), **sections.get(name, {})} for name in {*settings, *sections}}


def make(store: Path, **sections: dict[str, Any]) -> RunConfig:
    """The configuration of `tree`."""
    return configuration.from_mapping(tree(store, **sections), "test")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A harvested world."""
    config = make(tmp_path_factory.mktemp("world") / "store")
    harvest(config)
    return config


@pytest.fixture(scope="module")
def run(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A T-SAE trained and measured on it."""
    run = RunFolder.of(tmp_path_factory.mktemp("runs"), "tsae")
    train(config, run)
    evaluate(config, run)
    return run


def test_the_store_holds_the_worlds_activations_and_its_truth(config: RunConfig) -> None:
    store, world = Store.open(store_path(config), config), World.of(config)
    features, x = world.read(range(900))
    np.testing.assert_array_equal(store.read(range(900)).numpy(), x)
    truth = store.truth()
    np.testing.assert_array_equal(truth.features, features[-store.heldout :])
    np.testing.assert_array_equal(truth.directions, world.directions)
    assert truth.group_names == ("slow", "fast")
    assert verify(store.path, deep=True) == []


def test_tasks_in_any_order_write_the_same_bytes(config: RunConfig, tmp_path: Path) -> None:
    other = make(tmp_path / "store")
    for task in (1, 0):
        harvest(other, task, 2)
    one, two = StoreLayout(store_path(config)), StoreLayout(store_path(other))
    assert one.identity == two.identity
    for shard in range(one.geometry.shards):
        assert one.shard(shard).read_bytes() == two.shard(shard).read_bytes()


def test_neither_a_language_model_nor_a_compiler_is_imported(tmp_path: Path) -> None:
    """Nor what statistics need of scipy with the rest of it: each of them takes as long as a small run."""
    code = (
        "import sys, json; from tsae.config import run as config; from tsae import stages\n"
        "made = config.from_mapping(json.loads(sys.argv[1]), 'test'); stages.harvest_stage(made)\n"
        "stages.train_stage(made, sys.argv[2], 'run'); stages.evaluate_stage(made, sys.argv[2], 'run')\n"
        "heavy = ('transformers', 'nnsight', 'datasets', 'torch._dynamo', 'scipy.stats')\n"
        "sys.exit(' '.join(name for name in heavy if name in sys.modules) or 0)"
    )
    given = tree(tmp_path / "store", training={"steps": 5, "warmup_steps": 1, "threshold_start_step": 2})
    command = [sys.executable, "-c", code, json.dumps(given), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_store_of_another_world_is_refused(config: RunConfig) -> None:
    path = store_path(config)
    with pytest.raises(TsaeError, match=r"synthetic.scale is 1.0 there, 2.0 here"):
        Store.open(path, make(path, synthetic={"scale": 2.0}))
    # What a language model is called has no say.
    Store.open(path, make(path, model={"layer": 1}))


def test_changed_truth_is_noticed(tmp_path: Path) -> None:
    config = make(tmp_path / "store", synthetic={"sequences": 300})
    path = harvest(config)
    [chunk] = (path / "truth_group" / "c").iterdir()
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    assert any("truth_group" in problem for problem in verify(path))
    with pytest.raises(TsaeError, match="truth_group"):
        Store.open(path).truth()


def test_the_worlds_seed_and_preset_name_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSAE_HOME", str(tmp_path))
    worlds = [{}, {"data": {"seed": 1}}, {"synthetic": {"preset": "recover"}}, {"synthetic": {"scale": 3.0}}]
    paths = {store_path(configuration.replace(make(tmp_path, **world), store={"path": None})) for world in worlds}
    assert len(paths) == len(worlds)
    assert all(path.name.startswith("synthetic-") for path in paths)


def test_evaluation_measures_recovery_in_place_of_the_language_models_loss(run: RunFolder, config: RunConfig) -> None:
    results = run.read_results()
    assert "frac_recovered" not in results
    truth = json.loads(run.result("synthetic", "json").read_text())
    assert results["truth_disentanglement"] == truth["dictionary"]["disentanglement"]
    assert run.result("synthetic", "png").stat().st_size > 10_000
    assert is_evaluated(config, run)


def test_a_temporal_sae_learns_slow_features_in_its_high_level_group(run: RunFolder) -> None:
    truth = json.loads(run.result("synthetic", "json").read_text())
    found = truth["dictionary"]
    assert found["slow_high"] > 0.6 > found["slow_low"]
    assert found["disentanglement"] > truth["random"]["disentanglement"] + 0.3
    assert found["persistence_high"] > found["persistence_low"]
    assert truth["oracle"]["slow"] > 0.9


def test_a_group_that_falls_silent_is_told_once(
    run: RunFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shares = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert not any(line["collapsed_groups"] for line in shares[len(shares) // 2 :])
    assert all(line["share_0"] + line["share_1"] == pytest.approx(1) for line in shares)

    loud = make(tmp_path / "store", synthetic={"scale": 30.0}, training={"steps": 120, "log_every": 5})
    silent = RunFolder.of(tmp_path, "silent")
    harvest(loud)
    train(loud, silent)
    last = json.loads(silent.metrics.read_text().splitlines()[-1])
    assert last["collapsed_groups"] == 1
    assert last["share_0"] < 0.03
    [warning] = [record.getMessage() for record in caplog.records]
    assert "silent: step" in warning
    assert "the high-level split (group 0)" in warning
    assert "lower objective.temporal_alpha" in warning


def test_the_command_measures_a_run_again(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    before = run.result("synthetic", "json").read_text()
    run.result("synthetic", "json").unlink()
    assert main(["synthetic", str(run.path)]) == 0
    assert run.result("synthetic", "json").read_text() == before
    assert "post_hoc" in capsys.readouterr().out


def test_a_dictionary_without_groups_is_measured_too(config: RunConfig, tmp_path: Path) -> None:
    settings = {"sae": {"kind": "batch_topk"}, "training": {"steps": 60, "threshold_start_step": 20}}
    config = make(Path(str(config.store.path)), **settings)
    run = RunFolder.of(tmp_path, "batch_topk")
    train(config, run)
    evaluate(config, run)
    truth = json.loads(run.result("synthetic", "json").read_text())
    assert truth["group_sizes"] == [6, 14]
    assert sum(truth["latents"]["group"]) == 14


def test_several_time_scales_give_a_table_of_kinds_and_groups(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "synthetic": {"preset": "time_scales", "n_slow": 6, "k_slow": 2, "sequences": 300, "n_distractors": 1},
        "sae": {"group_fractions": [0.2, 0.2, 0.6]},
        "training": {"steps": 40, "threshold_start_step": 10},
    }
    config, run = make(tmp_path / "store", **settings), RunFolder.of(tmp_path, "scales")
    harvest(config)
    train(config, run)
    evaluate(config, run)
    truth = json.loads(run.result("synthetic", "json").read_text())
    assert truth["kinds"] == ["slow_0", "slow_1", "fast", "distractor"]
    assert np.shape(truth["dictionary"]["table"]) == (4, 3)


def test_a_run_on_text_has_no_truth(tmp_path: Path) -> None:
    from tsae.evaluation.ground_truth import measure_run

    with pytest.raises(TsaeError, match="no truth is known"):
        measure_run(configuration.from_mapping({}, "test"), RunFolder(tmp_path))
