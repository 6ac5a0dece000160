"""Who holds a lock, and whether that process lives."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tsae.runtime import locks

HOLD = """
import sys
from pathlib import Path
from tsae.runtime import locks
with locks.hold(Path(sys.argv[1]), "test"):
    print("held", flush=True)
    sys.stdin.read()
"""
OWN_PROCESSES = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
"""As a container of Docker that has the name of its host: process ids inside mean others outside."""


@pytest.mark.parametrize("inside", [[], OWN_PROCESSES])
def test_a_live_process_keeps_its_lock_also_where_its_id_means_nothing(tmp_path: Path, inside: list[str]) -> None:
    if inside and (shutil.which("unshare") is None or subprocess.run([*inside, "true"], check=False).returncode):
        pytest.skip("needs Linux that lets users make namespaces")
    path = tmp_path / "stage.lock"
    command = [*inside, sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        found = locks.owner(path)
        assert found is not None
        assert found.is_here == (not inside)
        with pytest.raises(locks.LockHeld), locks.hold(path, "test"):
            pass
        holder.communicate("")
    assert locks.owner(path) is None
