"""Builds and runs the images with real tools and no registry: buildah, podman and Apptainer over a base made here."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[2]
BUILD_INPUTS = (".dockerignore", "Dockerfile", "apptainer.def", "launch", "sweeps", "tsae")
BUILD_FILES = ("LICENSE", "README.md", "constraints.txt", "pyproject.toml")
PATIENCE_SECONDS = 1800
COMMIT = "0123456789abcdef0123456789abcdef01234567"
USER = "tsae-test"
OWNER = 4242
# Docker's --read-only, which unlike podman's brings no writable /tmp along.
READ_ONLY = ("--read-only", "--read-only-tmpfs=false")
HASHED = ("ae.pt", "metrics.jsonl")
# The README's first sweep, made small: every stage of it runs, on the same model and text.
QUICKSTART = (
    "sweeps/split_fraction.yaml",
    "--name",
    "quickstart",
    "data.max_tokens=40000",
    "training.steps=20",
    "training.pack=4",
    "sae.dict_size=256",
    "evaluation.sequences=16",
    "evaluation.loss_sequences=4",
)

# What a virtual machine asks of podman: no cgroup manager, no limits above those that its root has. Images get no
# network; builds have none to use, since pip takes wheels from a folder.
CONTAINERS_CONF = """
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
netns = "none"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
"""
STORAGE_CONF = """
[storage]
driver = "overlay"
graphroot = "{folder}/storage"
runroot = "{folder}/run"
"""


@dataclass
class Lab:
    """A folder with everything that the tests need, and what making it took."""

    folder: Path
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def source(self) -> Path:
        """A copy of what the images are built from, which a test may change."""
        return self.folder / "source"

    @property
    def base(self) -> Path:
        """The root file system that stands for python:3.11-slim."""
        return self.folder / "base"

    @property
    def wheels(self) -> Path:
        """The pinned packages, so that nothing is fetched twice."""
        return self.folder / "wheels"

    @property
    def sif(self) -> Path:
        """The image that Apptainer built."""
        return self.folder / "tsae.sif"

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Record how long `what` took."""
        began = time.monotonic()
        yield
        self.seconds[what] = time.monotonic() - began

    def environment(self) -> dict[str, str]:
        """Variables that keep all storage in the lab."""
        return {
            "CONTAINERS_CONF": str(self.folder / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(self.folder / "storage.conf"),
            "APPTAINER_CACHEDIR": str(self.folder / "apptainer"),
            "APPTAINER_TMPDIR": str(self.folder / "apptainer"),
            "TMPDIR": str(self.folder / "tmp"),
        }

    def prepare(self) -> None:
        """Copy the source; fetch the wheels and make the base at the same time."""
        for name in ("apptainer", "tmp", "wheels", "source"):
            (self.folder / name).mkdir()
        (self.folder / "tmp").chmod(0o1777)
        (self.folder / "containers.conf").write_text(CONTAINERS_CONF)
        (self.folder / "storage.conf").write_text(STORAGE_CONF.format(folder=self.folder))
        for name in BUILD_INPUTS:
            copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
            copy(REPOSITORY / name, self.source / name)
        for name in BUILD_FILES:
            shutil.copy(REPOSITORY / name, self.source / name)
        # As a clone is where nobody else may read: its files are not for everybody, but the image's must be.
        run(["chmod", "-R", "go=", str(self.source)])
        with ThreadPoolExecutor() as pool:
            for made in [pool.submit(self.fetch_wheels), pool.submit(self.make_base)]:
                made.result()

    def fetch_wheels(self) -> None:
        """Fetch what both images install, as this machine is used to."""
        project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
        pip = [sys.executable, "-m", "pip", "download", "-q", "--only-binary", ":all:", "-d", str(self.wheels)]
        constraints = ["-c", str(REPOSITORY / "constraints.txt")]
        with self.timed("wheels"):
            run([*pip, *constraints, *project["dependencies"], "setuptools>=77"])

    def make_base(self) -> None:
        """Make the base, and give it to podman under the name that the build asks for."""
        with self.timed("base"):
            run([str(HERE / "make_base.sh"), str(self.base), sys.executable])
        tree = subprocess.Popen(["tar", "-C", str(self.base), "-c", "."], stdout=subprocess.PIPE)
        command = ["podman", "import", "-q", "-", "localhost/base"]
        subprocess.run(command, stdin=tree.stdout, check=True, env=os.environ | self.environment(), capture_output=True)
        assert tree.wait() == 0

    def build_with_docker(self, commit: str) -> str:
        """`docker build`, by buildah; its output."""
        arguments = {"BASE_IMAGE": "localhost/base", "TORCH": "cpu", "TORCH_CPU_INDEX": "", "COMMIT": commit}
        settings = [f"--build-arg={name}={value}" for name, value in arguments.items()]
        mounts = ["--volume", f"{self.wheels}:/wheels:ro"]
        command = ["buildah", "bud", "--isolation", "chroot", "--pull-never", "--layers", *mounts, *settings]
        with self.timed("docker build"):
            return run([*command, "-t", "tsae", "."], self.source, self.environment()).stdout

    def build_with_apptainer(self, commit: str) -> str:
        """`apptainer build`, %test included; its output."""
        arguments = {
            "bootstrap": "localimage",
            "base": self.base,
            "torch": "cpu",
            "torch_cpu_index": "",
            "commit": commit,
        }
        settings = [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
        fast = ["--mksquashfs-args", "-comp zstd -Xcompression-level 1"]
        mounts = ["--bind", f"{self.wheels}:/wheels"]
        command = ["apptainer", "build", "--fakeroot", *fast, *mounts, *settings, str(self.sif), "apptainer.def"]
        with self.timed("apptainer build"):
            return run(command, self.source, self.environment(), stderr=subprocess.STDOUT).stdout

    def docker(
        self, *arguments: str, options: Sequence[str] = (), check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """`docker run --rm OPTIONS tsae ARGUMENTS`, by podman."""
        command = ["podman", "run", "--rm", *options, "localhost/tsae", *arguments]
        return run(command, self.folder, self.environment(), check=check)

    def apptainer(
        self,
        verb: str,
        *arguments: str,
        options: Sequence[str] = (),
        user: str | None = None,
        cwd: Path | None = None,
        variables: Mapping[str, str] | None = None,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """`apptainer VERB OPTIONS tsae.sif ARGUMENTS`, as root or as `user`."""
        # The network stays reachable for the host's sake, so a hub must not be asked.
        variables = {"HF_HUB_OFFLINE": "1", **(variables or {})}
        command = ["apptainer", verb, *options, str(self.sif), *arguments]
        if user is not None:
            names = ",".join(variables)
            command = ["runuser", "-u", user, f"--whitelist-environment={names}", "--", *command]
        return run(command, cwd or self.folder, variables, check=check)

    def remove(self) -> None:
        """Take everything away again; `podman system reset` does the same in minutes."""
        mounted = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for place in reversed([place for place in mounted if Path(place).is_relative_to(self.folder)]):
            run(["umount", place])
        shutil.rmtree(self.folder)


def make_lab() -> Lab:
    """A lab in a new folder that ordinary users can read."""
    folder = Path(tempfile.mkdtemp(prefix="tsae-containers-"))
    folder.chmod(0o755)
    return Lab(folder)


def run(
    command: Sequence[str],
    cwd: Path | None = None,
    variables: Mapping[str, str] | None = None,
    check: bool = True,
    stderr: int = subprocess.PIPE,
) -> subprocess.CompletedProcess[str]:
    """Run `command`; unless `check` is off, a failure shows the end of what it said."""
    answer = subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | (variables or {}),
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    if check and answer.returncode:
        said = f"{answer.stdout or ''}\n{answer.stderr or ''}"
        raise AssertionError(f"{' '.join(command)}: exit code {answer.returncode}\n{said[-4000:]}")
    return answer


def results(home: Path) -> dict[str, object]:
    """Every number that a sweep under `home` made: measures, losses, and a hash of weights, activations and corpus."""
    found: dict[str, object] = {}
    for path in sorted(home.rglob("*")):
        name = str(path.relative_to(home))
        if path.name == "eval_results.json":
            found[name] = json.loads(path.read_text())
        elif path.is_file() and (path.name in HASHED or path.suffix == ".zst" or "/activations/c/" in name):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found
