"""Model folders that are damaged, incomplete or contradict themselves: one line that names what is wrong."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tsae.config.sections import ModelConfig
from tsae.lm.model import load_language_model
from tsae.runtime.errors import TsaeError

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 123456\n"
UP = "gpt_neox.layers.1.mlp.dense_h_to_4h.weight"

Spoil = Callable[[Path], Any]


def point(name: str) -> Spoil:
    return lambda folder: (folder / name).write_text(POINTER)


def cut(name: str, size: int) -> Spoil:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return spoil


def config(**fields: Any) -> Spoil:
    return edit("config.json", lambda content: content.update(fields))


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return spoil


def pickled(then: Spoil) -> Spoil:
    def spoil(folder: Path) -> None:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        then(folder)

    return spoil


@pytest.fixture
def spoilt(folders: dict[str, Path], tmp_path: Path) -> Callable[[Spoil], str]:
    """Spoil a copy of a model folder, and the message of the error that loading it raises."""

    def load(spoil: Spoil) -> str:
        folder = shutil.copytree(folders["gpt_neox"], tmp_path / "spoilt")
        spoil(folder)
        with pytest.raises(TsaeError) as caught:
            load_language_model(ModelConfig(name=str(folder), layer=1, device="cpu"))
        assert "\n" not in str(caught.value)
        return str(caught.value).replace(str(folder), "FOLDER")

    return load


@pytest.mark.parametrize(
    ("spoil", "file"),
    [
        (point("model.safetensors"), "model.safetensors"),
        (point("tokenizer.json"), "tokenizer.json"),
        (point("config.json"), "config.json"),
        (pickled(point("pytorch_model.bin")), "pytorch_model.bin"),
    ],
)
def test_a_pointer_in_the_place_of_a_file_is_named(spoilt: Callable[[Spoil], str], spoil: Spoil, file: str) -> None:
    message = spoilt(spoil)
    assert message.startswith("model.name: FOLDER cannot be loaded: ")
    assert f"({file} is a git-lfs pointer, not the file itself: run `git lfs pull`" in message


@pytest.mark.parametrize(
    ("spoil", "file"),
    [
        (cut("model.safetensors", 0), "model.safetensors"),
        (cut("model.safetensors", 100), "model.safetensors"),
        (cut("model.safetensors", -5000), "model.safetensors"),
        (pickled(cut("pytorch_model.bin", 0)), "pytorch_model.bin"),
        (pickled(cut("pytorch_model.bin", -5000)), "pytorch_model.bin"),
        (cut("tokenizer.json", -50), "tokenizer.json"),
        (cut("config.json", -50), "config.json"),
    ],
)
def test_a_file_that_was_cut_off_is_named(spoilt: Callable[[Spoil], str], spoil: Spoil, file: str) -> None:
    assert f"({file} is damaged or was cut off: copy it again)" in spoilt(spoil)


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.file),)


def test_a_pickle_that_would_run_code_is_refused_and_does_not(spoilt: Callable[[Spoil], str], tmp_path: Path) -> None:
    def plant(folder: Path) -> None:
        torch.save({UP: Runs(tmp_path / "ran")}, folder / "pytorch_model.bin")

    assert "cannot be loaded: its pickle holds more than tensors, and none of it was run" in spoilt(pickled(plant))
    assert not (tmp_path / "ran").exists()


def test_code_of_a_model_is_refused_without_a_question(
    spoilt: Callable[[Spoil], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plant(folder: Path) -> None:
        (folder / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nclass Own: pass\n")
        config(model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})(folder)

    monkeypatch.setattr("builtins.input", lambda _="": "y")  # what a person may answer where transformers asks
    assert "cannot be loaded: it has code of its own, which is never run here" in spoilt(plant)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("part", ["model", "pre_tokenizer"])
def test_a_tokenizer_of_an_unknown_kind_is_one_clear_line(spoilt: Callable[[Spoil], str], part: str) -> None:
    message = spoilt(edit("tokenizer.json", lambda content: content.update({part: {"type": "Newest"}})))
    assert "the folder needs a tokenizer.json that tokenizers " in message


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_act": "newest"},
        {"num_attention_heads": 0},
        {"hidden_size": "big"},
        {"rope_parameters": {"rope_type": "x"}},
    ],
)
def test_a_configuration_that_makes_no_model_is_one_clear_line(
    spoilt: Callable[[Spoil], str], fields: dict[str, Any]
) -> None:
    message = spoilt(config(**fields))
    assert message.startswith("model.name: FOLDER cannot be loaded: ")
    assert "the folder needs a config.json and a model.safetensors that fit together" in message


def test_a_model_whose_own_forward_fails_is_one_clear_line(spoilt: Callable[[Spoil], str]) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 3.0}  # of a head, of which 1 is all
    message = spoilt(config(rope_parameters=rope))
    assert message.startswith("model.name: FOLDER is loaded but cannot run: RuntimeError: ")
    assert message.endswith("mostly its config.json contradicts itself")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (weights(lambda tensors: tensors.pop(UP)), f"lack 1 tensors ({UP}, …), which would be random"),
        (weights(lambda tensors: tensors.pop("embed_out.weight")), "lack 1 tensors (lm_head.weight, …)"),
        (config(num_hidden_layers=5), "lack 24 tensors (gpt_neox.layers.3.attention.dense.bias, …)"),
        (
            weights(lambda tensors: tensors.update({UP: torch.zeros(7, 3)})),
            f"1 tensors of FOLDER have another shape than its config.json asks for: {UP} is [7, 3], not [64, 32]",
        ),
        (
            config(vocab_size=400),
            "2 tensors of FOLDER have another shape than its config.json asks for: gpt_neox.embed_in",
        ),
    ],
)
def test_tensors_that_are_missing_or_of_another_shape_are_named(
    spoilt: Callable[[Spoil], str], spoil: Spoil, words: str
) -> None:
    assert words in spoilt(spoil)


def test_tied_weights_are_not_missing(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["gemma2"], tmp_path / "tied")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    lm = load_language_model(ModelConfig(name=str(folder), layer=1, device="cpu"))
    assert lm.module.lm_head.weight is lm.module.model.embed_tokens.weight


def test_a_damaged_file_in_the_hubs_cache_is_named(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit = "a" * 40
    snapshot = tmp_path / "models--someone--model" / "snapshots" / commit
    shutil.copytree(folders["gpt_neox"], snapshot)
    (tmp_path / "models--someone--model" / "refs").mkdir()
    (tmp_path / "models--someone--model" / "refs" / "main").write_text(commit)
    model = ModelConfig(name="someone/model", layer=1, device="cpu")
    assert load_language_model(model).hook_path == "gpt_neox.layers.1"
    cut("model.safetensors", -5000)(snapshot)
    with pytest.raises(
        TsaeError, match=r"someone/model cannot be loaded: .*\(model\.safetensors is damaged or was cut"
    ):
        load_language_model(model)
