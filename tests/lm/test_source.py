from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tsae.config.sections import ModelConfig
from tsae.lm.source import check_model, weights_fingerprint
from tsae.runtime.errors import TsaeError


def test_an_impossible_layer_is_refused_from_the_config_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 4}))
    check_model(ModelConfig(name=str(tmp_path), layer=3), "run.yaml")
    with pytest.raises(TsaeError) as caught:
        check_model(ModelConfig(name=str(tmp_path), layer=9), "run.yaml")
    assert str(caught.value) == f"run.yaml: model.layer: 9 is impossible; {tmp_path} has blocks 0 to 3"


def test_tokens_beyond_the_vocabulary_are_refused_from_the_config_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 300}, "vocab_size": 999}))
    model = ModelConfig(name=str(tmp_path), hook_point="model.layers.1.mlp")
    check_model(model, "run.yaml", (0, 299))
    with pytest.raises(TsaeError) as caught:
        check_model(model, "run.yaml", (0, 300))
    assert (
        str(caught.value)
        == f"run.yaml: data.exclude_tokens: 300 is no token of {tmp_path}; ids from 0 to 299 are possible"
    )


def test_with_a_hook_point_the_layer_is_only_a_label(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"num_hidden_layers": 4}}))
    check_model(ModelConfig(name=str(tmp_path), layer=9, hook_point="model.layers.1.mlp"), "run.yaml")


def test_a_hub_model_is_judged_by_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = ModelConfig(name="someone/model", layer=9)
    check_model(model, "run.yaml")
    snapshot = tmp_path / "models--someone--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({"n_layer": 6}))
    (tmp_path / "models--someone--model" / "refs").mkdir()
    (tmp_path / "models--someone--model" / "refs" / "main").write_text("abc")
    with pytest.raises(TsaeError, match="someone/model has blocks 0 to 5"):
        check_model(model, "run.yaml")


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "a/b/c"])
def test_a_path_that_is_no_folder_is_refused(name: str) -> None:
    with pytest.raises(TsaeError, match=r"run\.yaml: model\.name: there is no folder"):
        check_model(ModelConfig(name=name), "run.yaml")


def test_what_is_neither_folder_nor_file_is_refused_unread(tmp_path: Path) -> None:
    pipe = tmp_path / "model.gguf"
    os.mkfifo(pipe)
    with pytest.raises(TsaeError, match=r"model\.name: .* is neither a folder nor a file"):
        check_model(ModelConfig(name=str(pipe)), "run.yaml")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TsaeError, match=r"holds no config\.json"):
        check_model(ModelConfig(name=str(tmp_path)), "run.yaml")


def test_the_fingerprint_follows_the_weights_and_not_the_place(folders: dict[str, Path], tmp_path: Path) -> None:
    original = weights_fingerprint(ModelConfig(name=str(folders["gpt_neox"])))
    copy = shutil.copytree(folders["gpt_neox"], tmp_path / "copy")
    assert weights_fingerprint(ModelConfig(name=str(copy))) == original
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert weights_fingerprint(ModelConfig(name=str(copy))) != original


def test_checking_needs_no_heavy_import() -> None:
    program = (
        "import sys; from tsae.config.run import ModelConfig; from tsae.lm.source import check_model, weights_fingerprint;"
        "import tsae.lm.embedded_lm; check_model(ModelConfig(), 'x');"
        "print([name for name in ('torch', 'transformers', 'nnsight', 'sklearn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("text", ["version https://git-lfs.github.com/spec/v1\n", "[]", '{"n_layer": 6'])
def test_a_config_that_is_no_json_object_is_refused_from_the_file_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(
        TsaeError, match=r"run\.yaml: model\.name: .*config\.json is not the configuration of a model: "
    ):
        check_model(ModelConfig(name=str(tmp_path)), "run.yaml")
