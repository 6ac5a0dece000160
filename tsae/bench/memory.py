"""Memory that a process needs for what it does, above what it had before."""

from __future__ import annotations

import ctypes
import sys

import torch


class Memory:
    """Bytes above what is in use now: resident memory, or what torch allocates on a GPU."""

    def __init__(self, device: str) -> None:
        self._device = device if device.startswith("cuda") else None
        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before: int | None = torch.cuda.memory_allocated(self._device)
        else:
            # Freed memory goes back to the system, where it counts again once it is used.
            _trim()
            self._before = _status("VmRSS")

    def peak(self) -> int | None:
        """Most bytes since; none where the system does not tell."""
        highest = self._highest()
        return None if highest is None or self._before is None else highest - self._before

    def _highest(self) -> int | None:
        return torch.cuda.max_memory_allocated(self._device) if self._device else _status("VmHWM")


def _trim() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def _status(field: str) -> int | None:
    """A size that Linux tells of this process, in bytes."""
    if sys.platform != "linux":
        return None
    with open("/proc/self/status") as lines:
        found = next((line for line in lines if line.startswith(field)), None)
    return None if found is None else 1024 * int(found.split()[1])
