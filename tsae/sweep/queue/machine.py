"""This machine's cores and GPUs, and who has them: a GPU serves one job at a time, whatever queue started it."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tsae.runtime import environment, locks


@dataclass(frozen=True)
class Share:
    """What one job may use of this machine."""

    cpus: int
    gpus: tuple[str, ...] = ()
    leases: tuple[locks.Lock, ...] = ()
    """What holds the GPUs; handed to a job, it keeps them should the queue be killed."""


class Machine:
    """Cores and GPUs, shared out by one queue; GPUs are held against other queues too."""

    def __init__(self, cores: int, gpus: tuple[str, ...] = ()) -> None:
        self.cores, self.gpus = cores, gpus
        self._free_cores = cores
        self._held: dict[str, locks.Lock] = {}

    @classmethod
    def this(cls) -> Machine:
        """What this process may use."""
        return cls(environment.available_cores(), visible_gpus())

    def take(self, cpus: int, gpus: int) -> Share | None:
        """`cpus` cores (all of them, if there are fewer) and `gpus` GPUs, or None while too little is free."""
        cpus = min(cpus, self.cores)
        if cpus > self._free_cores:
            return None
        held: dict[str, locks.Lock] = {}
        for gpu in self.gpus:
            if len(held) == gpus:
                break
            if gpu not in self._held:
                with suppress(locks.LockHeld):
                    held[gpu] = locks.Lock(_lease(gpu), f"GPU {gpu}")
        if len(held) < gpus:
            for lease in held.values():
                lease.release()
            return None
        self._held |= held
        self._free_cores -= cpus
        return Share(cpus, tuple(held), tuple(held.values()))

    def give_back(self, share: Share) -> None:
        """Free what was taken; once its job has ended."""
        self._free_cores += share.cpus
        for gpu in share.gpus:
            self._held.pop(gpu).release()


def visible_gpus() -> tuple[str, ...]:
    """GPUs of this machine that this process may use, found without loading torch."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return tuple(name.strip() for name in named.split(",") if name.strip() and name.strip() != "-1")
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(str(i) for i, line in enumerate(listed.stdout.splitlines()) if line.startswith("GPU "))


def _lease(gpu: str) -> Path:
    """The lock on a GPU of this machine: whoever has it has the GPU. Temporary folders may be those of several machines."""
    folder = Path(tempfile.gettempdir()) / f"tsae-gpus-{os.getuid()}-{socket.gethostname()}"
    return folder / f"{gpu.replace('/', '-')}.lock"
