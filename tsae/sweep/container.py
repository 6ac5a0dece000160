"""Jobs inside an image: the command that goes before `python`, for Apptainer (clusters, laptops) and Docker (laptops)."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tsae.runtime import environment, files
from tsae.runtime.errors import TsaeError

PYTHON = "python3"
PASSED_ON = re.compile(
    r"(TSAE|HF|NCCL|CUDA|NVIDIA|OMP|MKL|OPENBLAS|PYTHON|WANDB|TORCH)_?\w*|MASTER_(ADDR|PORT)|RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|NUMEXPR_NUM_THREADS|TOKENIZERS_PARALLELISM|MPLBACKEND|OPENAI_API_KEY|(?i:(HTTPS?|ALL|NO)_PROXY)"
)
"""Variables that a Docker container gets; Apptainer's gets all."""
LEVELS = 5
"""Folders in which links are looked for: TSAE_HOME/stores/<store>/<array>/<part> are as many."""
OF_THE_IMAGE = ("/bin", "/boot", "/dev", "/etc", "/lib", "/lib64", "/proc", "/sbin", "/sys", "/usr")
"""Where an image has its own; a link that was found by the way binds nothing over it."""


@dataclass(frozen=True)
class Container:
    """An image and what of this machine is seen inside it."""

    runtime: Literal["apptainer", "docker"]
    image: str
    """Path of a .sif file or folder, or a name in a registry."""
    binds: tuple[str, ...]
    """Folders, each at its own place or as `here:there`."""

    def command(self, extra: Mapping[str, str] | None = None, gpus: bool = True) -> list[str]:
        """What goes before the arguments of python; `extra` variables are set inside."""
        # An image may name places of its own, where results would be lost and models fetched for each job.
        hub = _hub_cache() if _hub_cache().exists() else environment.home() / "huggingface"
        places = {"TSAE_HOME": str(environment.home()), "HF_HOME": str(hub)}
        variables = {"PYTHONNOUSERSITE": "1", **places, **(extra or {})}
        return self._apptainer(variables, gpus) if self.runtime == "apptainer" else self._docker(variables, gpus)

    def _apptainer(self, variables: Mapping[str, str], gpus: bool) -> list[str]:
        # `env`, because Apptainer cuts the values of its own --env at commas. No --cleanenv or --containall: the job's
        # place in its scheduler, and its GPUs, are told by variables.
        # Without NO_EVAL it gives their values to a shell, which would run what is in `$(…)` of a path.
        command = ["env", "APPTAINER_NO_EVAL=1", *(f"APPTAINERENV_{name}={value}" for name, value in variables.items())]
        command += ["apptainer", "exec", *(["--nv"] if gpus else []), "--pwd", os.getcwd()]
        for here, there in self._bound():
            # A row of CSV, because a path may have commas and --bind takes none.
            source, destination = (path.replace('"', '""') for path in (here, there))
            command += ["--mount", f'type=bind,"source={source}","destination={destination}"']
        return [*command, self.image, PYTHON]

    def _docker(self, variables: Mapping[str, str], gpus: bool) -> list[str]:
        user = f"{os.getuid()}:{os.getgid()}"
        command = ["docker", "run", "--rm", "--init", "--network=host", "--ipc=host", f"--user={user}"]
        command += ["--gpus=all"] if gpus else []
        command += [f"--workdir={os.getcwd()}", "--entrypoint=", "--env=HOME=/tmp"]
        command += [f"--volume={here}:{there}" for here, there in self._bound()]
        passed = sorted(name for name in os.environ if PASSED_ON.fullmatch(name))
        command += [f"--env={name}" for name in passed if name not in variables]
        command += [f"--env={name}={value}" for name, value in variables.items()]
        return [*command, self.image, PYTHON]

    def _bound(self) -> list[tuple[str, str]]:
        return [(here, there or here) for here, _, there in (bind.partition(":") for bind in self.binds)]


def container(name: str, places: Iterable[str | Path] = (), binds: Sequence[str] = (), here: bool = True) -> Container:
    """The image that `--container` or the YAML names, to run on this machine if `here`, else on a cluster's nodes.

    `tsae.sif`: Apptainer; `docker://owner/image:tag`: Apptainer if there is one, else Docker; `docker:image`: Docker,
    with an image that it has. TSAE_HOME, HF_HOME, the working directory and `places` (data, folders on PYTHONPATH) are bound
    with what links in them name, and `binds` besides. Raises TsaeError for an image or a folder that is not there, and
    without the program: that of a cluster's nodes may come with a module, so the job itself says that it is missing.
    """
    runtime, image = _image(name, here)
    caches = [value for variable, value in os.environ.items() if variable.startswith("HF_") and os.path.isabs(value)]
    return Container(runtime, image, tuple(_binds([_hub_cache(), Path.cwd(), *caches, *places], binds)))


