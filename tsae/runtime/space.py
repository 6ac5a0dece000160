"""What this machine has room for: bytes free on the disk of a folder, quotas where somebody can be asked, memory."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

QUOTA_BLOCK = 1024
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
ASK_SECONDS = 10


class Free(NamedTuple):
    """Room for more on the disk of a folder."""

    bytes: int
    disk: int
    """What tells this disk from others."""
    quota: bool
    """Whether a quota ends it, not the disk."""


def free_for(folder: Path) -> Free:
    """Room on the disk where `folder` is or will be, for this user."""
    place = next(there for there in (folder, *folder.absolute().parents) if there.exists())
    free, left = shutil.disk_usage(place).free, min(_left_by_quotas(place.resolve()), default=None)
    limited = left is not None and left < free
    return Free(left if limited and left is not None else free, place.stat().st_dev, limited)


def memory_bytes() -> int:
    """Memory of this machine, or what the container may use of it."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.is_file() else "max"
    return min(whole, int(limit)) if limit.isdecimal() else whole


def gpu_bytes() -> int | None:
    """Memory of the smallest GPU of this machine, found without loading torch; None where there is none."""
    sizes = _answer(["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"])
    return min((int(line) * 2**20 for line in sizes if line.strip().isdecimal()), default=None)


def free_on_gpu(device: torch.device) -> int:
    """Bytes of a GPU that this process may still take, what torch keeps for it among them."""
    import torch

    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept


def shown(size: float) -> str:
    """Bytes in words: `922 GB`, `1.8 GB`, `640 MB`."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.{0 if size >= 10 * unit else 1}f} {name}"
    return f"{size / 1e3:.0f} kB"


def _left_by_quotas(place: Path) -> Iterator[int]:
    """Bytes that each quota leaves on the file system of `place`, by `quota` and by Lustre's `lfs quota`.

    Both print the file system, then kilobytes used, soft and hard limit; 0 is none, and a star marks one that is exceeded.
    """
    commands = (
        ["quota", "-ugw", "--show-mntpoint", "--hide-device"],
        ["lfs", "quota", "-q", "-u", str(os.getuid()), str(place)],
    )
    for command in commands:
        for line in _answer(command):
            mounted, *numbers = line.replace("*", "").split()[:4] or [""]
            if len(numbers) < 3 or not all(map(str.isdecimal, numbers)) or not place.is_relative_to(mounted):
                continue
            used, soft, hard = map(int, numbers)
            if limit := hard or soft:
                yield max(0, limit - used) * QUOTA_BLOCK


def _answer(command: list[str]) -> list[str]:
    """The lines that a command prints; none where it is not here or has nothing to say."""
    if shutil.which(command[0]) is None:
        return []
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=ASK_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return said.stdout.splitlines()
