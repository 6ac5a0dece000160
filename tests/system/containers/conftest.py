"""Both images, built once; without the tools these tests are skipped, and the end of the run says so in so many words."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from container_lab import COMMIT, HERE, QUICKSTART, REPOSITORY, USER, Lab, make_lab, results, run

FINDINGS = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FINDINGS] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash.get(FINDINGS, []):
        terminalreporter.write_line(f"containers: {line}")


@pytest.fixture(scope="session")
def say(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Add a line to the end of the run's output."""
    return request.config.stash.setdefault(FINDINGS, []).append


@pytest.fixture(scope="session")
def lab(require: Callable[[str, bool, str], None], say: Callable[[str], None]) -> Iterator[Lab]:
    """The tools, the base and the wheels."""
    answer = subprocess.run([str(HERE / "install_tools.sh")], capture_output=True, text=True, check=False)
    if answer.returncode:
        why = answer.stderr.strip().splitlines()[-1]
        say(f"NOT TESTED, no image was built: {why}")
        require("containers", False, f"buildah, podman and Apptainer cannot be installed here: {why}")
    lab = make_lab()
    try:
        lab.prepare()
        yield lab
    finally:
        lab.remove()


@pytest.fixture(scope="session")
def docker_build(lab: Lab) -> str:
    """What `docker build` said."""
    lab.import_base()
    with lab.timed("docker build"):
        return lab.build_with_docker(COMMIT)


@pytest.fixture(scope="session")
def sif_build(lab: Lab) -> str:
    """What `apptainer build` said."""
    with lab.timed("apptainer build"):
        return lab.build_with_apptainer(COMMIT)


@pytest.fixture(scope="session")
def user(lab: Lab) -> Iterator[str]:
    """The name of an ordinary user of this machine, with a home."""
    home = lab.folder / "home"
    run(["useradd", "--create-home", "--home-dir", str(home), USER])
    yield USER
    run(["userdel", "--remove", USER], check=False)


@pytest.fixture(scope="session")
def outside(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The numbers of the small quickstart without a container."""
    home = tmp_path_factory.mktemp("outside")
    run([sys.executable, "launch/sweep.py", *QUICKSTART], REPOSITORY, {"TSAE_HOME": str(home)})
    return results(home)
