"""The file that a launcher reads how far a command is from."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from tsae.runtime import metadata
from tsae.runtime.progress import SHAPE, Progress


def _killed(path: Path) -> None:
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    Progress("train", 10, "steps", path).update(3)


def test_what_a_kill_leaves_of_a_report_the_next_one_takes_over(tmp_path: Path) -> None:
    path = tmp_path / "run" / "progress.json"
    Progress("train", 10, "steps", path).update(2)
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(list(path.parent.iterdir())) == 2
    Progress("train", 10, "steps", path).update(10)
    assert list(path.parent.iterdir()) == [path]
    assert metadata.read(path, SHAPE)["done"] == 10


def test_two_commands_on_one_run_report_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, replace = tmp_path / "progress.json", os.replace
    one, other = (Progress(stage, 10, "steps", path) for stage in ("probe", "features"))

    def meanwhile(*places: Path) -> None:
        monkeypatch.setattr(os, "replace", replace)
        other.update(10)
        replace(*places)

    monkeypatch.setattr(os, "replace", meanwhile)
    one.update(10)
    assert list(tmp_path.iterdir()) == [path]
    assert metadata.read(path, SHAPE)["stage"] == "features"
