"""Nothing that a file or a path says is run by a job's script: bash runs the scripts here, with hostile values in each setting.

The commands of the schedulers, and Apptainer, are stand-ins that say what they were given.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.sweep.test_arrays import stage
from tsae.runtime.errors import TsaeError
from tsae.sweep import schedulers
from tsae.sweep.attempt import Attempt
from tsae.sweep.cluster import Cluster, load_cluster
from tsae.sweep.container import container
from tsae.sweep.resources import StageResources
from tsae.sweep.schedulers.submission import Submission
from tsae.sweep.sweepfile import load_sweep

HOSTILE = (
    "gpu\n{run}\n",
    "gpu\r{run}",
    "gpu\u2028{run}",
    "$({run})",
    "`{run}`",
    "gpu; {run}",
    "gpu && {run}",
    "'\n{run}\n'",
    '"; {run}; "',
    "gpu' {run} '",
    "gpu\\\n{run}",
    "gpu # {run}",
    "gpu -v BASH_ENV=$({run})",
    "-v BASH_ENV={run}",
    "ü\n{run}",
)
NUMBERS = ("Natural | None", "Count | None")
TEXTS = [field.name for field in dataclasses.fields(StageResources) if field.type not in NUMBERS]
"""All settings of a stage that are not numbers, those of later versions too."""
SAID = """\
#!/bin/bash
printf '%s\\n' "$TSAE_HOME" "$NOTE" "$@" >"$SAID"
"""


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """What the hostile values make."""
    return tmp_path / "ran"


@pytest.fixture
def bash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Run a script as a scheduler's node would; what its stage would have been called with."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"srun": SAID, "apptainer": SAID, "squeue": "#!/bin/sh\n", "scontrol": "#!/bin/sh\n"}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    said = tmp_path / "said"
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(folder)

    def run(script: str) -> list[str]:
        (tmp_path / "job.sh").write_text(script)
        variables = {"SAID": str(said), "JOB_ID": "7", "SGE_TASK_ID": "1", "SLURM_JOB_ID": "7"}
        subprocess.run(
            ["bash", str(tmp_path / "job.sh")], env=os.environ | variables, check=True, capture_output=True, timeout=60
        )
        return said.read_text().splitlines()

    return run


def script_of(scheduler: str, home: Path, cluster: Cluster, **asked: Any) -> str:
    """The script of one harvest."""
    folder = home / "sweeps" / "little"
    asking = dataclasses.replace(stage("harvest"), resources=StageResources(**asked))
    image = home.parent / "image"
    image.mkdir(parents=True, exist_ok=True)
    submission = Submission(
        scheduler=schedulers.find(scheduler),
        sweep_folder=folder,
        attempt=Attempt(folder / "attempts" / "1"),
        cluster=cluster,
        container=container(str(image), here=False),
    )
    (folder / "attempts" / "1" / "00-harvest").mkdir(parents=True, exist_ok=True)
    return submission.texts([asking])[0]


def with_value(setting: str, value: str) -> list[dict[str, Any]]:
    """Resources that have `value` in `setting`, as a value and where there are names as a name."""
    if setting != "extra":
        return [{setting: value}]
    return [{"extra": {"comment": value}}, {"extra": {value: "1"}}, {"extra": {value: True}}]


@pytest.mark.parametrize("scheduler", schedulers.SCHEDULERS)
@pytest.mark.parametrize("setting", TEXTS)
def test_no_resource_runs_anything(
    scheduler: str, setting: str, tmp_path: Path, home: Path, ran: Path, bash: Callable[[str], list[str]]
) -> None:
    for text in HOSTILE:
        for asked in with_value(setting, text.format(run=f"touch {ran}")):
            try:
                script = script_of(scheduler, home, Cluster(), **{"gpus": 1, **asked})
            except TsaeError as error:
                refusal = str(error)
            else:
                refusal = ""
                bash(script)
            assert not ran.exists(), text
            assert not refusal or (setting in refusal and "allowed" in refusal)
            for name, tree in (("cluster.yaml", {"train": asked}), ("sweep.yaml", {"resources": {"train": asked}})):
                file = tmp_path / name
                file.write_text(yaml.safe_dump(tree))
                if refusal:
                    with pytest.raises(TsaeError, match=rf"{name}: (resources\.)?train\.{setting}: .*allowed"):
                        load_cluster(file) if name == "cluster.yaml" else load_sweep(file)


@pytest.mark.parametrize("writer", ["group", "another owner"])
@pytest.mark.parametrize("what", ["the folder", "a pickle"])
def test_a_job_of_slurm_runs_no_pickle_that_others_may_write(
    what: str, writer: str, home: Path, bash: Callable[[str], list[str]]
) -> None:
    if writer == "another owner" and os.getuid():
        pytest.skip("only root gives files away")
    script = script_of("slurm", home, Cluster())
    folder = home / "sweeps" / "little" / "attempts" / "1" / "00-harvest"
    pickle = folder / "7_submitted.pkl"
    pickle.touch()
    pickle.chmod(0o644)
    folder.chmod(0o755)
    (folder / "theirs.txt").touch(0o666)
    assert bash(script)
    changed = folder if what == "the folder" else pickle
    os.chown(changed, 54321, -1) if writer == "another owner" else changed.chmod(0o775)
    with pytest.raises(subprocess.CalledProcessError) as refused:
        bash(script)
    assert refused.value.returncode == 200
    assert refused.value.stdout.decode().strip() == (
        f"batch script: {changed}: others may write there, and it would be run; take their right away and launch again"
    )
    assert (folder / "7_exit_code").read_text() == "200\n"


@pytest.mark.parametrize(
    "extra",
    [{"wrap": "x"}, {"export": "ALL,BASH_ENV=x"}, {"export-file": "x"}, {"S": "/x"}, {"v": "A=1"}, {"jsv": "/x"}],
)
def test_an_option_that_says_what_is_run_is_refused(extra: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({"train": {"extra": extra}}))
    with pytest.raises(TsaeError, match=r"train\.extra: .* none that sets variables or what is run"):
        load_cluster(tmp_path / "cluster.yaml")


@pytest.mark.parametrize(
    "names",
    [{"A; touch X": "1"}, {"A\nB": "1"}, {"BASH_ENV": "x"}, {"$(touch X)": "1"}, {"ü": "1"}, {"A": True}, {1: "a"}],
)
def test_a_variable_has_the_name_of_one(names: dict[Any, Any], tmp_path: Path, home: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({"environment": names}))
    with pytest.raises(TsaeError, match=r"environment: .*allowed: text or a number"):
        load_cluster(tmp_path / "cluster.yaml")
    with pytest.raises(TsaeError, match="harvest of little: environment: "):
        script_of("slurm", home, Cluster(environment=names))


@pytest.mark.parametrize("scheduler", schedulers.SCHEDULERS)
def test_paths_and_variables_are_taken_as_they_are(
    scheduler: str, tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch, bash: Callable[[str], list[str]]
) -> None:
    hostile = "a $(touch ran) `touch ran` ; touch ran ' \" # -v ü"
    home, note = tmp_path / hostile, f"{hostile}\n$(touch {ran})"
    monkeypatch.setenv("TSAE_HOME", str(home))
    said = bash(script_of(scheduler, home, Cluster(environment={"NOTE": note, "OMP_NUM_THREADS": 4})))
    assert said[:3] == [str(home), *note.splitlines()]
    assert [word for word in said if word.endswith(f"TSAE_HOME={home}")] or scheduler == "gridengine"
    assert str(home / "sweeps" / "little" / "attempts" / "1" / "00-harvest") in said
    assert not list(tmp_path.rglob("ran"))


@pytest.mark.parametrize("scheduler", schedulers.SCHEDULERS)
def test_a_path_that_ends_a_line_is_refused(scheduler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "a\ntouch ran\n"
    monkeypatch.setenv("TSAE_HOME", str(home))
    with pytest.raises(TsaeError, match="stands in the scripts of jobs, where no line break") as refused:
        script_of(scheduler, home, Cluster())
    assert r"a\ntouch" in str(refused.value)


def test_what_sites_ask_for_stands_in_the_script(home: Path) -> None:
    asked: dict[str, Any] = {
        "partition": "gpu,gpu-long",
        "account": "grp.ml_1",
        "constraint": "[a100|h100]&ib",
        "exclude": "n[3-5,8]",
        "gres": "gpu:a100:{gpus}",
        "gpus": 2,
        "extra": {"nice": -100, "exclusive": True, "requeue": False, "mail-user": "me@x.org", "export": "NONE"},
    }
    lines = script_of("slurm", home, Cluster(), **asked).splitlines()
    for option in (
        *("partition=gpu,gpu-long", "account=grp.ml_1", "constraint='[a100|h100]&ib'", "exclude='n[3-5,8]'"),
        *("gres=gpu:a100:2", "nice=-100", "exclusive", "mail-user=me@x.org", "export=NONE"),
    ):
        assert f"#SBATCH --{option}" in lines
    extra = {"pe": "mpi_8", "binding": "set linear:4", "R": "y", "p": -5}
    lines = script_of("gridengine", home, Cluster(), **{**asked, "extra": extra, "constraint": "arch=lx*"}).splitlines()
    for option in ("q gpu,gpu-long", "l hostname=!(n[3-5|8])", "l arch=lx*", "binding set linear:4", "R y", "p -5"):
        assert f"#$ -{option}" in lines


@pytest.mark.parametrize("name", ["docker:--volume=/:/host", "docker:a;touch X", "docker:a b", "docker:$(touch X)"])
def test_an_image_of_docker_has_the_name_of_one(name: str, bash: Callable[[str], list[str]]) -> None:
    del bash  # its folder has programs
    Path("docker").write_text("#!/bin/sh\n")
    Path("docker").chmod(0o755)
    with pytest.raises(TsaeError, match="is no name of an image"):
        container(name)


def test_a_folder_with_a_quote_in_its_name_adds_no_mount_option(
    tmp_path: Path, bash: Callable[[str], list[str]]
) -> None:
    del bash
    folder = tmp_path / 'a","destination=etc'
    folder.mkdir()
    (tmp_path / "image").mkdir()
    mounts = container(str(tmp_path / "image"), binds=[f"{folder}:/data"]).command()
    doubled = str(folder).replace('"', '""')
    assert f'type=bind,"source={doubled}","destination=/data"' in mounts
