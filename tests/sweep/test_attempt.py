"""The record of what an attempt was made of."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest

from tsae.sweep import attempt


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of one commit, from which the package is taken to come."""
    folder = tmp_path / "checkout"
    (folder / "tsae").mkdir(parents=True)
    (folder / "tsae" / "a.py").write_text("one")
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    monkeypatch.setattr(attempt, "PACKAGE", folder / "tsae")
    return folder


def recorded(folder: Path, image: str | None = None) -> dict[str, object]:
    folder.mkdir(exist_ok=True)
    attempt.write_provenance(folder, image)
    record: dict[str, object] = json.loads((folder / "provenance.json").read_text())
    return record


def test_commit_changes_and_new_files_are_recorded_whatever_bytes_they_hold(checkout: Path, tmp_path: Path) -> None:
    record = recorded(tmp_path / "clean")
    assert len(str(record["commit"])) == 40
    assert record["changes"] is None
    (checkout / "tsae" / "a.py").write_bytes("zwölf".encode("latin-1"))
    (checkout / "tsae" / "new.py").touch()
    record = recorded(tmp_path / "changed")
    assert record["untracked"] == ["tsae/new.py"]
    assert "+zw\ufffdlf" in (tmp_path / "changed" / "changes.diff").read_text()


def test_without_git_the_record_says_so(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del checkout
    monkeypatch.setenv("PATH", str(tmp_path))
    assert recorded(tmp_path / "attempt")["commit"] == "git: not found"


def test_an_image_is_recorded_with_its_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tmp_path / "tsae.sif"
    image.write_bytes(b"image")
    found = recorded(tmp_path / "file", str(image))["container"]
    assert found == {"image": str(image), "sha256": hashlib.sha256(b"image").hexdigest()}
    docker = tmp_path / "bin" / "docker"
    docker.parent.mkdir()
    docker.write_text('#!/bin/sh\n[ "$*" = "image inspect --format={{.Id}} tsae" ] && echo sha256:abc\n')
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", str(docker.parent))
    assert recorded(tmp_path / "docker", "tsae")["container"] == {"image": "tsae", "sha256": "abc"}
    assert recorded(tmp_path / "unknown", "other")["container"] == {"image": "other", "sha256": None}
