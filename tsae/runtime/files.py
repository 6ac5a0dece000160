"""Atomic writes: a file is whole, on disk and group-readable, or it is not there."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from tsae.runtime.processes import clock, process_table, started_at

STALE_SECONDS = 3600.0
"""Age from which on nobody is still making a draft."""


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a temporary file, then fsync it, rename it to `path` and fsync the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    discard_drafts(path.parent, path.name)
    temporary = draft_of(path)
    try:
        with open(temporary, "wb") as stream:
            write(stream)
            sync_stream(stream)
        mask = os.umask(0)  # it can only be read by setting it
        os.umask(mask)
        os.chmod(temporary, 0o664 & ~mask)
        os.replace(temporary, path)
    except RuntimeError as error:
        # torch's writer says only where it broke off; the disk's own error is the one to raise.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    finally:
        # On a file system that refuses this too, the error that led here is the one to see.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def draft_of(path: Path) -> Path:
    """A name beside `path` under which this process alone makes it, until it is whole."""
    # Processes of several machines, and of several containers, may have the same id.
    return path.with_name(f".{path.name}.{_host()}.{os.getpid()}.{os.urandom(4).hex()}.tmp")


def discard_drafts(folder: Path, prefix: str = "") -> None:
    """Remove what killed processes left in `folder` of files and folders whose names begin with `prefix`.

    That is drafts of processes of this host that are no longer alive, and those untouched for an hour.
    """
    with suppress(FileNotFoundError):
        for name in os.listdir(folder):
            if name.startswith(f".{prefix}") and name.endswith(".tmp"):
                _discard(folder / name)


def _discard(draft: Path) -> None:
    writer = re.fullmatch(r".*\.([^.]+)\.(\d+)\.\w+\.tmp", draft.name)
    # Earlier versions wrote the host's name alone, or none.
    is_here = writer is not None and writer[1] in (_host(), _host().rpartition("-")[0])
    try:
        silent = clock(draft.parent) - draft.stat().st_mtime
    except FileNotFoundError:
        return
    if silent > STALE_SECONDS or (is_here and writer is not None and not started_at(int(writer[2]))):
        with suppress(OSError):  # gone, or not to be removed: whoever needs the room is told so
            shutil.rmtree(draft) if draft.is_dir() else draft.unlink()


@cache
def _host() -> str:
    table = hashlib.sha256(process_table().encode()).hexdigest()[:8]
    return f"{socket.gethostname().replace('.', '-')}-{table}"


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    write_atomically(path, lambda stream: stream.write(text.encode()))


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; what we read again goes through `metadata.write`."""
    write_atomically(path, lambda stream: stream.write((json.dumps(value, indent=2) + "\n").encode()))


@contextmanager
def tentative_folder(folder: Path) -> Iterator[None]:
    """Make `folder` for a block; what was not there before, parents too, is gone after it where the block left it empty."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):  # the first that is not empty
            for place in made:
                place.rmdir()


def sync_stream(stream: BinaryIO) -> None:
    """Flush what was written to `stream` down to the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
