"""Calibration of a trained run on its own held-out activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tsae import cli
from tsae.checkpoint import RunFolder, load_dictionary, of_new_weights
from tsae.config import run as configuration
from tsae.config.run import RunConfig
from tsae.evaluation.calibration import calibrate
from tsae.evaluation.driver import evaluate
from tsae.evaluation.identity import is_evaluated
from tsae.runtime import metadata
from tsae.runtime.errors import TsaeError
from tsae.store.harvest import harvest
from tsae.store.reader import Store
from tsae.training.run import train


def trained(config: RunConfig, folder: Path, kind: str = "temporal") -> RunFolder:
    """A run of a few steps."""
    # As little training as gives a threshold.
    settings = {"steps": 12, "batch_size": 64, "lr": 0.01, "warmup_steps": 2, "device": "cpu"}
    config = configuration.replace(
        config,
        sae={"kind": kind},
        training={**settings, "threshold_start_step": 5, "save_steps": (10,)},
        evaluation={"loss_recovered": False},
    )
    harvest(config)
    run = RunFolder.of(folder, "run")
    train(config, run)
    return run


def held_out(run: RunFolder) -> torch.Tensor:
    """All valid held-out activations [N, D]."""
    config = run.load_config()
    store = Store.open(str(config.store.path), config)
    rows, valid = np.asarray(store.heldout_range), store.valid(config.counted)
    return torch.cat([store.read([row])[0, torch.from_numpy(valid[row])] for row in rows]).float()


def mean_l0(run: RunFolder) -> float:
    dictionary, _ = load_dictionary(run.path)
    return float((dictionary.encode(held_out(run)) > 0).sum(dim=1).float().mean())


@pytest.mark.parametrize("kind", ["temporal", "topk"])
@pytest.mark.parametrize("target", [None, 2.5, 9.0])
def test_the_target_is_met_on_held_out_activations(
    config: RunConfig, tmp_path: Path, kind: str, target: float | None
) -> None:
    run = trained(config, tmp_path, kind)
    record = calibrate(run, run.load_config(), target)
    wanted = target or config.sae.k
    tokens = len(held_out(run))
    assert record["tokens"] == tokens
    assert record["after"]["l0"] == pytest.approx(wanted, abs=1.01 / tokens)
    assert mean_l0(run) == pytest.approx(wanted, abs=2 / tokens)
    assert record["target_l0"] == wanted
    assert record["before"]["encode_rule"] == ("top_k" if kind == "topk" else "threshold")
    assert load_dictionary(run.path)[0].encode_rule == "threshold"


def test_the_record_is_in_the_checkpoint_and_fve_is_right(config: RunConfig, tmp_path: Path) -> None:
    run = trained(config, tmp_path)
    record = calibrate(run, run.load_config(), 7)
    assert metadata.read(run.calibration, dict) == record
    dictionary, written = load_dictionary(run.path)
    assert written["calibration"] == record
    assert written["trainer"]["dict_class"] == "TemporalMatryoshkaBatchTopKSAE"
    x = held_out(run)
    error = (x - dictionary(x)).square().sum() / (x - x.mean(dim=0)).square().sum()
    assert record["after"]["fve"] == pytest.approx(1 - float(error), abs=1e-5)
    assert record["after"]["threshold"] == float(dictionary.threshold)


def test_a_run_that_tracked_no_threshold_becomes_usable(config: RunConfig, tmp_path: Path) -> None:
    run = trained(config, tmp_path)
    # As in a released file of a run that ended before its threshold was tracked.
    state = torch.load(run.weights, weights_only=True)
    state["threshold"].fill_(-1)
    torch.save(state, run.weights)
    with pytest.raises(TsaeError, match=r"not the weights that config\.json beside it was written for"):
        load_dictionary(run.path)
    metadata.write(run.config_json, of_new_weights(run.read_config()))
    with pytest.raises(TsaeError, match="tsae calibrate"):
        load_dictionary(run.path)
    with pytest.raises(TsaeError, match="tracked no threshold"):
        calibrate(run, run.load_config(), keep=True)
    record = calibrate(run, run.load_config())
    assert record["before"] is None
    assert mean_l0(run) == pytest.approx(config.sae.k, rel=0.02)


def test_keep_returns_to_the_threshold_that_training_tracked(config: RunConfig, tmp_path: Path) -> None:
    run = trained(config, tmp_path)
    tracked = load_dictionary(run.path)[0].scalar_threshold
    assert calibrate(run, run.load_config(), 2)["after"]["threshold"] != tracked
    record = calibrate(run, run.load_config(), keep=True)
    assert record["after"]["threshold"] == tracked
    assert record["target_l0"] is None
    assert load_dictionary(run.path)[0].scalar_threshold == tracked


def test_evaluation_states_the_calibrated_threshold_and_becomes_stale_with_it(
    config: RunConfig, tmp_path: Path
) -> None:
    run = trained(config, tmp_path, "topk")
    resolved = run.load_config()
    first = evaluate(resolved, run)
    assert (first["encode_rule"], first["threshold"]) == ("top_k", None)
    assert is_evaluated(resolved, run)
    record = calibrate(run, resolved, 3)
    assert not is_evaluated(resolved, run)
    second = evaluate(resolved, run)
    assert (second["encode_rule"], second["threshold"]) == ("threshold", record["threshold"])
    assert second["l0"] != first["l0"]
    assert is_evaluated(resolved, run)


def test_a_calibration_is_of_the_final_weights_alone(config: RunConfig, tmp_path: Path) -> None:
    run = trained(config, tmp_path, "topk")
    before = run.checkpoint(10).read_bytes()
    calibrate(run, run.load_config(), 3)
    assert run.checkpoint(10).read_bytes() == before
    assert load_dictionary(run.path, checkpoint=10)[0].encode_rule == "top_k"


def test_an_interrupted_calibration_is_noticed_and_repeated(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(config, tmp_path)
    tracked = load_dictionary(run.path)[0].scalar_threshold

    written = metadata.write

    def killed(path: Path, value: dict[str, Any]) -> None:
        written(path, value)
        if path == run.config_json:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(metadata, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            calibrate(run, run.load_config(), 3)
    with pytest.raises(TsaeError, match="a calibration was interrupted; run it again"):
        load_dictionary(run.path)
    record = calibrate(run, run.load_config(), 3)
    assert record["tracked_threshold"] == tracked
    assert mean_l0(run) == pytest.approx(3, abs=0.01)


def test_what_cannot_be_calibrated_is_refused(config: RunConfig, tmp_path: Path) -> None:
    run = trained(config, tmp_path)
    before = run.weights.read_bytes()
    for target, message in ((63.9, "latents per token are positive at all"), (0.0, "not one activation")):
        with pytest.raises(TsaeError, match=message):
            calibrate(run, run.load_config(), target)
    assert run.weights.read_bytes() == before
    with pytest.raises(TsaeError, match="a JumpReluAutoEncoder has no threshold to calibrate"):
        calibrate(jump := trained(config, tmp_path / "jump", "jump_relu"), jump.load_config())


def test_the_command_prints_what_changed(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(config, tmp_path)
    assert cli.main(["calibrate", str(tmp_path / "run"), "--target-l0", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("before: rule threshold, threshold ")
    assert "L0 4, FVE" in lines[1]
    assert cli.main(["calibrate", str(tmp_path / "nothing")]) == 2
