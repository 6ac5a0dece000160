"""The notebooks of docs/notebooks run as they stand, without a hub, and print what is stored in them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.docs.notebooks import code_cells, executed

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "docs" / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """Where all of them run: what one has trained, the next one finds."""
    made = tmp_path_factory.mktemp("notebooks")
    shutil.copytree(corpus, made / "runs" / "corpus")
    return made


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_prints_what_is_stored(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TSAE_HOME", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    stored = ["".join(line for output in cell["outputs"] for line in output["text"]) for cell in code_cells(notebook)]
    printed = executed(notebook, folder)
    assert any(stored)
    # Numbers and tokens differ with the machine and the text that is installed; how much is said does not.
    assert [len(text.splitlines()) for text in printed] == [len(text.splitlines()) for text in stored]


def test_one_line_names_the_model() -> None:
    for path in NOTEBOOKS:
        cells = code_cells(json.loads(path.read_text(encoding="utf-8")))
        lines = [line for cell in cells for line in cell["source"] if 'embedded", "layer' in line]
        assert len(lines) == 1, path
