"""Jobs inside an image, by a real Apptainer: they are preempted and queued again like any other."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.slurm.slurm_sweep import HERE, LAUNCH, SweepOnSlurm
from tsae.sweep.attempt import shell_path
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


def test_what_links_name_is_there_inside(
    image: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TSAE_HOME is a link below the working directory, one of its folders another, and a file of the data a third."""
    monkeypatch.setenv("APPTAINER_NO_MOUNT", "tmp,home,cwd")  # as where the site does not bind its scratch
    far, work, data = tmp_path_factory.mktemp("far"), tmp_path / "work", tmp_path / "data"
    for folder in (work, data, far / "runs", far / "stores", far / "texts"):
        folder.mkdir()
    (far / "texts" / "a.txt").write_text("seen")
    (work / "runs").symlink_to(far / "runs")
    (far / "runs" / "stores").symlink_to(far / "stores")
    (data / "b.txt").symlink_to(far / "texts" / "a.txt")
    monkeypatch.chdir(work)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("TSAE_HOME", raising=False)
    chosen = container(str(image), [data], binds=["/usr", sys.prefix, sys.base_prefix])
    script = f"import shutil; shutil.copy({str(data / 'b.txt')!r}, 'runs/stores/copy')"
    command = [*chosen.command({"PREPEND_PATH": f"{sys.prefix}/bin"}, gpus=False), "-c", script]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert (far / "stores" / "copy").read_text() == "seen"


@pytest.fixture
def without_apptainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PATH as on a login node that has Apptainer as a module only; jobs get it too."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for program in Path("/usr/bin").iterdir():
        if program.name != "apptainer":
            (folder / program.name).symlink_to(program)
    monkeypatch.setenv("PATH", str(folder))


def test_apptainer_is_needed_in_the_job_alone(
    sweep: SweepOnSlurm, image: Path, without_apptainer: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    del without_apptainer
    monkeypatch.chdir(sweep.home)
    seen = {}
    for name, setup in (("loaded", ("export PATH=/usr/bin:$PATH",)), ("forgotten", ())):
        submission = sweep.submission(environment={"APPTAINERENV_PREPEND_PATH": f"{sys.prefix}/bin"}, setup=setup)
        binds = ["/usr", sys.prefix, sys.base_prefix]
        chosen = container(str(image), [HERE, LAUNCH.parent, *shell_path(in_image=True)], binds, here=False)
        stage = sweep.stage(name, "tests.system.slurm.errands:note", str(sweep.home / name))
        (entry,) = dataclasses.replace(submission, container=chosen).submit([stage])
        sweep.wait_until_over()
        seen[name] = Path(entry.log).read_text()
    assert json.loads((sweep.home / "loaded").read_text())["image"] == str(image)
    (line,) = [line for line in seen["forgotten"].splitlines() if line.startswith("tsae: ")]
    assert line.startswith("tsae: apptainer is not on PATH on ")
    assert "module load apptainer" in line
    assert "tsae: " not in seen["loaded"]
    assert not (sweep.home / "forgotten").exists()


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
