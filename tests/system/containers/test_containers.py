"""The images of the Dockerfile and of apptainer.def: what is in them, and that work inside is work outside."""

from __future__ import annotations

import json
import os
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.containers.container_lab import COMMIT, OWNER, QUICKSTART, READ_ONLY, REPOSITORY, Lab, results, run

CONTENT = """
import json, os, shutil
from importlib.metadata import distributions

packages = {
    found.name: [found.version, sum(os.lstat(path).st_size for file in found.files if os.path.lexists(path := file.locate()))]
    for found in distributions()
}
tools = [name for name in ("gcc", "cc", "clang", "c++", "ld", "make", "pip", "git") if shutil.which(name)]
folders = ("/opt/installer", "/opt/source", "/opt/wheel", "/root/.cache", "/root/.local")
rest = [path for path in folders if os.path.exists(path)]
rest += [name for _, _, names in os.walk("/opt") for name in names if name.endswith((".whl", ".a", ".o"))]
print(json.dumps({"packages": packages, "unneeded": tools + rest}))
"""
PINS = "/opt/venv/share/tsae/constraints.txt"
WHERE = "import sys, torch, tsae; print(torch.__file__, tsae.__file__, sys.flags.safe_path)"


def content(answer: subprocess.CompletedProcess[str]) -> dict[str, dict[str, tuple[str, int]]]:
    return json.loads(answer.stdout)


def test_docker_image_holds_the_pins_and_nothing_to_build_with(lab: Lab, docker_build: str) -> None:
    del docker_build
    check_content(content(lab.docker("python", "-c", CONTENT, options=["--user=0", "--entrypoint="])))


def test_sif_holds_the_pins_and_nothing_to_build_with(lab: Lab, sif_build: str, say: Callable[[str], None]) -> None:
    del sif_build
    found = content(lab.apptainer("exec", "python", "-c", CONTENT, options=["--containall"]))
    check_content(found)
    largest = sorted(found["packages"].items(), key=lambda item: -item[1][1])[:10]
    say(
        "largest packages, without bytecode: " + ", ".join(f"{name} {size / 1e6:.0f} MB" for name, (_, size) in largest)
    )


def check_content(found: dict[str, dict[str, tuple[str, int]]]) -> None:
    assert found["unneeded"] == []
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    assert {name: version.partition("+")[0] for name, (version, _) in found["packages"].items()} == {
        name: pins.get(name) for name in found["packages"]
    }
    assert {"torch", "transformers", "tsae"} <= set(found["packages"])


def test_labels_tell_version_and_commit(lab: Lab, docker_build: str, sif_build: str) -> None:
    del docker_build, sif_build
    inspect = ["podman", "image", "inspect", "--format", "{{json .Labels}}", "localhost/tsae"]
    docker = json.loads(run(inspect, variables=lab.environment()).stdout)
    sif = json.loads(run(["apptainer", "inspect", "--json", str(lab.sif)]).stdout)["data"]["attributes"]["labels"]
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    for labels in (docker, sif):
        assert labels["org.opencontainers.image.version"] == version
        assert labels["org.opencontainers.image.revision"] == COMMIT


def test_selftest_passes_offline_in_a_read_only_image(lab: Lab, docker_build: str) -> None:
    del docker_build
    home = owned_folder(lab, "selftest")
    options = [*READ_ONLY, "--network=none", "--env=HF_HUB_OFFLINE=1", f"--volume={home}:/runs"]
    answer = lab.docker("selftest", options=options)
    assert "all 7 checks passed" in answer.stdout
    assert "packages as pinned" in answer.stdout


def test_sif_is_tested_when_it_is_built(sif_build: str) -> None:
    assert "all 7 checks passed" in sif_build


