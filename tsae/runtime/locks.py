"""Locks on stages: at most one live process works on an output, and a dead one never blocks.

A lock is a small JSON file beside the output that names its owner by host, process id and start time.
Where the owner's process can be seen, the process table decides whether it lives; on other hosts, and in containers
with process ids of their own, a heartbeat does.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tsae.runtime import files
from tsae.runtime.errors import TsaeError

HEARTBEAT_SECONDS = 15.0
SILENT_SECONDS = 120.0


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock."""

    host: str
    pid: int
    started: str
    since: float
    table: str = ""
    """The process table that holds `pid`: Docker's containers have tables of their own, and may have the host's name."""

    @classmethod
    def this(cls) -> Owner:
        """This process, from now."""
        return cls(socket.gethostname(), os.getpid(), started_at(os.getpid()), time.time(), _process_table())

    @property
    def is_here(self) -> bool:
        """Whether this process sees that one, and may signal it."""
        return (self.host, self.table) == (socket.gethostname(), _process_table())

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {time.strftime('%H:%M:%S', time.localtime(self.since))}"


class LockHeld(TsaeError):
    """Another live process is working on the same output."""


def owner(path: Path) -> Owner | None:
    """The live process that holds the lock at `path`, or None."""
    try:
        found = Owner(**json.loads(path.read_text()))
        beaten = path.stat().st_mtime
    except (OSError, ValueError, TypeError):
        # Missing, or not whole: locks are written atomically, so such a file has no owner.
        return None
    if found.is_here:
        return found if started_at(found.pid) == found.started else None
    return found if _clock(path.parent) - beaten < SILENT_SECONDS else None


@contextmanager
def hold(path: Path, what: str) -> Iterator[None]:
    """Hold the lock at `path` while the block runs; LockHeld if a live process has it."""
    with files.tentative_folder(path.parent):
        with _guard(path):
            holder = owner(path)
            if holder is not None:
                raise LockHeld(f"{what}: {holder} is already working on it; wait for it or end it")
            files.write_json(path, asdict(Owner.this()))
        leaving = threading.Event()
        heart = threading.Thread(target=_beat, args=(path, leaving), daemon=True)
        heart.start()
        try:
            yield
        finally:
            leaving.set()
            heart.join()
            if path.exists():
                with _guard(path) as guard:
                    path.unlink(missing_ok=True)
                    guard.unlink()


def started_at(pid: int) -> str:
    """When process `pid` started, in the operating system's own words; empty if there is none.

    Tells a process from a later one with the same id.
    """
    try:
        # The name in field 2 may hold spaces and brackets; field 22 counts from behind it.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        return "alive"
    return "alive"


def _process_table() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""  # no Linux; its containers are virtual machines


def _beat(path: Path, leaving: threading.Event) -> None:
    while not leaving.wait(HEARTBEAT_SECONDS):
        with suppress(FileNotFoundError):
            os.utime(path)


@contextmanager
def _guard(path: Path) -> Iterator[Path]:
    """Keep other processes out while the lock file is looked at and replaced; yields the file that does it."""
    guard = path.with_name(f".{path.name}.guard")
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opened, suppress(FileNotFoundError):  # whoever leaves takes file and folder away
            stream = opened.enter_context(open(guard, "w"))
            fcntl.flock(stream, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(stream.fileno()), guard.stat()):
                held = opened.pop_all()
                break
    with held:
        yield guard


def _clock(folder: Path) -> float:
    """Now, by the clock of the file system that stamps `folder`'s files."""
    probe = folder / f".clock.{os.getpid()}.{threading.get_ident()}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
