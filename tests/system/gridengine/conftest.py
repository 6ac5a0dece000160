"""A real Grid Engine for these tests, and the commands for a sweep of tiny runs on it.

Without Grid Engine on Debian these tests fail; elsewhere they are skipped, and the summary says so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.system.slurm.slurm_sweep import tiny_run

HERE = Path(__file__).parent
LAB = HERE / "lab"
PATIENCE = 150.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gridengine)


@pytest.fixture(scope="session")
def gridengine(require: Callable[[str, bool, str], None], installs: Callable[[str], bool]) -> Iterator[dict[str, str]]:
    """The lab, started: the variables by which its commands find it. Ended with the session unless it ran before."""
    program = "apt-get" if installs("gridengine") else "sge_qmaster"
    can = shutil.which(program) is not None and os.getuid() == 0
    require("gridengine", can, "as root on Debian, `tests/system/gridengine/lab start` installs and starts it")
    said = subprocess.run([LAB, "environment"], capture_output=True, text=True, check=True).stdout
    variables = dict(line.split("=", 1) for line in said.splitlines())
    ran = subprocess.run([LAB, "status"], check=False).returncode == 0
    started = subprocess.run([LAB, "start"], capture_output=True, text=True, check=False)
    assert started.returncode == 0, started.stderr
    yield variables
    if not ran:
        subprocess.run([LAB, "stop"], check=True)


class GridSweep:
    """A sweep over two splits, and what a user does with it."""

    def __init__(self, home: Path, variables: dict[str, str], **training: Any) -> None:
        self.home = home
        self.environment = {**os.environ, **variables, "TSAE_HOME": str(home), "OMP_NUM_THREADS": "1"}
        (home / "base.yaml").write_text(yaml.safe_dump(tiny_run(home / "store", **training)))
        grid = {"sae.split_fraction": [0.2, 0.4]}
        (home / "tiny.yaml").write_text(yaml.safe_dump({"base": str(home / "base.yaml"), "grid": grid}))
        self.folder = home / "sweeps" / "tiny-base"

    def site(self, **settings: Any) -> None:
        """What the cluster's file says."""
        (self.home / "cluster.yaml").write_text(yaml.safe_dump(settings))

    def run(self, *command: str, code: int = 0) -> str:
        """What a command says, all of it; it must end with `code`."""
        done = subprocess.run(command, cwd=self.home, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def tsae(self, command: str, *words: str, code: int = 0) -> str:
        """`tsae <command> tiny.yaml …`."""
        cluster = ["--cluster", "cluster.yaml"] if command == "sweep" else []
        return self.run(sys.executable, "-m", "tsae.cli", command, "tiny.yaml", *cluster, *words, code=code)

    def states(self) -> dict[str, list[str]]:
        """Point → stage and state, as `tsae status` tells."""
        lines = self.tsae("status", "--all").splitlines()
        first = next(number for number, line in enumerate(lines) if line.startswith("point"))
        rows = [line.split() for line in lines[first + 1 :] if line and not line.startswith(" ")]
        return {row[0]: row[1:3] for row in rows}

    def wait(self, reached: Callable[[], Any]) -> Any:
        """What `reached` gives, once that is something."""
        deadline = time.monotonic() + PATIENCE
        while not (found := reached()):
            assert time.monotonic() < deadline, self.tsae("status") + self.run("qstat")
            time.sleep(0.3)
        return found

    def wait_until_over(self) -> None:
        """Until the qmaster has no job any more."""
        self.wait(lambda: not self.run("qstat").strip())

    def weights(self, point: str) -> Path:
        """The trained weights of a point."""
        return self.home / "checkpoints" / "tiny-base" / point / "trainer_0" / "ae.pt"


@pytest.fixture
def sweep_of(gridengine: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., GridSweep]]:
    """Make the sweep; what is left of it in the queue ends with the test."""
    made: list[GridSweep] = []

    def make(**training: Any) -> GridSweep:
        made.append(GridSweep(tmp_path, gridengine, **training))
        made[-1].site(defaults={"time": "10m", "cpus": 1})
        return made[-1]

    yield make
    for sweep in made:
        found = {**sweep.environment, "PATH": os.environ["PATH"]}
        subprocess.run(["qdel", "-f", "*"], env=found, capture_output=True, check=False)
