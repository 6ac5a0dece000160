"""Atomic writes: a file is whole, on disk and group-readable, or it is not there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a temporary file, then fsync it, rename it to `path` and fsync the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes of several machines, and of several containers, may have the same id.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
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
