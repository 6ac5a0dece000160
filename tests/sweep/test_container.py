"""The command that goes before python in a job inside an image; real containers are in tests/system."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tsae.runtime.errors import TsaeError
from tsae.sweep.attempt import shell_path
from tsae.sweep.cluster import Cluster
from tsae.sweep.container import Container, container
from tsae.sweep.dryrun import dry_run
from tsae.sweep.launcher import Options, container_for
from tsae.sweep.plan import Plan


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH on which there is nothing; a program is there once a file of its name is."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return folder


def install(folder: Path, name: str, script: str = "exit 0") -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_apptainer_sees_the_folders_and_keeps_the_environment(programs: Path, tmp_path: Path, home: Path) -> None:
    install(programs, "apptainer")
    image = tmp_path / "tsae.sif"
    image.touch()
    data = tmp_path / "elsewhere" / "data"
    data.mkdir(parents=True)
    inner = data / "inner"
    inner.mkdir()
    os.chdir(programs)
    chosen = container("../tsae.sif", [data, inner, tmp_path / "not there"], binds=["/usr:/host"])
    assert chosen.binds == (str(programs), str(data), str(home), "/usr:/host")
    command = chosen.command({"PYTHONPATH": "/a,b"})
    assert command[0] == "env"
    set_inside = {word for word in command if word.startswith("APPTAINERENV_")}
    assert "APPTAINER_NO_EVAL=1" in command
    assert set_inside == {
        "APPTAINERENV_PYTHONNOUSERSITE=1",
        "APPTAINERENV_PYTHONPATH=/a,b",
        f"APPTAINERENV_TSAE_HOME={home}",
        f"APPTAINERENV_HF_HOME={home}/huggingface",  # there is no cache of models outside
    }
    assert command[-2:] == [str(image), "python3"]
    assert "--nv" in command
    assert 'type=bind,"source=/usr","destination=/host"' in command
    assert "--nv" not in chosen.command(gpus=False)
    assert not {"--cleanenv", "--containall", "--contain"} & set(command)


@pytest.fixture
def far(tmp_path: Path) -> Path:
    """A folder that no bind of the working directory reaches."""
    folder = tmp_path / "far"
    folder.mkdir()
    return folder


def bound(*places: Path) -> set[str]:
    """What is bound for `places`, when TSAE_HOME and the working directory are links' folders or not."""
    return set(container("docker:tsae", places).binds)


