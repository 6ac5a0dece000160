"""The evaluation stage on a real store, a real language model and a dictionary on disk."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tsae.checkpoint import RunFolder, save_dictionary
from tsae.config import run as configuration
from tsae.config.run import Counted, RunConfig
from tsae.evaluation.driver import evaluate
from tsae.evaluation.identity import is_evaluated
from tsae.runtime import files, metadata
from tsae.runtime.errors import TsaeError
from tsae.sae.init import new_dictionary
from tsae.sae.reference import reference_config
from tsae.store.harvest import harvest
from tsae.store.reader import Store


def run_folder(config: RunConfig, path: Path, activation_dim: int | None = None) -> RunFolder:
    """A finished run: an untrained dictionary, tied and centred, whose threshold gives about k latents per token."""
    store = Store.open(harvest(config), config)
    x = store.read(list(store.train)[:20])[torch.from_numpy(store.valid(Counted(1))[:20])].float()
    dictionary = new_dictionary(config.sae, activation_dim or x.shape[1], seed=0)
    if activation_dim is None:
        dictionary.b_dec.data = x.mean(0)
    pre = torch.relu(dictionary.pre_activations(x)).detach().flatten() if activation_dim is None else torch.ones(1)
    dictionary.threshold.fill_(float(pre.topk(min(len(pre), config.sae.k * len(x))).values[-1]))
    run = RunFolder(path)
    run.claim(config)
    files.write_json(run.config_json, reference_config(config, dictionary.activation_dim))
    save_dictionary(run.weights, dictionary)
    return run


def test_results_describe_the_held_out_part_of_the_store(config: RunConfig, tmp_path: Path) -> None:
    run = run_folder(config, tmp_path / "run")
    results = evaluate(config, run)
    assert metadata.read(run.eval_results, dict) == results
    assert is_evaluated(config, run)
    assert run.result("eval_results", "png").read_bytes().startswith(b"\x89PNG")

    store = Store.open(harvest(config), config)
    rows, valid = np.asarray(store.heldout_range), store.valid(Counted(1))
    x = torch.cat([store.read([row])[0, torch.from_numpy(valid[row])] for row in rows]).float()
    assert results["tokens"] == len(x)
    assert results["documents"] == len(np.unique(store.document[rows][valid[rows]]))
    with torch.no_grad():
        dictionary = torch.load(run.weights, weights_only=True)
        pre = torch.relu((x - dictionary["b_dec"]) @ dictionary["W_enc"] + dictionary["b_enc"])
        f = pre * (pre > dictionary["threshold"])
        error = (x - f @ dictionary["W_dec"] - dictionary["b_dec"]).square().sum()
    pooled = 1 - error / (x - x.mean(0)).square().sum()
    assert results["frac_variance_explained_pooled"] == pytest.approx(float(pooled), abs=1e-5)
    assert results["threshold"] == pytest.approx(float(dictionary["threshold"]))
    assert results["encode_rule"] == "threshold"
    for name in ("loss_original", "loss_reconstructed", "loss_zero", "frac_recovered", "lipschitz_cont_h"):
        assert math.isfinite(results[name])
        assert results["half_width_95"][name] > 0


def test_results_do_not_depend_on_the_batch_size(config: RunConfig, tmp_path: Path) -> None:
    run = run_folder(config, tmp_path / "run")
    first = evaluate(config, run)
    second = evaluate(configuration.replace(config, evaluation={"batch_size": 3}), run)
    assert set(first) == set(second)
    assert first["config_hash"] == second["config_hash"]
    for name, value in first.items():
        if isinstance(value, float):
            assert second[name] == pytest.approx(value, rel=1e-4), name


def test_packed_documents_are_scored_one_by_one_and_one_group_has_no_splits(config: RunConfig, tmp_path: Path) -> None:
    packed = configuration.replace(
        config,
        data={"packing": "concat"},
        store={"path": str(tmp_path / "store")},
        sae={"kind": "batch_topk"},
        evaluation={"loss_recovered": False},
    )
    run = run_folder(packed, tmp_path / "run")
    results = evaluate(packed, run)
    store = Store.open(harvest(packed), packed)
    assert results["contexts"] > len(store.heldout_range)
    assert "frac_recovered" not in results
    assert results["lipschitz_cont_h"] is None
    assert results["lipschitz_cont_group"] == [results["lipschitz_cont_tot"]]
    assert run.result("eval_results", "png").exists()


def test_dictionary_of_another_width_is_refused(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(TsaeError, match=r"16 dimensions.*holds 32"):
        evaluate(config, run_folder(config, tmp_path / "run", activation_dim=16))
    assert not (tmp_path / "run" / "eval_results.json").exists()


def test_mean_ablation_names_its_loss(config: RunConfig, tmp_path: Path) -> None:
    by_mean = configuration.replace(config, evaluation={"ablation": "mean", "sequences": 4})
    results = evaluate(by_mean, run_folder(by_mean, tmp_path / "run"))
    assert results["loss_ablation"] == "mean"
    assert "loss_zero" not in results
    assert math.isfinite(results["loss_mean"])


def test_a_run_is_not_measured_under_settings_it_was_not_trained_with(config: RunConfig, tmp_path: Path) -> None:
    run = run_folder(config, tmp_path / "run")
    evaluate(config, run)
    before = run.eval_results.read_bytes()
    with pytest.raises(TsaeError, match="was trained with another configuration"):
        evaluate(configuration.replace(config, sae={"k": 5}), run)
    assert run.eval_results.read_bytes() == before


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"lm_name": "google/gemma-2-2b"}, "was trained on model google/gemma-2-2b, the configuration reads model "),
        ({"layer": 0, "submodule_name": None}, "was trained on layer 0, the configuration reads layer 1;"),
        ({"submodule_name": "gpt_neox.layers.1.mlp"}, "was trained on module gpt_neox.layers.1.mlp, the configuration"),
        ({"layer": 0, "submodule_name": "blocks.1.hook_mlp_out"}, "was trained on module gpt_neox.layers.1.mlp, "),
        ({"lm_name": "synthetic"}, "was trained on model synthetic, the configuration reads model "),
    ],
)
def test_a_run_from_elsewhere_is_not_measured_at_another_place(
    config: RunConfig, tmp_path: Path, told: dict[str, object], message: str
) -> None:
    run = run_folder(config, tmp_path / "run")
    for ours in (run.resolved, run.provenance):
        ours.unlink(missing_ok=True)
    written = json.loads(run.config_json.read_text())
    files.write_json(run.config_json, {**written, "trainer": {**written["trainer"], **told}})
    with pytest.raises(TsaeError, match=message):
        evaluate(config, run)
    assert not run.eval_results.exists()
    # What its file does not tell, the configuration decides.
    silent = {**written["trainer"], "submodule_name": None, "layer": 1} | (
        {"lm_name": None} if "lm_name" in told else {}
    )
    files.write_json(run.config_json, {**written, "trainer": silent})
    assert evaluate(config, run)["tokens"] > 0
