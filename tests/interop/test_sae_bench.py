"""SAEBench: folders for its loader, and the explanations in its results."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tsae.checkpoint import RunFolder, save_dictionary
from tsae.cli import main
from tsae.interop.explanations import from_sae_bench, read_explanations
from tsae.interop.export import export
from tsae.runtime.errors import TsaeError
from tsae.runtime.files import write_json
from tsae.sae.init import random_dictionary

LOADERS = {"MatryoshkaBatchTopKTrainer", "BatchTopKTrainer", "TopKTrainer", "StandardTrainer"}
"""Of the trainer classes that SAEBench knows, those of our kinds."""


def test_the_export_meets_what_sae_bench_checks(make_run, tmp_path: Path, activations) -> None:
    run, dictionary = make_run()
    assert main(["export", str(run), "--format", "sae_bench", "--out", str(tmp_path / "out")]) == 0
    trainer = json.loads((tmp_path / "out/config.json").read_text())["trainer"]
    assert trainer["trainer_class"] in LOADERS
    assert trainer["dict_class"] == "MatryoshkaBatchTopKSAE"
    assert "gemma-2-2b" in trainer["lm_name"]
    assert (trainer["layer"], trainer["k"]) == (12, 5)
    state = torch.load(tmp_path / "out/ae.pt", weights_only=True)
    assert set(state) == {"W_enc", "b_enc", "W_dec", "b_dec", "k", "threshold", "group_sizes"}
    assert state["threshold"] >= 0
    assert torch.allclose(state["W_dec"].norm(dim=1), torch.ones(80), atol=1e-5)
    assert state["W_dec"].shape[0] >= state["W_dec"].shape[1]
    codes = torch.relu((activations - state["b_dec"]) @ state["W_enc"] + state["b_enc"])
    assert torch.equal(codes * (codes > state["threshold"]), dictionary.encode(activations))


def test_fewer_latents_than_dimensions_are_refused(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "narrow")
    trainer = {"dict_class": "BatchTopKSAE", "lm_name": "google/gemma-2-2b", "submodule_name": "resid_post_layer_1"}
    write_json(run.config_json, {"trainer": trainer})
    save_dictionary(run.weights, random_dictionary("BatchTopKSAE", 32, 16))
    with pytest.raises(TsaeError, match="16 latents for 32 dimensions"):
        export(run.path, "sae_bench", tmp_path / "out")


def result(path: Path, **changes: object) -> Path:
    entry = {
        "latent": 17,
        "explanation": "legal terms",
        "logs": "...",
        "predictions": [1],
        "correct seqs": [1],
        "score": 0.9,
    }
    content = {
        "eval_type_id": "autointerp",
        "eval_config": {"n_latents": 2},
        "eval_result_metrics": {"autointerp": {"autointerp_score": 0.8, "autointerp_std_dev": 0.1}},
        "eval_result_details": [],
        "eval_result_unstructured": {"17": entry, "2": {"latent": 2, "explanation": "dates", "logs": ""}},
    }
    path.write_text(json.dumps({**content, **changes}))
    return path


def test_autointerp_results_become_explanations(make_run, tmp_path: Path, capsys) -> None:
    run, _ = make_run()
    path = result(tmp_path / "custom_sae_eval_results.json")
    assert main(["explanations", str(path), "--run", str(run)]) == 0
    target = Path(capsys.readouterr().out.strip())
    assert json.loads(target.read_text()) == {"2": "dates", "17": "legal terms"}
    assert read_explanations(run) == {2: "dates", 17: "legal terms"}
    assert read_explanations(path) == {2: "dates", 17: "legal terms"}
    assert main(["explanations", str(path), "--run", str(run)]) == 2
    assert "left as it is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_type_id": "core"}, "not a result of SAEBench's autointerp"),
        ({"eval_result_unstructured": {}}, "explains no latent"),
        ({"eval_result_unstructured": {"1": {"latent": 2, "explanation": "x"}}}, "about latent 2"),
        ({"eval_result_unstructured": {"1": {"latent": 1}}}, "no explanation"),
    ],
)
def test_other_results_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(TsaeError, match=message):
        from_sae_bench(result(tmp_path / "r.json", **changes))


def test_explanations_of_another_dictionary_are_refused(make_run, tmp_path: Path, capsys) -> None:
    run, _ = make_run()
    entries = {"80": {"latent": 80, "explanation": "x"}}
    path = result(tmp_path / "r.json", eval_result_unstructured=entries)
    assert main(["explanations", str(path), "--run", str(run)]) == 2
    assert "another dictionary" in capsys.readouterr().err


@pytest.mark.parametrize("modules", ["tsae.lm.model, sae_lens", "nnsight, tsae.lm.model"])
def test_nnsight_saelens_and_tsae_can_be_imported_in_any_order_that_works_without_tsae(modules: str) -> None:
    if not find_spec("sae_lens"):
        pytest.skip("needs SAELens: pip install 'tsae[sae-lens]'")
    # In a process of its own: nnsight changes `object`, whatever has been imported by then.
    done = subprocess.run([sys.executable, "-c", f"import {modules}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
