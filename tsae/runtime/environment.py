"""What surrounds a process: where things land (`TSAE_HOME`), a `.env` file, its cores, its device, its place among others."""

from __future__ import annotations

import os
from pathlib import Path

from tsae.runtime.errors import TsaeError

SWEEPS = Path(__file__).resolve().parents[1] / "sweeps"
"""The shipped sweeps: package data, and in a checkout a link to the folder beside the package."""


def load_dotenv() -> None:
    """Read the nearest `.env` (working directory or a parent); variables already set win.

    Must run before huggingface_hub is imported: it reads HF_HOME at import time.
    """
    import dotenv

    path = dotenv.find_dotenv(usecwd=True)
    try:
        dotenv.load_dotenv(path, override=False)
    except ValueError:  # no UTF-8, or a NUL, which no variable can hold
        raise TsaeError(f"{path}: not plain UTF-8 text; a .env file holds lines such as HF_HOME=/folder") from None


def forget_what_is_for_others() -> None:
    """Leave out variables that would change what a command does, and that its user has not set for it.

    Must run before torch and matplotlib are imported.
    """
    # A notebook's may name a backend that is not here; no window is ever opened.
    os.environ["MPLBACKEND"] = "agg"
    # NVIDIA's images set it. Float32 products would be rounded to TF32, which no setting and no hash would say.
    os.environ.pop("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", None)


def home() -> Path:
    """The folder under which stores/, checkpoints/ and sweeps/ live: `TSAE_HOME`, or `./runs`."""
    return expanded(os.environ.get("TSAE_HOME") or "runs").absolute()


def expanded(name: str | Path) -> Path:
    """The path with `~` written out; as it is where the user it means has no home: a container's may be unknown to it."""
    return Path(os.path.expanduser(name))


def available_cores() -> int:
    """CPU cores this process may use, as the scheduler or the container set them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def process_rank() -> int:
    """Which of the processes started together this one is (torchrun's RANK); 0 if it is alone."""
    return _whole("RANK", 0, process_count() - 1)


def process_count() -> int:
    """How many processes were started together (torchrun's WORLD_SIZE)."""
    return _whole("WORLD_SIZE", 1, None)


def local_rank() -> int:
    """Which of the processes on this machine this one is (torchrun's LOCAL_RANK); 0 if it is alone."""
    return _whole("LOCAL_RANK", 0, process_count() - 1)


def own_device(name: str, where: str) -> str:
    """What the setting `where`, such as `auto` or `cuda`, means in this process: of several on a machine each has its GPU.

    Raises TsaeError for a GPU that is not here.
    """
    import torch

    gpus = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and int(name.partition(":")[2] or 0) >= gpus:
        raise TsaeError(f"{where}: {name} is not here; this machine shows {gpus} GPUs to PyTorch")
    # As accelerate does it: where the scheduler shows each process its own GPU alone, that is number 0.
    return f"cuda:{local_rank() % gpus}" if name == "cuda" else name


def _whole(name: str, least: int, most: int | None) -> int:
    """A whole number that torchrun sets, by default the `least` one. Raises TsaeError for anything else."""
    if most == 0:
        return 0  # alone, whatever an outer launcher left behind
    text = os.environ.get(name) or str(least)
    if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
        allowed = f"at least {least}" if most is None else f"{least} to {most}"
        raise TsaeError(
            f"{name}: {text!r}: a whole number, {allowed}, is expected; torchrun and srun set it themselves"
        )
    return int(text)
