"""What an attempt was made of: a copy of the code that its jobs import, and a record of everything around it."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import tsae
from tsae.runtime import files
from tsae.runtime.errors import TsaeError

PACKAGE = Path(tsae.__file__).parent
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")


def copy_code(folder: Path) -> None:
    """Copy the package into `folder`: an edit of the checkout never reaches a job that waits."""
    try:
        shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=_LEFT_OUT)
    except shutil.Error as error:
        # It lists every file; one is enough to know that the disk is full.
        _, target, reason = error.args[0][0]
        raise TsaeError(f"{target}: the code cannot be copied: {reason.partition(': ')[0]}") from None


def shell_path(in_image: bool = False) -> list[str]:
    """What the launching shell's PYTHONPATH names, as absolute paths; for an image only folders, which can be bound."""
    named = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return [entry for entry in named if os.path.isdir(entry)] if in_image else named


def python_path(code: Path, *more: str | None) -> str:
    """PYTHONPATH of jobs that run the copy in `code`: it comes first, or what is installed would stand in for it."""
    return os.pathsep.join([str(code), *(entry for entry in more if entry)])


def write_provenance(folder: Path, image: str | None = None) -> None:
    """Write provenance.json, and changes.diff for a checkout with changes, into `folder`; `image` is the container's."""
    record: dict[str, Any] = {
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "working_directory": os.getcwd(),
        "user": os.environ.get("USER", str(os.getuid())),
        "host": platform.node(),
        "python": platform.python_version(),
        "packages": dict(sorted((found.name, found.version) for found in metadata.distributions())),
        "container": None if image is None else {"image": image, "sha256": _digest(image)},
    }
    if (PACKAGE.parent / ".git").exists():  # an installed wheel has no commit; its version is among the packages
        record["commit"] = _git("rev-parse", "HEAD").strip()
        record["untracked"] = _git("ls-files", "--others", "--exclude-standard").splitlines()
        changes = _git("diff", "HEAD")
        record["changes"] = "changes.diff" if changes else None
        if changes:
            files.write_text(folder / "changes.diff", changes)
    files.write_json(folder / "provenance.json", record)


def _git(*arguments: str) -> str:
    """What git says; its complaint where it refuses, as it does in a checkout of another user, or is not there."""
    try:
        answer = subprocess.run(["git", *arguments], cwd=PACKAGE.parent, capture_output=True, check=False)
    except FileNotFoundError:
        return "git: not found"
    # A changed file may hold any bytes.
    return (answer.stderr if answer.returncode else answer.stdout).decode(errors="replace")


def _digest(image: str) -> str | None:
    """SHA-256 of an image that is a file, or of one that Docker has; None of a folder, and of one yet to be fetched."""
    if Path(image).is_file():
        with open(image, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    try:
        inspect = ["docker", "image", "inspect", "--format={{.Id}}", image]
        answer = subprocess.run(inspect, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return answer.stdout.strip().removeprefix("sha256:") or None
