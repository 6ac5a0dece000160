"""Sweeps over tiny runs, each test with a TSAE_HOME of its own."""

from __future__ import annotations

import pytest
import yaml

from tsae.sweep import sweepfile
from tsae.sweep.plan import Plan, make_plan


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
