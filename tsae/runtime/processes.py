"""Which processes are alive, as far as this one can see, what time it is where files are stamped, and how this one ends."""

from __future__ import annotations

import atexit
import gc
import os
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path


def started_at(pid: int) -> str:
    """When process `pid` started, in the operating system's own words; empty if there is none.

    Tells a process from a later one with the same id, where it may be seen: `alive` is one of which nothing more is known.
    """
    try:
        # The name in field 2 may hold spaces and brackets; field 22 counts from behind it.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        return "alive"
    return "alive"


@cache
def process_table() -> str:
    """Tells the processes among which this one's id means something: those of one boot of one machine, or of a container."""
    try:
        table = os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""  # no Linux; its containers are virtual machines
    with suppress(OSError):
        table += " " + Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return table


def clock(folder: Path) -> float:
    """Now, by the clock of the file system that stamps `folder`'s files; by this machine's for who may not write there."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            return os.fstat(probe.fileno()).st_mtime
    except OSError:
        return time.time()


def end_without_a_search() -> None:
    """Spare this process, at its end, the search for garbage among all that torch and transformers hold: it takes a second."""
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
