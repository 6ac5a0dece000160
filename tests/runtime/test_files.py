"""A file is whole or not there, and what a killed writer leaves is gone with the next."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tsae.runtime import files

WRITE = """
import os, signal, sys
from tsae.runtime import files
def write(stream):
    stream.write(b"half")
    stream.flush()
    {then}
files.write_atomically(sys.argv[1], write)
"""
DIES = WRITE.format(then="os.kill(os.getpid(), signal.SIGKILL)")
STAYS = WRITE.format(then="print('writing', flush=True); sys.stdin.read()")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_draft_of_a_killed_writer_goes_with_the_next_one_and_that_of_a_live_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert subprocess.run([sys.executable, "-c", DIES, path]).returncode == -signal.SIGKILL
    (draft,) = names(tmp_path)
    assert draft.startswith(".a.json.")
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", STAYS, path], stdin=pipe, stdout=pipe) as live:
        assert live.stdout is not None
        assert live.stdout.readline() == b"writing\n"
        files.write_text(path, "whole")
        left = names(tmp_path)
        assert draft not in left
        assert len(left) == 2
        live.communicate(b"")
    assert names(tmp_path) == ["a.json"]
    assert path.read_bytes() == b"half"


@pytest.mark.parametrize("name", [".a.json.another-0123abcd.1.5c9d1f2e.tmp", ".a.json.1-5c9d1f2e.tmp"])
def test_a_draft_of_another_machine_or_an_earlier_version_goes_once_nobody_writes_to_it(
    tmp_path: Path, name: str
) -> None:
    draft, path = tmp_path / name, tmp_path / "a.json"
    draft.touch()
    files.write_text(path, "whole")
    assert draft.exists()
    past = time.time() - files.STALE_SECONDS - 60
    os.utime(draft, (past, past))
    files.write_text(path, "whole")
    assert names(tmp_path) == ["a.json"]


def test_a_name_that_begins_alike_is_another_file(tmp_path: Path) -> None:
    assert subprocess.run([sys.executable, "-c", DIES, tmp_path / "a.json.more"]).returncode == -signal.SIGKILL
    files.write_text(tmp_path / "b.json", "whole")
    assert len(names(tmp_path)) == 2
