"""A real Slurm for these tests, and sweeps on it whose stages are errands or trainings on a tiny synthetic world.

Without Slurm on Debian these tests fail; elsewhere they are skipped, and the summary says so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

HERE = Path(__file__).parent

if TYPE_CHECKING:
    from tests.system.slurm.slurm_commands import CommandLine
    from tests.system.slurm.slurm_sweep import SweepOnSlurm

LAB = HERE / "lab"
SLURM_CONF = Path(os.environ.get("LAB", "/run/tsae-slurm")) / "etc" / "slurm.conf"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def slurm(require: Callable[[str, bool, str], None], installs: Callable[[str], bool]) -> Iterator[Callable[..., None]]:
    """The lab, started; a function that calls its script. Ended with the session unless it ran before."""
    program = "apt-get" if installs("slurm") else "slurmctld"
    can = shutil.which(program) is not None and os.getuid() == 0
    require("slurm", can, "as root on Debian, `tests/system/slurm/lab start` installs and starts it")

    def lab(*arguments: str) -> None:
        answer = subprocess.run([str(LAB), *arguments], capture_output=True, text=True, check=False)
        assert answer.returncode == 0, answer.stderr

    with _variables():
        from tsae.sweep.schedulers import find

        ran = find("slurm").answers()
    lab("start")
    yield lab
    if not ran:
        lab("stop")


@contextmanager
def _variables(**more: str) -> Iterator[None]:
    """Variables by which Slurm's commands find the lab; unset again for the tests of others."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in {"SLURM_CONF": str(SLURM_CONF), **more}.items():
            monkeypatch.setenv(name, value)
        yield


@pytest.fixture
def sweep(tmp_path: Path) -> Iterator[SweepOnSlurm]:
    """A sweep of one test; what is left of it in Slurm ends with the test."""
    from tests.system.slurm.slurm_sweep import SweepOnSlurm
    from tsae.sweep.schedulers import find

    with _variables(TSAE_HOME=str(tmp_path)):
        made = SweepOnSlurm(tmp_path)
        yield made
        find("slurm").cancel(made.alive())


@pytest.fixture
def tiny(sweep: SweepOnSlurm) -> CommandLine:
    """The commands for a sweep of two points."""
    from tests.system.slurm.slurm_commands import CommandLine

    sweep.folder = sweep.home / "sweeps" / "tiny-base"
    return CommandLine(sweep.home)


@pytest.fixture(scope="session")
def long_before(slurm: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> SweepOnSlurm:
    """Jobs whose time is over after a minute: submitted before the first test, looked at by the last ones."""
    from tests.system.slurm.slurm_sweep import SweepOnSlurm

    del slurm
    home = tmp_path_factory.mktemp("long")
    counter, other = str(home / "counter"), str(home / "other")
    with _variables(TSAE_HOME=str(home)):
        made = SweepOnSlurm(home)
        made.submit(
            made.stage("in time", "tests.system.slurm.errands:count_up", counter, 450, 0.1, time="1m"),
            made.stage(
                "after", "tests.system.slurm.errands:note", str(home / "after"), kind="evaluate", after=("in time",)
            ),
        )
        made.submit(
            made.stage("never", "tests.system.slurm.errands:count_up", other, 7000, 0.1, time="1m"), max_restarts=0
        )
    return made


@pytest.fixture(autouse=True)
def _in_the_lab(long_before: SweepOnSlurm) -> Iterator[None]:
    """Start the lab, and the clock of the slow jobs, with the first test."""
    del long_before
    with _variables():
        yield