def _image(name: str, here: bool) -> tuple[Literal["apptainer", "docker"], str]:
    """Who runs it, and its path or name."""
    apptainer = shutil.which("apptainer") is not None
    if name.startswith("docker://") and not here and not apptainer:
        return "apptainer", name  # the job fetches it
    if name.startswith("docker:") and not (name.startswith("docker://") and apptainer):
        if here and shutil.which("docker") is None:
            raise TsaeError(f"--container {name}: neither apptainer nor docker is on PATH")
        known = name.removeprefix("docker:").removeprefix("//")
        if not re.fullmatch(r"\w[\w.:/@-]*", known, re.ASCII):
            raise TsaeError(f"--container {name}: {known!r} is no name of an image; docker:owner/image:tag is one")
        return "docker", known
    if here and not apptainer:
        raise TsaeError(f"--container {name}: apptainer is not on PATH")
    if name.startswith("docker://"):
        return "apptainer", str(_pulled(name))
    image = Path(os.path.abspath(environment.expanded(name)))
    if not image.exists():
        raise TsaeError(
            f"--container {name}: no such file; `apptainer build {image.name} apptainer.def` makes one, and "
            "docker://owner/image:tag is fetched"
        )
    if apptainer and image.is_file() and (why := _complaint(["apptainer", "inspect", str(image)])):
        raise TsaeError(f"--container {name}: apptainer cannot open it: {why}")
    return "apptainer", str(image)


def _binds(places: Iterable[str | Path], asked: Sequence[str]) -> list[str]:
    """TSAE_HOME and everything that `places` reach, without what lies below another; `asked` must exist."""
    for bind in asked:
        here = bind.partition(":")[0]
        if not Path(here).exists():
            raise TsaeError(f"binds: {here}: no such folder")
    # Not Path.exists, which raises for what is too long to be a path, as a text is.
    named = [environment.home(), *(place for place in places if os.path.exists(place))]
    cwd = Path.cwd()  # of what lies there a job opens only what is named
    found = {path for place in named for path in _reached(environment.expanded(place).absolute(), Path(place) != cwd)}
    kept: list[Path] = []
    for path in sorted(found):
        if not any(path.is_relative_to(above) for above in kept):
            kept.append(path)
    return [*map(str, kept), *asked]


def _reached(place: Path, inside: bool) -> set[Path]:
    """`place` by every name that it has on the way through links, and what links below it name, if `inside`.

    A link is bound where it points to: inside the image it stands in its folder as it does outside.
    """
    found: set[Path] = set()
    seen: set[str] = set()
    todo = [(place, LEVELS if inside else 0)]
    while todo:
        path, levels = todo.pop()
        found.update(_spellings(path))
        root = os.path.realpath(path)
        if root in seen:
            continue
        seen.add(root)
        for link, left in _links(root, levels):
            real = Path(os.path.realpath(link))
            if Path(root).is_relative_to(real) or any(real.is_relative_to(own) for own in OF_THE_IMAGE):
                continue
            if real.is_dir():
                todo.append((Path(link), 0 if real.is_relative_to(root) else left))
            elif real.exists():
                # Their folder, for there may be thousands; but never all of /opt, which an image has too.
                found.update(name.parent if len(name.parts) > 3 else name for name in _spellings(Path(link)))
    return found


def _links(folder: str, levels: int) -> Iterator[tuple[str, int]]:
    """Links in `folder` and below it, with the levels that are left there."""
    if not levels or not os.path.isdir(folder) or not os.access(folder, os.R_OK | os.X_OK):
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink():
                yield entry.path, levels - 1
            elif entry.is_dir(follow_symlinks=False):
                yield from _links(entry.path, levels - 1)


def _spellings(path: Path) -> Iterator[Path]:
    """`path`, and again with each link on its way replaced by what that names, until there is none."""
    yield path
    for above in (*reversed(path.parents), path):
        if above.is_symlink():
            target = Path(os.path.normpath(above.parent / above.readlink()))
            yield from _spellings(target / path.relative_to(above))
            return


def _hub_cache() -> Path:
    return environment.expanded(os.environ.get("HF_HOME") or "~/.cache/huggingface").absolute()


def _pulled(name: str) -> Path:
    """The image of a registry as a file under TSAE_HOME, fetched once: compute nodes may have no way out."""
    image = environment.home() / "containers" / (re.sub(r"[^\w.-]+", "-", name.removeprefix("docker://")) + ".sif")
    if image.exists():
        return image
    image.parent.mkdir(parents=True, exist_ok=True)
    files.discard_drafts(image.parent, image.name)
    unfinished = files.draft_of(image)
    pull = ["apptainer", "pull", str(unfinished), name]
    if why := _complaint(pull):
        unfinished.unlink(missing_ok=True)
        raise TsaeError(f"--container {name}: `{shlex.join(pull)}` failed: {why}")
    unfinished.rename(image)
    return image


def _complaint(command: Sequence[str]) -> str | None:
    """Run `command`; the last line of why it failed, or None if it did not."""
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if not answer.returncode:
        return None
    return (answer.stderr.strip() or "no word of why").splitlines()[-1]
