"""Both images, built once; without the tools these tests are skipped, and the end of the run says so in so many words."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.system.containers.container_lab import (
    COMMIT,
    HERE,
    QUICKSTART,
    REPOSITORY,
    USER,
    Lab,
    make_lab,
    results,
    run,
)

TOOLS = ("mmdebstrap", "buildah", "podman", "runc", "apptainer")
FINDINGS = pytest.StashKey[list[str]]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash.get(FINDINGS, []):
        terminalreporter.write_line(f"containers: {line}")


@pytest.fixture(scope="session")
def say(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Add a line to the end of the run's output."""
    return request.config.stash.setdefault(FINDINGS, []).append


@pytest.fixture(scope="session")
def lab(
    require: Callable[[str, bool, str], None], installs: Callable[[str], bool], say: Callable[[str], None]
) -> Iterator[Lab]:
    """The tools, the base and the wheels."""
    if not installs("containers") and not all(map(shutil.which, TOOLS)):
        say(
            "NOT TESTED, no image was built: as root on Debian, tests/system/containers/install_tools.sh brings the tools"
        )
        require("containers", False, "as root on Debian, tests/system/containers/install_tools.sh brings them")
    answer = subprocess.run([str(HERE / "install_tools.sh")], capture_output=True, text=True, check=False)
    if answer.returncode:
        why = (answer.stderr.strip() or f"exit code {answer.returncode}").splitlines()[-1]
        say(f"NOT TESTED, no image was built: {why}")
        require("containers", False, f"buildah, podman and Apptainer cannot be installed here: {why}")
    lab = make_lab()
    try:
        lab.prepare()
        yield lab
    finally:
        lab.remove()


@pytest.fixture(scope="session")
def begun(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Any]]]:
    """Both builds and the run outside, two at a time."""
    home = tmp_path_factory.mktemp("outside")
    with ThreadPoolExecutor(2) as pool:
        yield {
            "docker": pool.submit(lab.build_with_docker, COMMIT),
            "apptainer": pool.submit(lab.build_with_apptainer, COMMIT),
            "outside": pool.submit(run_quickstart, home),
        }


def run_quickstart(home: Path) -> dict[str, object]:
    run([sys.executable, "launch/sweep.py", *QUICKSTART], REPOSITORY, {"TSAE_HOME": str(home)})
    return results(home)


@pytest.fixture(scope="session")
def docker_build(begun: dict[str, Future[Any]]) -> str:
    """What `docker build` said."""
    return str(begun["docker"].result())


@pytest.fixture(scope="session")
def sif_build(begun: dict[str, Future[Any]]) -> str:
    """What `apptainer build` said."""
    return str(begun["apptainer"].result())


@pytest.fixture(scope="session")
def outside(begun: dict[str, Future[Any]]) -> dict[str, object]:
    """The numbers of the small quickstart without a container."""
    return dict(begun["outside"].result())


@pytest.fixture(scope="session")
def user(lab: Lab) -> Iterator[str]:
    """The name of an ordinary user of this machine, with a clone in its home."""
    home = lab.folder / "home"
    run(["userdel", "--force", USER], check=False)  # left behind by an interrupted run
    run(["useradd", "--create-home", "--home-dir", str(home), USER])
    shutil.copytree(lab.source, home / "clone")
    run(["chown", "-R", f"{USER}:", str(home / "clone")])
    yield USER
    run(["userdel", "--remove", USER], check=False)
