"""What files hold: a sha256 that is computed once, so that a hundred gigabytes are read once and known again.

A file is taken for the one that was read as long as its path, inode, size and times are the same. What is known lies in
TSAE_HOME/contents, one small file for each; where that may not be written, the content is read again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from tsae.runtime import metadata
from tsae.runtime.environment import home
from tsae.runtime.errors import TsaeError

BLOCK = 1 << 24
RECENT_SECONDS = 2.0
"""A file that was changed so shortly before it was read may change again within the same tick of its clock."""
SHOWN_SECONDS = 5.0

_known: dict[str, tuple[list[int], str]] = {}
"""Of this process: path → (what `_stamp` gave, sha256)."""


def sha256_of(path: Path) -> str:
    """sha256 of a file's content, in hex. Raises TsaeError if it cannot be read."""
    path = Path(os.path.abspath(path))
    name = str(path)
    try:
        stamp = _stamp(path)
        if name in _known and _known[name][0] == stamp:
            return _known[name][1]
        record = home() / "contents" / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"
        found = metadata.whole(record)
        if found.get("path") == name and found.get("stamp") == stamp and isinstance(found.get("sha256"), str):
            _known[name] = stamp, found["sha256"]
            return found["sha256"]
        digest = _read(path, stamp[1])
        if _stamp(path) != stamp:
            raise TsaeError(f"{path}: is being changed while it is read; give the command again when it is written")
    except OSError as error:
        raise TsaeError(f"{path}: cannot be read: {error.strerror or error}") from None
    if time.time() - stamp[2] / 1e9 > RECENT_SECONDS:
        _known[name] = stamp, digest
        with suppress(OSError):  # a home that may not be written costs time, and nothing else
            metadata.write(record, {"path": name, "stamp": stamp, "sha256": digest})
    return digest


def sha256_of_all(paths: Iterable[Path], root: Path) -> str:
    """One sha256 over the names below `root` and the contents of several files, in their order."""
    named = [[os.path.relpath(path, root), sha256_of(path)] for path in paths]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def _stamp(path: Path) -> list[int]:
    status = os.stat(path)
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _read(path: Path, size: int) -> str:
    digest, done = hashlib.sha256(), 0
    began = shown = time.monotonic()
    with open(path, "rb", buffering=0) as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
            done += len(block)
            if time.monotonic() - shown > SHOWN_SECONDS:
                shown = time.monotonic()
                rate = done / 1e6 / (shown - began)
                print(
                    f"content of {path}: {done / 1e9:.1f}/{size / 1e9:.1f} GB ({rate:.0f} MB/s)",
                    file=sys.stderr,
                    flush=True,
                )
    return digest.hexdigest()