def test_selftest_says_what_is_wrong_and_exits_with_2(lab: Lab, docker_build: str) -> None:
    del docker_build
    pins = lab.folder / "other-pins.txt"
    pins.write_text((REPOSITORY / "constraints.txt").read_text().replace("\nnumpy==", "\nnumpy==0."))
    volumes = [f"--volume={pins}:{PINS}:ro", f"--volume={owned_folder(lab, 'closed')}:/runs:ro"]
    answer = lab.docker("selftest", options=["--shm-size=16m", *volumes], check=False)
    assert answer.returncode == 2
    failed = [line.split(":")[0] for line in answer.stdout.splitlines() if line.startswith("FAILED")]
    assert failed == ["FAILED  versions", "FAILED  TSAE_HOME", "FAILED  shared memory"]
    assert answer.stdout.endswith("3 of 7 checks failed\n")


def test_docker_run_gives_the_numbers_of_a_run_outside(lab: Lab, docker_build: str, outside: dict[str, object]) -> None:
    del docker_build
    home = owned_folder(lab, "docker-runs")
    options = [*READ_ONLY, "--network=none", f"--volume={home}:/runs"]
    with lab.timed("small quickstart in Docker"):
        lab.docker("launch/sweep.py", *QUICKSTART, options=options)
    assert results(home) == outside
    assert len(outside) > 12
    assert {(path.stat().st_uid, path.stat().st_gid) for path in home.rglob("*")} == {(OWNER, OWNER)}


def test_apptainer_exec_gives_the_numbers_of_a_run_outside(
    lab: Lab, sif_build: str, user: str, outside: dict[str, object]
) -> None:
    del sif_build
    home = lab.folder / "home" / "runs"
    clone = lab.folder / "home" / "clone"
    command = ["python", "launch/sweep.py", *QUICKSTART]
    with lab.timed("small quickstart in Apptainer"):
        lab.apptainer("exec", *command, options=["--nv"], user=user, cwd=clone, variables={"TSAE_HOME": str(home)})
    assert results(home) == outside
    assert {path.owner() for path in home.rglob("*")} == {user}


def test_docker_run_alone_is_the_quickstart_and_stops_when_asked(lab: Lab, docker_build: str) -> None:
    del docker_build
    home = lab.folder / "alone"
    home.mkdir()
    command = ["podman", "run", "--rm", "--name=alone", f"--volume={home}:/runs", "localhost/tsae"]
    process = subprocess.Popen(
        command, env=os.environ | lab.environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    assert any(line.startswith("split_fraction-embedded: 4 points") for line in process.stdout)
    run(["podman", "stop", "--time=60", "alone"], variables=lab.environment())
    assert "the same command continues" in process.stdout.read()
    assert process.wait() == 130
    # Root made the folder, as Docker does where it is missing: it was given to the image's own user.
    assert {path.stat().st_uid for path in home.rglob("*")} == {1000}


def test_home_that_is_not_there_yet_is_made_by_the_owner_of_the_folder_around_it(lab: Lab, docker_build: str) -> None:
    del docker_build
    around = owned_folder(lab, "around")
    options = ["--env=TSAE_HOME=/runs/a/b", f"--volume={around}:/runs"]
    lab.docker("python", "-c", "import os; os.makedirs(os.environ['TSAE_HOME'])", options=options)
    assert (around / "a" / "b").stat().st_uid == OWNER


def test_work_without_a_mounted_folder_is_told_that_it_will_be_lost(lab: Lab, docker_build: str) -> None:
    del docker_build
    assert "no folder is mounted at /runs" in lab.docker("train", "--help").stderr
    mounted = [f"--volume={owned_folder(lab, 'mounted')}:/runs"]
    assert lab.docker("train", "--help", options=mounted).stderr == ""


def test_user_option_decides_who_writes(lab: Lab, docker_build: str) -> None:
    del docker_build
    home = owned_folder(lab, "user", mode=0o777)
    answer = lab.docker("sh", "-c", "id -u; touch /runs/mine", options=["--user=777:777", f"--volume={home}:/runs"])
    assert answer.stdout.strip() == "777"
    assert (home / "mine").stat().st_uid == 777


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--help"], "usage: tsae train"),
        (["tsae", "train", "--help"], "usage: tsae train"),
        (["sweep", "--help"], "usage: tsae sweep"),
        (["launch/report.py", "--help"], "usage: launch/report.py"),
        (["python", "-c", "print('python', 1)"], "python 1"),
    ],
)
def test_both_images_run_tsae_the_scripts_and_python(
    lab: Lab, docker_build: str, sif_build: str, arguments: list[str], said: str
) -> None:
    del docker_build, sif_build
    assert lab.docker(*arguments).stdout.startswith(said)
    assert lab.apptainer("run", *arguments).stdout.startswith(said)


