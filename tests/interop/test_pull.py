"""Dictionaries from the hub become runs; the hub is its cache, which is read without a network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from tests.interop.test_authors_layout import release
from tsae.checkpoint import load_dictionary
from tsae.cli import main
from tsae.interop import hub
from tsae.interop.explanations import read_explanations

__all__ = ["release"]

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def on_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], None]:
    """Put a folder on the hub, as this machine has fetched it."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TSAE_HOME", str(tmp_path / "home"))

    def put(repo_id: str, folder: Path) -> None:
        place = cache / f"models--{repo_id.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs/main").write_text(COMMIT)
        (place / "blobs").mkdir()
        for number, path in enumerate(path for path in folder.rglob("*") if path.is_file()):
            shutil.copy(path, place / f"blobs/{number}")
            link = place / "snapshots" / COMMIT / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(place / f"blobs/{number}", link.parent))

    return put


def test_the_authors_release_becomes_a_run_in_one_line(
    on_hub: Callable[[str, Path], None], release: Path, tmp_path: Path, activations, capsys
) -> None:
    on_hub("someone/temporal-saes", release)
    assert main(["pull", "someone/temporal-saes"]) == 0
    run = tmp_path / "home/checkpoints/temporal-saes"
    assert capsys.readouterr().out == f"{run}\n"
    for checkpoint in (None, 1000):
        found, expected = (load_dictionary(each, checkpoint=checkpoint)[0] for each in (run, release))
        assert torch.equal(found.encode(activations), expected.encode(activations))
    assert read_explanations(run) == {3: "plants", 70: "years"}
    assert not any(path.is_symlink() for path in run.rglob("*"))
    assert main(["pull", "someone/temporal-saes"]) == 2
    assert "exists already and is left as it is" in capsys.readouterr().err


def test_what_was_pushed_comes_back_and_a_folder_inside_can_be_named(
    on_hub: Callable[[str, Path], None], make_run, tmp_path: Path, activations, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, dictionary = make_run()
    pushed = tmp_path / "pushed"
    assert main(["push", str(run), "someone/tsae", "--dry-run", "--with", "sae_lens", "--out", str(pushed)]) == 0
    on_hub("someone/tsae", pushed)
    asked: list[list[str]] = []
    fetch = hub.fetch
    monkeypatch.setattr(hub, "fetch", lambda *given: asked.append(given[1]) or fetch(*given))
    for source, name in (("someone/tsae", "whole"), ("someone/tsae/sae_lens", "lens")):
        assert main(["pull", source, "--out", str(tmp_path / name)]) == 0
        found, _ = load_dictionary(tmp_path / name)
        torch.testing.assert_close(found.encode(activations), dictionary.encode(activations))
    assert (tmp_path / "whole/trainer_0/resolved.yaml").is_file()
    assert asked[2:] == [["sae_lens/*.json"], ["sae_lens/*.json", "sae_lens/*.safetensors"]]


def test_what_cannot_be_had_is_one_line_and_leaves_nothing(
    on_hub: Callable[[str, Path], None], release: Path, tmp_path: Path, capsys
) -> None:
    many = tmp_path / "many"
    for name in ("layer_5", "layer_12"):
        shutil.copytree(release / "trainer_0", many / name / "trainer_0")
    on_hub("someone/many", many)
    broken = tmp_path / "broken"
    shutil.copytree(release, broken)
    os.truncate(broken / "trainer_0/ae.pt", 900)
    on_hub("someone/broken", broken)
    for source, said in (
        ("someone/many", "someone/many/layer_12/trainer_0, someone/many/layer_5/trainer_0"),
        ("someone/many/layer_6", "no dictionary is here"),
        ("someone/broken", "cut off or damaged"),
        ("someone/none", "neither a folder here nor reachable on the hub"),
        ("some one/none", "some one/none"),
        ("someone/many/../broken", "a folder inside the repository is expected"),
    ):
        assert main(["pull", source]) == 2, source
        shown = capsys.readouterr().err
        assert said in shown
        assert shown.count("\n") == 1
    assert not (tmp_path / "home").exists()
    assert main(["pull", "someone/many/layer_5"]) == 0
    assert (tmp_path / "home/checkpoints/layer_5/trainer_0/ae.pt").is_file()
