"""This machine's cores and GPUs, and who has them: a GPU serves one job at a time, whatever queue started it."""

from __future__ import annotations

import fcntl
import getpass
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tsae.runtime import environment


@dataclass(frozen=True)
class Share:
    """What one job may use of this machine."""

    cpus: int
    gpus: tuple[str, ...] = ()
    leases: tuple[int, ...] = ()
    """File descriptors that hold the GPUs; a job that inherits them keeps its GPUs should the queue be killed."""


class Machine:
    """Cores and GPUs, shared out by one queue; GPUs are held against other queues too."""

    def __init__(self, cores: int, gpus: tuple[str, ...] = ()) -> None:
        self.cores, self.gpus = cores, gpus
        self._free_cores = cores
        self._held: dict[str, IO[str]] = {}

    @classmethod
    def this(cls) -> Machine:
        """What this process may use."""
        return cls(environment.available_cores(), visible_gpus())

    def take(self, cpus: int, gpus: int) -> Share | None:
        """`cpus` cores (all of them, if there are fewer) and `gpus` GPUs, or None while too little is free."""
        cpus = min(cpus, self.cores)
        if cpus > self._free_cores:
            return None
        held: dict[str, IO[str]] = {}
        for gpu in self.gpus:
            if len(held) == gpus:
                break
            stream = None if gpu in self._held else _lease(gpu)
            if stream is not None:
                held[gpu] = stream
        if len(held) < gpus:
            for stream in held.values():
                stream.close()
            return None
        self._held |= held
        self._free_cores -= cpus
        return Share(cpus, tuple(held), tuple(stream.fileno() for stream in held.values()))

    def give_back(self, share: Share) -> None:
        """Free what was taken; once its job has ended."""
        self._free_cores += share.cpus
        for gpu in share.gpus:
            self._held.pop(gpu).close()


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


def _lease(gpu: str) -> IO[str] | None:
    """A stream that holds `gpu` as long as it, or a copy of it in a job, is open; None if another queue has the GPU."""
    folder = Path(tempfile.gettempdir()) / f"tsae-gpus-{getpass.getuser()}"
    folder.mkdir(exist_ok=True)
    stream = open(folder / gpu.replace("/", "-"), "w")  # noqa: SIM115 (closed when the GPU is given back)
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stream.close()
        return None
    return stream