def test_unknown_command_is_one_of_tsae_and_fails(lab: Lab, docker_build: str) -> None:
    del docker_build
    answer = lab.docker("trian", check=False)
    assert answer.returncode == 2
    assert "invalid choice: 'trian'" in answer.stderr


def test_hub_is_not_asked_where_offline_is_wanted(lab: Lab, docker_build: str) -> None:
    del docker_build
    options = ["--env=HF_HUB_OFFLINE=1", f"--volume={owned_folder(lab, 'offline')}:/runs"]
    answer = lab.docker(
        "harvest", "sweeps/bases/pythia-160m.yaml", "data.max_tokens=1000", options=options, check=False
    )
    assert answer.returncode == 2
    assert answer.stderr.startswith("tsae: model.name: EleutherAI/pythia-160m cannot be loaded")
    assert "offline: run `hf download EleutherAI/pythia-160m`" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_modules_of_home_and_working_directory_stay_out(lab: Lab, docker_build: str, sif_build: str, user: str) -> None:
    del docker_build, sif_build
    traps = lab.folder / "home" / "traps"
    site = lab.folder / "home" / ".local" / "lib" / "python3.11" / "site-packages"
    for folder in (traps, site):
        folder.mkdir(parents=True)
        for name in ("torch", "tsae"):
            (folder / f"{name}.py").write_text("raise SystemExit('a module of the host')\n")
    run(["chown", "-R", f"{user}:", str(lab.folder / "home")])
    variables = {"PYTHONPATH": str(traps)}
    sif = lab.apptainer("exec", "python", "-c", WHERE, user=user, cwd=traps, variables=variables)
    docker = lab.docker("python", "-c", WHERE, options=[f"--volume={lab.folder}/home:/runs", "--workdir=/runs/traps"])
    for answer in (sif, docker):
        torch, tsae, safe = answer.stdout.split()
        assert Path(torch).is_relative_to("/opt/venv")
        assert Path(tsae).is_relative_to("/opt/venv")
        assert safe == "True"


def test_change_of_the_code_rebuilds_the_last_layers_only(lab: Lab, docker_build: str) -> None:
    assert "Using cache" not in docker_build.split("install.sh torch", 1)[1].splitlines()[1]
    with open(lab.source / "tsae" / "__init__.py", "a") as file:
        file.write("\n")
    took = lab.seconds.pop("docker build")
    again = lab.build_with_docker(COMMIT)
    lab.seconds |= {"docker build": took, "and after a change of the code": lab.seconds["docker build"]}
    for step in ("install.sh torch", "install.sh dependencies"):
        assert "Using cache" in again.split(step, 1)[1].splitlines()[1]


def test_size_build_time_and_cold_start(
    lab: Lab, docker_build: str, sif_build: str, say: Callable[[str], None]
) -> None:
    del docker_build, sif_build
    image = ["podman", "image", "inspect", "--format", "{{.Size}}", "localhost/tsae"]
    size = int(run(image, variables=lab.environment()).stdout)
    say(f"Docker image {size / 1e9:.2f} GB, SIF {lab.sif.stat().st_size / 1e9:.2f} GB (CPU build of torch)")
    for what, start in (("Docker", lab.docker), ("Apptainer", lambda *words: lab.apptainer("run", *words))):
        for command in (["--help"], ["python", "-c", "import torch, transformers"]):
            with lab.timed(f"{what}: {' '.join(command)}"):
                start(*command)
    say("; ".join(f"{step} {seconds:.1f} s" for step, seconds in lab.seconds.items()))
    assert size < 2.5e9


def owned_folder(lab: Lab, name: str, mode: int = 0o755) -> Path:
    """A new folder of the lab that belongs to user OWNER."""
    folder = lab.folder / name
    folder.mkdir()
    folder.chmod(mode)
    os.chown(folder, OWNER, OWNER)
    return folder
