"""SAEBench's own evaluations, unchanged, on a run of ours: the embedded language model, texts of this repository, a chat endpoint of this machine."""

from __future__ import annotations

import importlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.experiments.answers.chat_server import Server
from tests.interop.conftest import MakeRun
from tsae.checkpoint import RunFolder, load_dictionary, save_dictionary
from tsae.cli import main
from tsae.interop.sae_bench import for_sae_bench
from tsae.lm.source import FOLDER
from tsae.runtime.errors import TsaeError
from tsae.runtime.files import write_json
from tsae.sae.init import random_dictionary

LAYER, CONTEXT = 2, 32
WORDS = " ".join(path.read_text() for path in sorted(Path("docs").glob("*.md"))).split()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with texts/ to read; skips, loudly, where SAEBench cannot be imported."""
    for module in ("core", "autointerp", "sparse_probing"):
        pytest.importorskip(
            f"sae_bench.evals.{module}.main",
            reason="SAEBENCH ITSELF DID NOT EVALUATE A RUN OF OURS: pip install --no-deps sae-bench==0.6.0, and openai tabulate seaborn",
            exc_type=ImportError,
        )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    generator = random.Random(0)
    starts = [generator.randrange(len(WORDS) - 150) for _ in range(60)]
    rows = [json.dumps({"text": " ".join(WORDS[start : start + 150])}) for start in starts]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/train.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path


@pytest.fixture
def model(bench: Path) -> Path:
    """The embedded language model in a folder that says which architecture it has."""
    folder = shutil.copytree(FOLDER, bench / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["GPTNeoXForCausalLM"]}))
    return folder


@pytest.fixture
def run(make_run: MakeRun, model: Path) -> Path:
    """A run on block 2 of that model, with random latents of which a good tenth is active on a token."""
    path, _ = make_run(model={"name": str(model), "layer": LAYER})
    folder = RunFolder.of(path.parent, path.name)
    config = json.loads(folder.config_json.read_text())
    dictionary = random_dictionary("TemporalMatryoshkaBatchTopKSAE", 128, 256)
    dictionary.threshold.fill_(4.0)
    trainer = {
        "k": int(dictionary.k),
        "activation_dim": 128,
        "dict_size": 256,
        "group_sizes": list(dictionary.group_sizes),
    }
    write_json(folder.config_json, {**config, "trainer": {**config["trainer"], **trainer}})
    save_dictionary(folder.weights, dictionary)
    folder.eval_results.unlink()
    return path


def test_its_core_evaluation_sees_the_codes_of_our_dictionary(bench: Path, run: Path, model: Path) -> None:
    core = importlib.import_module("sae_bench.evals.core.main")
    name, sae = for_sae_bench(run)
    assert name == sae.cfg.metadata.model_name == str(model)
    ours, _ = load_dictionary(run)
    seen: list[float] = []
    encode = sae.encode

    def compared(x: torch.Tensor) -> torch.Tensor:
        codes: torch.Tensor = encode(x)
        seen.append(float((codes - ours.encode(x)).abs().max()))
        return codes

    sae.encode = compared
    (found,) = core.multiple_evals(
        [("ours", sae)],
        n_eval_reconstruction_batches=1,
        n_eval_sparsity_variance_batches=2,
        eval_batch_size_prompts=4,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
        dataset=str(bench / "texts"),
        context_size=CONTEXT,
        output_folder=str(bench / "core"),
        device="cpu",
    )
    (written,) = (bench / "core").glob("*.json")
    results = json.loads(written.read_text())
    assert results["eval_type_id"] == "core"
    assert max(seen) < 1e-4
    assert 1 < found["metrics"]["sparsity"]["l0"] < 128
    assert found["metrics"]["reconstruction_quality"]["mse"] > 0
    assert found["metrics"]["model_performance_preservation"]["ce_loss_without_sae"] < 8


def test_its_autointerp_comes_back_as_explanations(
    bench: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    autointerp = importlib.import_module("sae_bench.evals.autointerp.main")
    name, sae = for_sae_bench(run)

    def says(request: dict[str, Any]) -> str:
        explains = "list of documents on which the neuron activates" in request["messages"][0]["content"]
        return "This neuron activates on words of documentation." if explains else "1, 2"

    config = autointerp.AutoInterpEvalConfig(
        model_name=name,
        n_latents=8,
        dataset_name=str(bench / "texts"),
        llm_context_size=CONTEXT,
        llm_batch_size=16,
        llm_dtype="float32",
        total_tokens=3000,
    )
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server(says) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        autointerp.run_eval(config, [("ours", sae)], "cpu", "key", str(bench / "autointerp"))
    (written,) = (bench / "autointerp").glob("*.json")
    explained = json.loads(written.read_text())["eval_result_unstructured"]
    assert len(server.requests) == 2 * len(explained) > 0
    assert main(["explanations", str(written), "--run", str(run)]) == 0
    target = Path(capsys.readouterr().out.splitlines()[-1])
    assert json.loads(target.read_text()) == dict.fromkeys(sorted(explained, key=int), "words of documentation")


def test_its_sparse_probing_tells_classes_apart(bench: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probing = importlib.import_module("sae_bench.evals.sparse_probing.main")
    # JAXTYPING_DISABLE=1: its annotations of nested functions contradict each other, whatever SAE it is given.
    monkeypatch.setattr(importlib.import_module("jaxtyping").config, "jaxtyping_disable", True)
    name, sae = for_sae_bench(run, chunk=0)
    generator, folder = random.Random(1), bench / "fancyzhx/ag_news"  # where its own loader looks first
    folder.mkdir(parents=True)
    for split, count in (("train", 40), ("test", 20)):
        rows = ["text,label"]
        for label in range(4):
            for _ in range(count):
                rows.append(
                    f"{' '.join(generator.choices(('tensor', 'model', 'file', 'matrix')[label : label + 1], k=20))},{label}"
                )
        (folder / f"{split}.csv").write_text("\n".join(rows) + "\n")
    config = probing.SparseProbingEvalConfig(
        model_name=name,
        dataset_names=["fancyzhx/ag_news"],
        probe_train_set_size=40,
        probe_test_set_size=20,
        context_length=CONTEXT,
        llm_batch_size=16,
        llm_dtype="float32",
        k_values=[1],
    )
    (found,) = probing.run_eval(config, [("ours", sae)], "cpu", str(bench / "probing")).values()
    assert found["eval_result_metrics"]["sae"]["sae_test_accuracy"] > 0.9


def test_a_place_that_is_no_block_is_refused(make_run: MakeRun) -> None:
    pytest.importorskip("sae_lens")
    path, _ = make_run(model={"hook_point": "model.layers.3.mlp"})
    with pytest.raises(TsaeError, match="only dictionaries on a block's output can be exported to it"):
        for_sae_bench(path)
