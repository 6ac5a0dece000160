"""What makes a place hostile; each is done in the process that then runs a command there."""

from __future__ import annotations

import ctypes
import itertools
import os
import struct
import subprocess
import time
from pathlib import Path

GROUP, USERS = 54320, (54321, 54322)
"""Ids that no account of this machine has."""


def in_a_container(_: Path) -> None:
    """No HOME, a user whom the machine does not know, a umask of 077."""
    del os.environ["HOME"]
    as_user(USERS[0])
    os.umask(0o077)


def on_a_bare_machine(folder: Path) -> None:
    """A HOME where nothing may be written, as root neither; no /dev/shm; a clock that loses an hour at every twentieth look."""
    home, devices = folder.parent / "users", folder.parent / "dev"
    home.mkdir(exist_ok=True)
    os.environ["HOME"] = str(home)
    mount("-t", "tmpfs", "-o", "ro", "tmpfs", str(home))
    devices.mkdir(exist_ok=True)
    mount("-t", "tmpfs", "tmpfs", str(devices))
    for name in ("null", "zero", "random", "urandom"):
        (devices / name).touch()
        mount("--bind", f"/dev/{name}", str(devices / name))
    (devices / "fd").symlink_to("/proc/self/fd")
    mount("-o", "remount,ro", str(devices))
    mount("--rbind", str(devices), "/dev")
    looks, clock = itertools.count(), time.time
    time.time = lambda: clock() - 3600 * (next(looks) // 20)


def as_user(user: int, _: Path | None = None) -> None:
    """Be a user of the group that shares the folder, who may read what root may: Python itself may lie in root's home."""
    os.umask(0o002)
    os.setgroups([GROUP])
    os.setgid(user)
    _done(LIBC.prctl(8, 1, 0, 0, 0), "PR_SET_KEEPCAPS")
    os.setuid(user)
    reads = 1 << 2  # CAP_DAC_READ_SEARCH: effective and permitted, not inheritable
    _done(LIBC.capset(struct.pack("Ii", 0x20080522, 0), struct.pack("6I", reads, reads, 0, 0, 0, 0)), "capset")


def where_one_may_mount(_: Path) -> None:
    """Like here, if this is a root that may mount."""
    mount("-t", "tmpfs", "tmpfs", "/mnt")


def mount(*words: str) -> None:
    """`mount`, for this process and those it starts."""
    _done(LIBC.unshare(0x00020000), "CLONE_NEWNS")
    for command in (["--make-rprivate", "/"], words):
        subprocess.run(["mount", *command], check=True)


LIBC = ctypes.CDLL(None, use_errno=True)


def _done(failed: int, what: str) -> None:
    if failed:
        raise OSError(ctypes.get_errno(), what)
