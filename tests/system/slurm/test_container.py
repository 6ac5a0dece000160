"""Jobs inside an image, by a real Apptainer: they are preempted and queued again like any other."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.slurm.slurm_sweep import HERE, LAUNCH, SweepOnSlurm
from tsae.sweep.container import container
from tsae.sweep.schedulers.slurm.query import run


@pytest.fixture
def image(tmp_path: Path, require: Callable[[str, bool, str], None]) -> Path:
    """A folder that is an image: empty but for the places where this machine's programs are bound."""
    found = shutil.which("apptainer") is not None
    require("containers", found, "tests/system/containers/install_tools.sh installs Apptainer")
    root = tmp_path / "image"
    for name in ("usr", "etc", "tmp", "var", "proc", "sys", "dev", "opt", "run", "root"):
        (root / name).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    return root


def test_a_job_in_an_image_is_queued_again_by_its_host_and_sees_what_it_needs(
    sweep: SweepOnSlurm, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sweep.home)
    monkeypatch.setenv("HF_HOME", str(sweep.home / "hub"))
    (sweep.home / "hub").mkdir()
    counter, note = sweep.home / "counter", sweep.home / "note"
    submission = sweep.submission(environment={"APPTAINERENV_PREPEND_PATH": f"{sys.prefix}/bin"})
    chosen = container(str(image), [HERE, LAUNCH.parent], binds=["/usr", sys.prefix, sys.base_prefix])
    jobs = dataclasses.replace(submission, container=chosen).submit(
        [
            sweep.stage("count", "tests.system.slurm.errands:count_up", str(counter), 30),
            sweep.stage("note", "tests.system.slurm.errands:note", str(note), kind="evaluate", after=("count",)),
        ]
    )
    sweep.wait(lambda: sweep.state("count"))
    run("scancel", "--signal=USR2", jobs[0].job)
    sweep.wait_until_over()
    assert (sweep.state("count")["state"], sweep.state("count")["restarts"]) == ("done", 1)
    assert json.loads(counter.read_text())["counted"] == 30
    seen = json.loads(note.read_text())
    assert Path(seen["code"]).is_relative_to(submission.attempt.code)
    assert seen["image"] == str(image)
    assert seen["no_user_site"]
