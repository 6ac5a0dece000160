"""Which device a process works on."""

from __future__ import annotations

from tsae.runtime.environment import local_rank
from tsae.runtime.errors import TsaeError


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
