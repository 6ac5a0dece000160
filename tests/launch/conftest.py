"""The launcher's modules are scripts beside each other, not an installed package."""

from __future__ import annotations

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "launch"))

import pytest  # noqa: E402
import sweepfile  # noqa: E402
import yaml  # noqa: E402
from plan import Plan, make_plan  # noqa: E402


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A TSAE_HOME of the test's own."""
    folder = tmp_path / "home"
    monkeypatch.setenv("TSAE_HOME", str(folder))
    return folder


@pytest.fixture
def write_sweep(tmp_path):
    """Write a sweep of the given sections to a file; returns its path."""

    def write(**sections):
        path = tmp_path / f"{sections.pop('file', 'little')}.yaml"
        path.write_text(yaml.safe_dump(sections, sort_keys=False))
        return path

    return write


@pytest.fixture
def plan_of(write_sweep):
    """The plan of a sweep of the given sections; `command_line` are overrides, `on` stands for --base."""

    def make(command_line: tuple[str, ...] = (), on: str | None = None, named: str | None = None, **sections) -> Plan:
        return make_plan(sweepfile.load_sweep(write_sweep(**sections), on, list(command_line), named))

    return make
