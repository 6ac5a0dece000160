"""The layout of the authors' release, read as it is and written again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tsae.checkpoint import load_dictionary
from tsae.interop.explanations import read_explanations
from tsae.interop.export import export
from tsae.interop.formats import installed
from tsae.runtime.errors import TsaeError
from tsae.sae.init import random_dictionary

TRAINER = {
    "trainer_class": "TemporalMatryoshkaBatchTopKTrainer",
    "dict_class": "TemporalMatryoshkaBatchTopKSAE",
    "lr": 0.0003,
    "steps": 200000,
    "auxk_alpha": 0.03125,
    "warmup_steps": 1000,
    "decay_start": None,
    "threshold_beta": 0.999,
    "threshold_start_step": 1000,
    "top_k_aux": 8,
    "seed": None,
    "activation_dim": 16,
    "dict_size": 80,
    "group_fractions": [0.2, 0.8],
    "group_weights": [0.2, 0.8],
    "group_sizes": [16, 64],
    "k": 5,
    "temporal": "p",
    "device": "cuda:0",
    "layer": 12,
    "lm_name": "google/gemma-2-2b",
    "wandb_name": "TemporalMatryoshkaBatchTopKSAE",
    "submodule_name": "resid_post_layer_12",
}
BUFFER = {
    "d_submodule": 16,
    "io": "out",
    "n_ctxs": 2000,
    "ctx_len": 256,
    "refresh_batch_size": 64,
    "out_batch_size": 8192,
    "device": "cuda:0",
}


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """trainer_0/{config.json, ae.pt, checkpoints/ae_1000.pt} and explanations.json above it."""
    root = tmp_path / "release"
    (root / "trainer_0/checkpoints").mkdir(parents=True)
    (root / "trainer_0/config.json").write_text(json.dumps({"trainer": TRAINER, "buffer": BUFFER}))
    for name, seed in (("ae.pt", 0), ("checkpoints/ae_1000.pt", 1)):
        state = random_dictionary("TemporalMatryoshkaBatchTopKSAE", 16, 80, seed=seed).to_file()
        torch.save(state, root / "trainer_0" / name)
    (root / "explanations.json").write_text(json.dumps({"70": "years", "3": "plants"}))
    return root


@pytest.mark.parametrize("inner", ["", "trainer_0"])
def test_the_release_loads_from_its_folder(release: Path, activations, inner: str) -> None:
    dictionary, config = load_dictionary(release / inner)
    assert config["trainer"] == TRAINER
    assert torch.equal(
        dictionary.encode(activations), random_dictionary(TRAINER["dict_class"], 16, 80).encode(activations)
    )
    early, _ = load_dictionary(release / inner, checkpoint=1000)
    assert not torch.equal(early.encode(activations), dictionary.encode(activations))
    assert read_explanations(release / inner) == {3: "plants", 70: "years"}


def test_the_release_loads_by_hub_id_from_the_cache_without_network(release: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "hf/hub/models--someone--temporal-saes"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text(commit)
    (cache / "snapshots").mkdir()
    # The hub's cache keeps files as links to blobs.
    (cache / "blobs").mkdir()
    for number, path in enumerate(path for path in release.rglob("*") if path.is_file()):
        blob = cache / f"blobs/{number}"
        blob.write_bytes(path.read_bytes())
        link = cache / "snapshots" / commit / path.relative_to(release)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    script = (
        "from tsae import load_dictionary\n"
        "from tsae.interop.explanations import read_explanations\n"
        "dictionary, config = load_dictionary('someone/temporal-saes')\n"
        "print(dictionary.group_sizes, config['trainer']['temporal'], read_explanations('someone/temporal-saes')[3])\n"
        "from tsae.cli import main\n"
        f"main(['export', 'someone/temporal-saes', '--format', 'sae_lens', '--out', {str(tmp_path / 'lens')!r}])\n"
        "load_dictionary('someone/else')\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": ""}
    del environment["HF_HUB_CACHE"]
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert ran.stdout.splitlines() == ["(16, 64) p plants", str(tmp_path / "lens")], ran.stderr
    assert "TsaeError: someone/else: neither a folder here nor reachable on the hub" in ran.stderr
    metadata = json.loads((tmp_path / "lens/cfg.json").read_text())["metadata"]
    assert (metadata["model_name"], metadata["hf_hook_name"]) == ("gemma-2-2b", "model.layers.12")


def write_config(release: Path, buffer: dict | None = None, **trainer: object) -> None:
    config = {"trainer": {**TRAINER, **trainer}, "buffer": {**BUFFER, **(buffer or {})}}
    (release / "trainer_0/config.json").write_text(json.dumps(config))


def test_a_layer_without_a_name_of_a_module_is_the_output_of_that_block(release: Path, tmp_path: Path) -> None:
    write_config(release, submodule_name=None)
    export(release, "sae_lens", tmp_path / "lens")
    metadata = json.loads((tmp_path / "lens/cfg.json").read_text())["metadata"]
    assert (metadata["hook_name"], metadata["hf_hook_name"]) == ("blocks.12.hook_resid_post", "model.layers.12")
    export(release, "sae_bench", tmp_path / "bench")
    assert json.loads((tmp_path / "bench/config.json").read_text())["trainer"]["layer"] == 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 8}, "layer is 8 and submodule_name resid_post_layer_12; correct the one that is wrong"),
        ({"submodule_name": None, "layer": "twelve"}, "layer is 'twelve'; the number of a block"),
        ({"submodule_name": None, "layer": -1}, "layer is -1; the number of a block"),
        ({"submodule_name": "blocks.12.hook_resid_mid"}, "no module's output is that"),
        ({"buffer": {"io": "in"}}, "buffer.io is 'in'; only dictionaries on a module's output"),
        ({"buffer": {"io": "in_and_out"}}, "buffer.io is 'in_and_out'"),
    ],
)
def test_a_place_that_is_not_clear_is_refused(release: Path, tmp_path: Path, changes: dict, message: str) -> None:
    write_config(release, **changes)
    with pytest.raises(TsaeError, match=message):
        export(release, "sae_lens", tmp_path / "lens")
    assert not (tmp_path / "lens").exists()


@pytest.mark.skipif(
    not installed("dictionary_learning"),
    reason="DICTIONARY_LEARNING ITSELF TRAINED NOTHING: pip install --no-deps dictionary-learning==0.1.0",
)
def test_what_dictionary_learning_trains_tells_its_place(tmp_path: Path) -> None:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.training import trainSAE

    sizes = {"steps": 3, "activation_dim": 16, "dict_size": 32, "k": 4, "warmup_steps": 1, "threshold_start_step": 0}
    place = {"layer": 3, "lm_name": "EleutherAI/pythia-70m", "device": "cpu"}
    trainer = {"trainer": BatchTopKTrainer, **sizes, **place}
    # It has to be told twice where it runs.
    trainSAE(iter(torch.randn(8, 64, 16)), [trainer], steps=3, save_dir=str(tmp_path / "run"), device="cpu")
    export(tmp_path / "run", "sae_lens", tmp_path / "lens")
    metadata = json.loads((tmp_path / "lens/cfg.json").read_text())["metadata"]
    assert (metadata["model_name"], metadata["hook_name"]) == ("pythia-70m", "blocks.3.hook_resid_post")


def test_our_runs_carry_every_key_of_the_release(make_run, tmp_path: Path, activations) -> None:
    run, dictionary = make_run()
    export(run, "reference", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert set(TRAINER) <= set(config["trainer"])
    assert set(BUFFER) <= set(config["buffer"])
    state = torch.load(tmp_path / "out/ae.pt", weights_only=True)
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()} == {
        "W_enc": ((16, 80), torch.float32),
        "b_enc": ((80,), torch.float32),
        "W_dec": ((80, 16), torch.float32),
        "b_dec": ((16,), torch.float32),
        "k": ((), torch.int32),
        "threshold": ((), torch.float32),
        "group_sizes": ((2,), torch.int64),
    }
    assert int(state["k"]) == config["trainer"]["k"]
    again, _ = load_dictionary(tmp_path / "out")
    assert torch.equal(again.encode(activations), dictionary.encode(activations))


def test_explanations_follow_their_latents_into_a_chunk(release: Path, tmp_path: Path) -> None:
    export(release, "reference", tmp_path / "high", chunk=0)
    export(release, "reference", tmp_path / "low", chunk=1)
    assert read_explanations(tmp_path / "high") == {3: "plants"}
    assert read_explanations(tmp_path / "low") == {70 - 16: "years"}


def test_explanations_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "explanations.json"
    for content, message in (
        ('{"a": "b"}', "'a'"),
        ('{"1": 2}', "'1'"),
        ("[]", "JSON object"),
        ("{", "not valid JSON"),
    ):
        path.write_text(content)
        with pytest.raises(TsaeError, match=message):
            read_explanations(path)
