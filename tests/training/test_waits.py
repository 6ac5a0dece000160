"""What a training on a window leaves of its waits is for people: it breaks nothing that it stands beside."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tsae.checkpoint import RunFolder
from tsae.store.pairs import Waited, Waits
from tsae.training.waits import write_waits

WINDOW: Any = SimpleNamespace(bytes=3_000_000)


def waits(*steps: int) -> Waits:
    made = Waits()
    made.pools = [Waited(step, 1.0, 0.5, 0.0, 2_000_000) for step in steps]
    return made


def test_attempts_follow_each_other(tmp_path: Path) -> None:
    write_waits(RunFolder(tmp_path), waits(4, 8), WINDOW)
    write_waits(RunFolder(tmp_path), waits(12), WINDOW)
    lines = [json.loads(line) for line in (tmp_path / "window.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert (tmp_path / "window.png").exists()


def test_a_run_that_was_refused_gets_no_folder(tmp_path: Path) -> None:
    write_waits(RunFolder(tmp_path / "refused"), waits(4), WINDOW)
    assert not (tmp_path / "refused").exists()


def test_what_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "window.jsonl").mkdir()
    write_waits(RunFolder(tmp_path), waits(4), WINDOW)
    assert "what it waited for cannot be written" in caplog.text
