"""A real Slurm for these tests, and sweeps on it whose stages are errands or trainings on a tiny synthetic world.

Without Slurm on Debian these tests fail; elsewhere they are skipped, and the summary says so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[2] / "launch")]

if TYPE_CHECKING:
    from slurm_commands import CommandLine
    from slurm_sweep import SweepOnSlurm

LAB = HERE / "lab"
SLURM_CONF = Path(os.environ.get("LAB", "/run/tsae-slurm")) / "etc" / "slurm.conf"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def slurm(require: Callable[[str, bool, str], None]) -> Iterator[Callable[..., None]]:
    """The lab, started; a function that calls its script. Ended with the session unless it ran before."""
    can = shutil.which("apt-get") is not None and os.getuid() == 0
    require("slurm", can, "tests/system/slurm/lab starts it on Debian, as root")

    def lab(*arguments: str) -> None:
        answer = subprocess.run([str(LAB), *arguments], capture_output=True, text=True, check=False)
        assert answer.returncode == 0, answer.stderr

    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(SLURM_CONF)
    ran = (
        shutil.which("scontrol") is not None
        and subprocess.run(["scontrol", "ping"], check=False, capture_output=True).returncode == 0
    )
    lab("start")
    yield lab
    if not ran:
        lab("stop")
    del os.environ["SLURM_CONF"]
    if before is not None:
        os.environ["SLURM_CONF"] = before


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SweepOnSlurm]:
    """A sweep of one test; what is left of it in Slurm ends with the test."""
    yield from _sweep(tmp_path, monkeypatch)


@pytest.fixture
def tiny(sweep: SweepOnSlurm) -> CommandLine:
    """The commands for a sweep of two points."""
    from slurm_commands import CommandLine

    sweep.folder = sweep.home / "sweeps" / "tiny-base"
    return CommandLine(sweep.home)


def _sweep(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SweepOnSlurm]:
    from slurm_query import cancel
    from slurm_sweep import SweepOnSlurm

    monkeypatch.setenv("TSAE_HOME", str(home))
    made = SweepOnSlurm(home)
    yield made
    cancel(made.alive())


@pytest.fixture(scope="session")
def long_before(slurm: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Iterator[SweepOnSlurm]:
    """Jobs whose time is over after a minute: submitted before the first test, looked at by the last ones."""
    del slurm
    with pytest.MonkeyPatch.context() as monkeypatch:
        for made in _sweep(tmp_path_factory.mktemp("long"), monkeypatch):
            counter, other = str(made.home / "counter"), str(made.home / "other")
            made.submit(
                made.stage("in time", "errands:count_up", counter, 450, 0.1, time="1m"),
                made.stage("after", "errands:note", str(made.home / "after"), kind="evaluate", after=("in time",)),
            )
            made.submit(made.stage("never", "errands:count_up", other, 7000, 0.1, time="1m"), max_restarts=0)
            yield made


@pytest.fixture(autouse=True)
def _submitted_first(long_before: SweepOnSlurm) -> None:
    """Start the lab, and the clock of the slow jobs, with the first test."""
    del long_before