def test_a_linked_scratch_below_the_working_directory_is_bound_by_its_target(
    programs: Path, far: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`runs -> far/scratch/runs`, where `far/scratch` is a link too: each name on the way stands inside."""
    install(programs, "docker")
    (far / "disk" / "runs").mkdir(parents=True)
    (far / "scratch").symlink_to("disk")
    Path("work").mkdir()
    monkeypatch.chdir("work")
    Path("runs").symlink_to(far / "scratch" / "runs")
    monkeypatch.delenv("TSAE_HOME")
    assert bound() == {os.getcwd(), str(far / "scratch" / "runs"), str(far / "disk" / "runs")}


@pytest.mark.parametrize("place", ["home", "data", "model"])
def test_links_inside_what_is_used_are_bound_by_their_targets(
    programs: Path, far: Path, home: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder in a folder, a file among files, and a link behind a link; what the image has itself is left alone."""
    install(programs, "docker")
    folder = home if place == "home" else far.parent / place
    (folder / "stores").mkdir(parents=True)
    for name in ("store", "texts", "more", "not used"):
        (far / name).mkdir()
    (far / "texts" / "a.jsonl").touch()
    (folder / "stores" / "mine").symlink_to(far / "store")
    (folder / "b.jsonl").symlink_to("../far/texts/a.jsonl" if place != "home" else far / "texts" / "a.jsonl")
    (far / "store" / "next").symlink_to("../more")
    (folder / "stores" / "python").symlink_to("/usr/bin/env")
    (folder / "stores" / "up").symlink_to("..")
    (folder / "stores" / "gone").symlink_to(far / "gone")
    Path("work").mkdir()
    monkeypatch.chdir("work")
    here = {os.getcwd(), str(folder), str(home)}
    assert bound(folder) == {*here, *(str(far / name) for name in ("store", "texts", "more"))}


def test_docker_gets_folders_user_and_the_variables_that_matter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TSAE_HOME")  # then it is ./runs, whatever the image names
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://proxy")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("EDITOR", "vi")
    command = Container("docker", "tsae", ("/data", "/here:/there")).command({"PYTHONPATH": "/code"}, gpus=False)
    assert command[:3] == ["docker", "run", "--rm"]
    assert command[-2:] == ["tsae", "python3"]
    assert {
        f"--user={os.getuid()}:{os.getgid()}",
        "--volume=/data:/data",
        "--volume=/here:/there",
        "--env=CUDA_VISIBLE_DEVICES",
        "--env=HF_HUB_OFFLINE",
        "--env=PYTHONPATH=/code",
        "--env=PYTHONNOUSERSITE=1",
        f"--env=TSAE_HOME={tmp_path}/runs",
        f"--env=HF_HOME={tmp_path}",
        "--env=https_proxy",
    } <= set(command)
    assert not [word for word in command if "EDITOR" in word or "--gpus" in word]


def test_a_registry_s_image_is_fetched_once_by_apptainer_and_left_to_docker_without_it(
    programs: Path, home: Path
) -> None:
    with pytest.raises(TsaeError, match="neither apptainer nor docker"):
        container("docker://owner/image:tag")
    install(programs, "docker")
    chosen = container("docker://owner/image:tag")
    assert (chosen.runtime, chosen.image) == ("docker", "owner/image:tag")
    install(programs, "apptainer", 'echo "$*" >>calls; : >"$2"')
    for _ in range(2):
        chosen = container("docker://owner/image:tag")
    assert (chosen.runtime, chosen.image) == ("apptainer", str(home / "containers" / "owner-image-tag.sif"))
    assert len(Path("calls").read_text().splitlines()) == 1
    assert container("docker:tsae").runtime == "docker"


def test_every_place_that_the_settings_name_is_seen_inside(
    programs: Path, tmp_path: Path, plan_of: Callable[..., Plan]
) -> None:
    install(programs, "docker")
    outside = tmp_path / "outside"
    texts = outside / "passage.txt"
    outside.mkdir()
    texts.touch()
    os.chdir(programs)
    words = "a passage that stands in the YAML itself " * 20
    overrides = {"experiments.sequences.texts": [str(texts), words]}
    plan = plan_of(grid={"sae.k": [8]}, overrides=overrides, container="docker:tsae")
    chosen = container_for(plan, Options(executor="local"), Cluster(), "local")
    assert chosen is not None
    assert str(texts) in chosen.binds
    assert container_for(plan, Options(executor="debug"), Cluster(), "debug") is None


def test_folders_of_the_shell_s_pythonpath_are_seen_inside_and_nothing_else_of_it(
    programs: Path, tmp_path: Path, plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(programs, "docker")
    (tmp_path / "outside" / "mine").mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", "../outside/mine::/not/there")
    os.chdir(programs)
    chosen = container_for(
        plan_of(grid={"sae.k": [8]}), Options(executor="local", container="docker:tsae"), Cluster(), "local"
    )
    assert chosen is not None
    assert str(tmp_path / "outside" / "mine") in chosen.binds
    assert "/not/there" not in chosen.binds
    assert shell_path(in_image=True) == [str(tmp_path / "outside" / "mine")]


@pytest.mark.parametrize(
    ("executor", "words"), [("slurm", "jobs of Slurm run in Apptainer"), ("debug", "not in a cont")]
)
def test_an_executor_that_cannot_use_the_image_is_refused(
    programs: Path, plan_of: Callable[..., Plan], executor: str, words: str
) -> None:
    install(programs, "docker")
    with pytest.raises(TsaeError, match=words):
        container_for(
            plan_of(grid={"sae.k": [8]}), Options(executor=executor, container="docker:tsae"), Cluster(), executor
        )


def test_on_a_cluster_the_program_is_needed_where_the_job_runs_and_here_it_is_not(
    programs: Path, tmp_path: Path, plan_of: Callable[..., Plan]
) -> None:
    del programs
    (tmp_path / "tsae.sif").touch()
    site = tmp_path / "cluster.yaml"
    for image in (str(tmp_path / "tsae.sif"), "docker://owner/image:tag"):
        site.write_text(yaml.safe_dump({"container": image, "setup": ["module load apptainer"]}))
        lines = dry_run(plan_of(grid={"sae.k": [8]}), Options(executor="slurm", cluster=site))
        script = "\n".join(lines).split("-----")[1].splitlines()
        loaded = script.index("module load apptainer")
        (check,) = (number for number, line in enumerate(script) if line.startswith("command -v apptainer"))
        (step,) = (number for number, line in enumerate(script) if " apptainer exec " in line and image in line)
        assert loaded < check < step
    with pytest.raises(TsaeError, match=r"no\.sif: no such file"):
        container("no.sif", here=False)
    with pytest.raises(TsaeError, match="apptainer is not on PATH"):
        container_for(
            plan_of(grid={"sae.k": [8]}),
            Options(executor="local", container=str(tmp_path / "tsae.sif")),
            Cluster(),
            "local",
        )


@pytest.mark.parametrize("executor", ["local", "debug"])
def test_an_image_that_is_not_used_here_is_said_in_one_line(
    plan_of: Callable[..., Plan], executor: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = Options(executor=executor, cluster=Path("cl.yaml"))
    plan = plan_of(grid={"sae.k": [8]})
    assert container_for(plan, options, Cluster(container="tsae.sif"), executor) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"cl.yaml: container: tsae.sif: not used by --executor {executor};")
    assert container_for(plan, options, Cluster(), executor) is None
    assert capsys.readouterr().err == ""


def test_what_is_not_there_is_one_line(programs: Path, tmp_path: Path) -> None:
    with pytest.raises(TsaeError, match="apptainer is not on PATH"):
        container("tsae.sif")
    install(programs, "apptainer", "echo FATAL: in vain >&2; exit 1")
    with pytest.raises(TsaeError, match="no such file"):
        container("tsae.sif")
    (tmp_path / "tsae.sif").write_text("half an image")
    with pytest.raises(TsaeError, match=r"tsae\.sif: apptainer cannot open it: FATAL: in vain"):
        container("tsae.sif")
    with pytest.raises(TsaeError, match="binds: /nowhere: no such folder"):
        container(str(tmp_path), binds=["/nowhere:/data"])
    with pytest.raises(TsaeError, match="failed: FATAL: in vain"):
        container("docker://owner/image")
    assert not list((tmp_path / "home" / "containers").iterdir())
