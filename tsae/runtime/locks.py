"""Locks on stages: at most one live process works on an output, and a dead one never blocks.

A lock is a small JSON file beside the output that names its owner by host, process id and start time.
Where the owner's process can be seen, the process table decides whether it lives; on other hosts, and in containers
with process ids of their own, a heartbeat does, by the clock of the file system that holds the lock.

No lock of the operating system is asked for: some file systems have none, and on others it locks nothing. A lock is
taken by a hard link, or where there are none by a file that must be new. Of those who find a dead owner's lock, one alone
can make the file that names the heir of exactly that owner; the heir counts as the owner, and moves its file over the lock.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tsae.runtime import files, metadata, preemption
from tsae.runtime.errors import TsaeError
from tsae.runtime.processes import clock, process_table, started_at

HEARTBEAT_SECONDS = 15.0
SILENT_SECONDS = 120.0
WAIT_SECONDS = 1.0
MOST_ATTEMPTS = 100
"""Races that are lost before a lock counts as held; each was won by another process."""


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock."""

    host: str
    pid: int
    started: str
    since: float
    table: str = ""
    """The process table that holds `pid`: Docker's containers have tables of their own, and may have the host's name;
    so may another machine, or this one before it was started again."""

    @classmethod
    def of(cls, pid: int) -> Owner:
        """Process `pid` of this machine, from now."""
        return cls(socket.gethostname(), pid, started_at(pid), time.time(), process_table())

    @property
    def is_here(self) -> bool:
        """Whether this process sees that one, and may signal it."""
        # Earlier versions wrote the table without the boot.
        tables = (process_table(), process_table().partition(" ")[0])
        return self.host == socket.gethostname() and self.table in tables

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {time.strftime('%H:%M:%S', time.localtime(self.since))}"


OWNER = {"host": str, "pid": metadata.COUNT, "started": str, "since": float, "table?": str}


class LockHeld(TsaeError):
    """Another live process is working on the same output."""


def owner(path: Path) -> Owner | None:
    """The live process that holds the lock at `path`, or None."""
    _, last = _find(path)
    return last.owner if last is not None and last.lives() else None


@contextmanager
def hold(path: Path, what: str) -> Iterator[None]:
    """Hold the lock at `path` while the block runs; LockHeld if a live process has it."""
    lock = Lock(path, what)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def hold_when_free(path: Path, what: str) -> Iterator[None]:
    """The same, once a process that has it lets go."""
    lock = None
    while lock is None:
        try:
            lock = Lock(path, what)
        except LockHeld:
            preemption.wait(WAIT_SECONDS)
    try:
        yield
    finally:
        lock.release()


def clear(folder: Path, prefix: str = "") -> None:
    """Remove what ended processes left of those locks in `folder` whose names begin with `prefix`.

    Locks of live processes stay, and all where nothing may be written.
    """
    traces = re.compile(rf"\.?((?={re.escape(prefix)}).*?\.lock)(\..*)?")
    found = {trace[1] for trace in map(traces.fullmatch, os.listdir(folder)) if trace} if folder.is_dir() else set()
    for name in sorted(found):
        with suppress(LockHeld, OSError), hold(folder / name, "clearing"):
            continue


