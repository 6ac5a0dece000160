"""GGUF files: the same numbers as the Hugging Face folder of the same weights, and one line for what cannot be read."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from tests.lm.gguf_writer import llama_folder, write_gguf
from tsae.cli import main
from tsae.config import run as configuration
from tsae.config.sections import ModelConfig
from tsae.interop.place import Place, lens_hook, module_path
from tsae.lm.model import LanguageModel, load_language_model
from tsae.lm.source import check_model, fingerprint_before, known_config, model_files, weights_fingerprint
from tsae.runtime.errors import TsaeError
from tsae.store.layout import store_path
from tsae.store.reader import Store

TEXTS = [f"document {n} tells of ships, seas and {n * n} islands that nobody has seen" for n in range(60)]
ROWS = torch.arange(1, 49).reshape(2, 24)
LENGTHS = torch.tensor([24, 17])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Llama in the hub's format."""
    return llama_folder(tmp_path_factory.mktemp("llama") / "tiny", TEXTS)


@pytest.fixture(scope="module")
def gguf(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in a GGUF file, alone in its folder."""
    return write_gguf(folder, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def project(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run's YAML, its texts and its model, all named from there; TSAE_HOME is elsewhere."""
    project = tmp_path / "project"
    project.mkdir()
    shutil.copy(gguf, project)
    (project / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    settings = {
        "model": {"name": "tiny.gguf", "layer": 1, "device": "cpu"},
        "data": {"source": "texts.jsonl", "context_length": 32, "max_tokens": 1500},
    }
    (project / "run.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setenv("TSAE_HOME", str(tmp_path / "home"))
    return project


def load(path: Path, **fields: object) -> LanguageModel:
    return load_language_model(ModelConfig(name=str(path), device="cpu", **{"layer": 1, **fields}))


@pytest.mark.parametrize("fields", [{"layer": 0}, {"layer": 2}, {"hook_point": "model.layers.1.self_attn"}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_read_is_what_the_folder_of_the_same_weights_gives(
    folder: Path, gguf: Path, dtype: str, fields: dict[str, object]
) -> None:
    ours, theirs = load(gguf, dtype=dtype, **fields), load(folder, dtype=dtype, **fields)
    assert str(ours.module.dtype) == f"torch.{dtype}"
    assert torch.equal(ours.read(ROWS, LENGTHS), theirs.read(ROWS, LENGTHS))
    assert torch.equal(ours.logits(ROWS, LENGTHS), theirs.logits(ROWS, LENGTHS))
    for text in (TEXTS[7], "  ünï, 漢字\n\n<|end|> x"):
        assert ours.tokenizer(text)["input_ids"] == theirs.tokenizer(text)["input_ids"]
    assert ours.tokenizer.chat_template.startswith("{% for m in messages %}")
    assert ours.identity["hook_path"] == theirs.identity["hook_path"]


def test_a_folder_that_holds_only_one_is_the_file(gguf: Path) -> None:
    file, folder = ModelConfig(name=str(gguf)), ModelConfig(name=str(gguf.parent))
    assert weights_fingerprint(file) == weights_fingerprint(folder) == fingerprint_before(file)
    assert model_files(file) == model_files(folder) == [gguf]
    assert torch.equal(load(gguf).read(ROWS, LENGTHS), load(gguf.parent).read(ROWS, LENGTHS))


def test_what_lies_beside_the_file_has_no_part_in_it(gguf: Path, tmp_path: Path) -> None:
    shutil.copy(gguf, tmp_path)
    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
        (tmp_path / name).write_text('{"chat_template": "other", "bos_token": "other", "hidden_size": 5}')
    (tmp_path / "chat_template.jinja").write_text("other")
    other = load(tmp_path / "tiny.gguf")
    assert other.identity == {**load(gguf).identity, "name": str(tmp_path / "tiny.gguf")}
    assert other.tokenizer.chat_template == load(gguf).tokenizer.chat_template


def test_the_head_tells_family_and_sizes_without_loading(folder: Path, gguf: Path) -> None:
    model, whole = ModelConfig(name=str(gguf)), json.loads((folder / "config.json").read_text())
    vocabulary = whole["vocab_size"]
    told = ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
    assert known_config(model) == {key: whole[key] for key in told}
    check_model(ModelConfig(name=str(gguf), layer=2), "run.yaml")
    with pytest.raises(TsaeError, match=r"run\.yaml: model\.layer: 3 is impossible; .*tiny\.gguf has blocks 0 to 2"):
        check_model(ModelConfig(name=str(gguf), layer=3), "run.yaml")
    with pytest.raises(TsaeError, match=rf"run\.yaml: data\.exclude_tokens: {vocabulary} is no token of .*tiny\.gguf"):
        check_model(model, "run.yaml", (5, vocabulary))
    assert lens_hook(Place(str(gguf), None, "model.layers.1.mlp")) == "blocks.1.hook_mlp_out"
    assert module_path(Place(str(gguf), 1)) == "model.layers.1"


@pytest.mark.parametrize("name", ["tiny.gguf", "."])
def test_a_relative_path_means_the_yamls_folder(project: Path, tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    if name == ".":
        (project / "run.yaml").write_text((project / "run.yaml").read_text().replace("tiny.gguf", name))
    config = configuration.load(project / "run.yaml")
    assert Path(config.model.name) == (project / name)
    assert configuration.store_settings(config)["model"]["name"] == name


def test_a_file_is_not_spread_over_devices(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["harvest", str(project / "run.yaml"), "model.device_map=auto"]) == 2
    shown = capsys.readouterr().err
    assert "model.device_map: " in shown
    assert "is a GGUF file, which is read as a whole" in shown


def test_a_harvest_by_the_command_line_holds_the_folders_activations(
    project: Path, folder: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = str(project / "run.yaml")
    assert main(["harvest", run]) == 0
    assert main(["harvest", run, f"model.name={folder}"]) == 0
    config, other = configuration.load(run), configuration.load(run, [f"model.name={folder}"])
    ours, theirs = Store.open(store_path(config)), Store.open(store_path(other))
    assert ours.path != theirs.path
    assert torch.equal(ours.read(range(20)), theirs.read(range(20)))
    # Another content is another model; the same content under the same name is the same one.
    before = store_path(config)
    (project / "tiny.gguf").write_bytes((project / "tiny.gguf").read_bytes()[:-4] + b"\0\0\0\1")
    assert store_path(config) != before


Make = Callable[[Path, Path], object]


def cut(size: int) -> Make:
    return lambda folder, path: path.write_bytes(write_gguf(folder, path).read_bytes()[:size])


def changed(place: int, content: bytes) -> Make:
    def make(folder: Path, path: Path) -> None:
        whole = write_gguf(folder, path).read_bytes()
        path.write_bytes(whole[:place] + content + whole[place + len(content) :])

    return make


def head(*entries: tuple[str, int, bytes]) -> Make:
    """Metadata alone: name, type and value of each entry."""
    packed = [
        struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value for name, kind, value in entries
    ]
    return lambda _, path: path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(packed)) + b"".join(packed))


LLAMA = ("general.architecture", 8, struct.pack("<Q", 5) + b"llama")
ZERO = struct.pack("<I", 0)
DAMAGED = "is damaged or was cut off: copy it again"

BROKEN: dict[str, tuple[Make, str]] = {
    "no GGUF": (lambda _, path: path.write_text("a text"), "is no GGUF file; name one, a folder in the hub's format"),
    "empty": (lambda _, path: path.write_bytes(b""), "is no GGUF file"),
    "cut in the weights": (cut(-100), "is damaged or was cut off: copy it again"),
    "cut in the head": (cut(1000), "is damaged or was cut off: copy it again"),
    "cut behind the magic": (cut(4), "is damaged or was cut off: copy it again"),
    "lengths that make no sense": (changed(24, b"\xff" * 8), "is damaged or was cut off: copy it again"),
    "an alignment of nothing": (head(LLAMA, ("general.alignment", 4, ZERO)), DAMAGED),
    "an alignment in words": (head(LLAMA, ("general.alignment", *LLAMA[1:])), DAMAGED),
    "a number of parts in words": (head(LLAMA, ("split.count", *LLAMA[1:])), DAMAGED),
    "an architecture that is a number": (head((LLAMA[0], 4, ZERO)), DAMAGED),
    "lists in lists without end": (head(LLAMA, ("deep", 9, struct.pack("<IQ", 9, 1) * 5000)), DAMAGED),
    "an old version": (changed(4, b"\1\0\0\0"), "is a GGUF file of version 1; versions 2 and 3 can be read"),
    "a part": (lambda folder, path: write_gguf(folder, path, parts=3), "is one of 3 parts of a model; join them"),
    "an unknown architecture": (
        lambda folder, path: write_gguf(folder, path, "rwkv6"),
        "cannot be loaded: GGUF model with architecture rwkv6 is not supported yet. (transformers ",
    ),
    "a missing tensor": (
        lambda folder, path: write_gguf(folder, path, without="blk.1.ffn_up.weight"),
        "lack 1 tensors (model.layers.1.mlp.up_proj.weight, …), which would be random",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_read_is_one_clear_line(project: Path, folder: Path, capfd, case: str) -> None:
    make, words = BROKEN[case]
    make(folder, project / "tiny.gguf")
    assert main(["harvest", str(project / "run.yaml")]) == 2
    error = capfd.readouterr().err
    assert words in error
    assert "model.name: " in error
    assert error.count("\n") == 1


def test_a_missing_file_is_named_where_it_was_looked_for_with_the_nearest(
    project: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (project / "tiny.gguf").rename(project / "tiny-2.gguf")
    config = configuration.load(project / "run.yaml")
    with pytest.raises(TsaeError) as caught:
        weights_fingerprint(config.model)
    assert str(caught.value) == (
        f"model.name: there is no file {project}/tiny.gguf; did you mean 'tiny-2.gguf'? name a model folder, a GGUF "
        "file, a Hugging Face id or 'embedded'"
    )


def test_a_folder_of_several_names_them(project: Path) -> None:
    shutil.copy(project / "tiny.gguf", project / "other.gguf")
    with pytest.raises(TsaeError, match=r"holds 2 GGUF files; name one of them: other\.gguf, tiny\.gguf$"):
        weights_fingerprint(ModelConfig(name=str(project)))


def test_a_configuration_beside_it_does_not_hide_it_and_weights_beside_it_do(project: Path, folder: Path) -> None:
    model = ModelConfig(name=str(project))
    shutil.copy(folder / "config.json", project)
    assert model_files(model) == [project / "tiny.gguf"]
    shutil.copy(folder / "model.safetensors", project)
    assert [path.name for path in model_files(model)] == ["model.safetensors", "config.json"]


def test_without_the_package_a_line_says_what_to_install(gguf: Path, monkeypatch) -> None:
    monkeypatch.setattr("tsae.lm.gguf_file.find_spec", lambda _: None)
    monkeypatch.setattr("tsae.lm.gguf_file._known", {})
    with pytest.raises(
        TsaeError, match=r'tiny\.gguf: reading GGUF files takes another package: pip install "tsae\[gguf\]"$'
    ):
        weights_fingerprint(ModelConfig(name=str(gguf)))
