"""The table of deviations, and other libraries' own loaders on our files."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from tsae.checkpoint import load_dictionary
from tsae.cli import main
from tsae.interop import formats
from tsae.interop.export import WRITERS, Source
from tsae.sae.init import random_dictionary
from tsae.sae.kinds import classes

SAE_BENCH_LOADERS = {
    "MatryoshkaBatchTopKTrainer": "batch_topk_sae.load_dictionary_learning_matryoshka_batch_topk_sae",
    "BatchTopKTrainer": "batch_topk_sae.load_dictionary_learning_batch_topk_sae",
    "TopKTrainer": "topk_sae.load_dictionary_learning_topk_sae",
    "StandardTrainer": "relu_sae.load_dictionary_learning_relu_sae",
    "JumpReluTrainer": "jumprelu_sae.load_dictionary_learning_jump_relu_sae",
    "GatedSAETrainer": "gated_sae.load_dictionary_learning_gated_sae",
}


def needs(library: str, command: str) -> pytest.MarkDecorator:
    """Skips, loudly, where another library is not there to read our files itself."""
    reason = f"{library.upper()} ITSELF DID NOT READ OUR FILES: it is not installed; pip install {command}"
    return pytest.mark.skipif(not formats.installed(library), reason=reason)


def test_every_class_survives_every_format_to_1e_6() -> None:
    rows = list(formats.deviations())
    assert all(max(row.encode, row.decode) <= formats.TOLERANCE for row in rows), rows
    trips = {(row.dict_class, row.format) for row in rows}
    assert trips >= {(name, form) for name in classes() for form in ("sae_lens", "sae_bench", "reference")}
    assert ("SAELens" in {row.read_by for row in rows}) == formats.installed("sae_lens")


def test_the_command_prints_one_line_per_trip(capsys) -> None:
    assert main(["formats"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("TemporalMatryoshkaBatchTopKSAE") for line in lines) >= 3


@needs("dictionary_learning", "--no-deps dictionary-learning==0.1.0")
@pytest.mark.parametrize("name", [name for name in classes() if not name.startswith("Temporal")])
def test_files_of_dictionary_learning_are_read_as_it_reads_them(tmp_path: Path, name: str) -> None:
    from dictionary_learning import utils

    torch.manual_seed(0)
    sizes = {"AutoEncoderTopK": [4], "BatchTopKSAE": [4], "MatryoshkaBatchTopKSAE": [4, [8, 24]]}
    made = getattr(utils, name)(16, 32, *sizes.get(name, []))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter).abs() if parameter.ndim == 1 else torch.randn_like(parameter))
        if name in sizes:
            made.threshold.fill_(0.5)
    torch.save(made.state_dict(), tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": name, "k": 4}}))
    theirs, _ = utils.load_dictionary(str(tmp_path), "cpu")
    ours, _ = load_dictionary(tmp_path)
    x = torch.randn(9, 16)
    with torch.no_grad():
        codes = theirs.encode(x)
        assert torch.allclose(ours.encode(x), codes, atol=1e-5)
        assert torch.allclose(ours(x), theirs.decode(codes), atol=1e-5)


@needs("sae_bench", "--no-deps sae-bench==0.6.0 (and 'tsae[sae-lens]')")
@pytest.mark.parametrize("name", classes())
def test_sae_bench_itself_loads_our_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    dictionary = random_dictionary(name, 16, 80)
    (tmp_path / "sae").mkdir()
    source = Source(dictionary, formats._config(dictionary), formats.ORIGIN, {}, {}, name)
    WRITERS["sae_bench"](tmp_path / "sae", source)
    trainer = json.loads((tmp_path / "sae/config.json").read_text())["trainer"]
    module_name, function = SAE_BENCH_LOADERS[trainer["trainer_class"]].split(".")
    module = importlib.import_module(f"sae_bench.custom_saes.{module_name}")
    # Its loaders fetch from the hub, which is not here.
    monkeypatch.setattr(module, "hf_hub_download", lambda filename, **_: str(tmp_path / filename))
    sae = getattr(module, function)(
        repo_id="a/b",
        filename="sae/ae.pt",
        model_name="pythia-160m",
        device=torch.device("cpu"),
        dtype=torch.float32,
        layer=8,
    )
    x = torch.randn(9, 3, 16)
    with torch.no_grad():
        codes = sae.encode(x)
        assert sae.cfg.hook_name == "blocks.8.hook_resid_post"
        assert torch.allclose(codes, dictionary.encode(x), atol=1e-6)
        assert torch.allclose(sae.decode(codes), dictionary(x), atol=1e-6)