class Lock:
    """The lock at `path`, held from now on for `what`. Raises LockHeld if a live process has it.

    Folders that are made for it go with it if nothing else came into them. Should this process have been silent for so
    long that another took the lock, it ends at once, with the exit code of one that was preempted.
    """

    def __init__(self, path: Path, what: str) -> None:
        self._path, self._what = path, what
        self._owner, self._is_own = Owner.of(os.getpid()), True
        self._made = [folder for folder in path.parents if not folder.exists()]
        try:
            self._take()
        except BaseException:
            self._remove_folders()
            raise
        self._using, self._leaving = threading.Lock(), threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self._heart.start()

    def hand_to(self, pid: int) -> None:
        """Name process `pid` of this machine as the owner: the lock is held until that ends, or `release`."""
        with self._using:
            self._owner, self._is_own = Owner.of(pid), False
            files.write_text(self._path, self._text())

    def release(self) -> None:
        """Let go of it."""
        self._leaving.set()
        self._heart.join()
        with suppress(FileNotFoundError):
            if self._keep():
                self._path.unlink()
        self._remove_folders()

    def _take(self) -> None:
        for left in reversed(range(MOST_ATTEMPTS)):
            root, last = _find(self._path)
            if last is not None and last.lives():
                raise LockHeld(
                    f"{self._what}: {last.owner or 'somebody'} is already working on it; wait for it or end it"
                )
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                if self._create(self._path) if last is None else self._inherit(root, last):
                    self._remove_leftovers()
                    return
            except FileNotFoundError:  # another process has just removed the folder, which was empty
                if not left:
                    raise
        raise LockHeld(f"{self._what}: others are already taking it; wait for them or end them")

    def _inherit(self, root: _Found | None, last: _Found) -> bool:
        """Take the place of `last`, which is dead, in the lock that was `root` then; whether nobody else did."""
        claim = _heir(self._path, last)
        if not self._create(claim):
            return False
        # Its owner may have come back, or another may have become the heir, before the claim; after it, none can.
        if _read(self._path) == root:
            with suppress(FileNotFoundError):  # a network file system's answer to a question that it was asked twice
                os.replace(claim, self._path)
            return self._is_at(self._path)
        claim.unlink(missing_ok=True)
        return False

    def _create(self, path: Path) -> bool:
        """Put the owner's name at `path`, where nothing is; whether this succeeded rather than another process."""
        draft = self._path.with_name(f".{self._path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
        try:
            draft.write_text(self._text())
            try:
                os.link(draft, path)
            except (FileExistsError, FileNotFoundError):
                raise
            except OSError:  # a file system without hard links
                with open(path, "x") as stream:
                    try:
                        stream.write(self._text())
                        stream.flush()
                    except OSError:  # a full disk: a lock without an owner would hold others off
                        path.unlink()
                        raise
        except (FileExistsError, FileNotFoundError):
            pass
        finally:
            draft.unlink(missing_ok=True)
        # Asked twice, a network file system may have done it and say that it was there.
        return self._is_at(path)

    def _is_at(self, path: Path) -> bool:
        found = _read(path)
        return found is not None and found.text == self._text()

    def _text(self) -> str:
        return metadata.text_of(asdict(self._owner))

    def _remove_leftovers(self) -> None:
        """Remove what dead processes left when they took this lock; for its owner."""
        for path in self._path.parent.iterdir():
            if not path.name.startswith(f".{self._path.name}."):
                continue
            found = _read(path) if path.suffix in (".heir", ".tmp") else None
            if found is not None and not found.lives():
                path.unlink(missing_ok=True)

    def _remove_folders(self) -> None:
        with suppress(OSError):  # not empty, or removed by somebody else
            for folder in self._made:
                folder.rmdir()

    def _beat(self) -> None:
        beaten = time.monotonic()
        while not self._leaving.wait(HEARTBEAT_SECONDS):
            silent, beaten = time.monotonic() - beaten, time.monotonic()
            with suppress(OSError), self._using:  # a file system that does not answer is asked again
                if self._keep(restore=silent < SILENT_SECONDS):
                    continue
                if not self._is_own:
                    return
                print(
                    f"tsae: {self._what}: {owner(self._path) or 'somebody'} has taken the lock {self._path} of this "
                    f"process, which was silent for {silent:.0f} s; this one ends here",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
                os._exit(preemption.REQUEUE)

    def _keep(self, restore: bool = False) -> bool:
        """Give a sign of life; whether the lock is still this one's. `restore`: put it back if somebody removed it."""
        try:
            os.utime(self._path)
        except FileNotFoundError:
            return restore and self._create(self._path)
        # In this order: an heir makes its claim, looks for a sign of life, and moves the claim over the lock.
        return not _heir(self._path, _Found(self._path, self._text(), 0)).exists() and self._is_at(self._path)


@dataclass(frozen=True)
class _Found:
    """What lies at a lock's place, and when that was last touched."""

    path: Path
    text: str
    """Empty, if it may not be read."""
    beaten: int
    """In nanoseconds of the file system's clock."""

    @property
    def owner(self) -> Owner | None:
        """Whom it names; None for what is not whole."""
        told = metadata.record(self.text.encode(), OWNER)
        return None if told is None else Owner(**{name: told[name] for name in told if name in Owner.__annotations__})

    @property
    def token(self) -> str:
        """Tells it from every other lock of every time."""
        text = self.text if self.owner else f"{self.text}{self.beaten}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def lives(self) -> bool:
        """Whether its owner does; of one that is unknown, whether it was touched lately."""
        owner = self.owner
        seen = started_at(owner.pid) if owner is not None and owner.is_here else "alive"
        if owner is not None and seen != "alive":
            return bool(seen) and seen == owner.started
        return clock(self.path.parent) - self.beaten / 1e9 < SILENT_SECONDS


def _find(path: Path) -> tuple[_Found | None, _Found | None]:
    """The lock at `path`, and the last of its heirs, or itself."""
    root = last = _read(path)
    while last is not None and (heir := _read(_heir(path, last))) is not None:
        last = heir
    return root, last


def _heir(path: Path, found: _Found) -> Path:
    """Where whoever takes over from the owner of `found` says so, before the lock at `path` does."""
    return path.with_name(f".{path.name}.{found.token}.heir")


def _read(path: Path) -> _Found | None:
    """What lies at `path`, or None."""
    try:
        text = path.read_text()  # opened before it is asked for its age, which network file systems then fetch anew
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        text = ""
    try:
        return _Found(path, text, path.stat().st_mtime_ns)
    except FileNotFoundError:
        return None
