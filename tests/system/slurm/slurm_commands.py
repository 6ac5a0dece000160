"""`sweep.py` and `status.py` on the command line, for a sweep of tiny runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.system.slurm.slurm_sweep import LAUNCH, tiny_run

CLUSTER = {
    "defaults": {"partition": "main", "time": "10m", "cpus": 1, "mem": "2G"},
    "train": {"nodes": 2, "tasks": 2},
}


class CommandLine:
    """A sweep over two points, each trained by two processes on each of two nodes, and the commands for it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.file = home / "tiny.yaml"
        (home / "base.yaml").write_text(yaml.safe_dump(tiny_run(home / "store")))
        (home / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER))
        self.write([0.2, 0.4])

    def write(self, fractions: list[float], **sections: Any) -> None:
        """Write the sweep."""
        tree = {"base": str(self.home / "base.yaml"), "grid": {"sae.split_fraction": fractions}, **sections}
        self.file.write_text(yaml.safe_dump(tree))

    def start(self, *words: str) -> subprocess.Popen[str]:
        """`sweep.py`, while other things happen."""
        command = [
            sys.executable,
            str(LAUNCH / "sweep.py"),
            str(self.file),
            "--cluster",
            str(self.home / "cluster.yaml"),
        ]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([*command, *words], cwd=self.home, text=True, **pipes)  # type: ignore[call-overload]

    def sweep(self, *words: str, code: int = 0) -> str:
        """What `sweep.py` says, all of it; it must end with `code`."""
        process = self.start(*words)
        said = "".join(process.communicate())
        assert process.returncode == code, said
        return said

    def status(self) -> str:
        """What `status.py` says."""
        command = [sys.executable, str(LAUNCH / "status.py"), str(self.file)]
        return subprocess.run(command, cwd=self.home, text=True, capture_output=True, check=True).stdout

    def counts(self) -> dict[str, dict[str, str]]:
        """Kind of stage → state → how many, as `status.py` shows it."""
        lines = self.status().splitlines()
        first = next(number for number, line in enumerate(lines) if line.startswith("stage"))
        columns = re.split(r"\s{2,}", lines[first].strip())
        found = {}
        for line in lines[first + 1 : lines.index("", first)]:
            # A number stands under the end of its column's name.
            ends = {match.end(): match.group() for match in re.finditer(r"\S+", line)}
            kind, *_ = line.split()
            found[kind] = {
                name: ends[lines[first].index(f" {name}") + 1 + len(name)]
                for name in columns[1:]
                if lines[first].index(f" {name}") + 1 + len(name) in ends
            }
        return found
