"""Whole folders, written atomically: complete under their name, or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tsae.runtime.errors import TsaeError
from tsae.runtime.files import discard_drafts, draft_of, sync_folder, tentative_folder


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder that takes the name `path` when the block ends well, and vanishes when it does not.

    Its files become readable for whoever may read the folder. Raises TsaeError if `path` holds anything already.
    """
    path = Path(path)
    refuse_used(path)
    temporary = draft_of(path)
    with tentative_folder(path.parent):
        discard_drafts(path.parent, path.name)
        temporary.mkdir()
        try:
            yield temporary
            _settle(temporary)
            try:
                os.replace(temporary, path)
            except OSError:
                refuse_used(path)
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync_folder(path.parent)


def refuse_used(path: Path) -> None:
    """Raise TsaeError unless `path` is free or an empty folder."""
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists():
        raise TsaeError(f"{path}: exists already and is left as it is; name a new or an empty folder")


def _settle(folder: Path) -> None:
    """Bring every file below `folder` to the disk, with the permissions of the folder."""
    readable = folder.stat().st_mode & 0o666
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            sync_folder(path)
            continue
        path.chmod(readable)
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
    sync_folder(folder)
