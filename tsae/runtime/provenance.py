"""Where an output came from: code, packages, machine, moment."""

from __future__ import annotations

import datetime
import platform
import subprocess
import sys
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from tsae.runtime import metadata
from tsae.runtime.secrets import hide

PACKAGES = ("torch", "accelerate", "transformers", "datasets", "nnsight", "zarr", "numpy", "scikit-learn")


def provenance(training_hash: str, **sources: Any) -> dict[str, Any]:
    """A JSON-able record; `sources` are the records of the inputs."""
    return {
        "training_hash": training_hash,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [*map(hide, sys.argv)],
        "host": platform.node(),
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in PACKAGES},
        "tsae": _tsae_version(),
        **sources,
    }


def _tsae_version() -> dict[str, str]:
    version = {"version": version_of("tsae")}
    folder = Path(__file__).parents[1]
    # A launcher's jobs import a copy of the code, which lies beside the record of what it is a copy of.
    copied = folder.parents[1] / "provenance.json"
    if copied.exists():
        record = metadata.whole(copied)
        return version | {name: record[name] for name in ("commit", "changes") if record.get(name)}
    # Only a checkout has a commit; an installed wheel is told by its version.
    if (folder.parent / ".git").exists():
        commands = {"commit": ["rev-parse", "HEAD"], "changes": ["status", "--porcelain", "--untracked-files=no"]}
        for name, arguments in commands.items():
            answer = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
            if answer.returncode == 0:
                version[name] = answer.stdout.strip()
    return version
