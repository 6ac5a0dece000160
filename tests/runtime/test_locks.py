"""Who holds a lock, whether that process lives, and that nothing is asked of a file system that some do not have."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tsae.runtime import locks, metadata

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

CONTEND = """
import os, random, signal, sys, time
from pathlib import Path
from tsae.runtime import locks, processes

path, turns, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
inside, chance = path.with_name("inside"), random.Random(seed)
while turns:
    try:
        with locks.hold(path, "test"):
            before = inside.read_text() if inside.exists() else ""
            assert not before or processes.started_at(int(before)) == "", f"{before} is inside, too"
            inside.write_text(str(os.getpid()))
            time.sleep(0.002 * chance.random())
            if chance.random() < 0.3:
                os.kill(os.getpid(), signal.SIGKILL)
            assert inside.read_text() == str(os.getpid())
            inside.unlink()
            turns -= 1
    except locks.LockHeld:
        time.sleep(0.002 * chance.random())
"""

ON_ANOTHER_HOST = """
import socket
socket.gethostname = lambda: "host-" + sys.argv[2]
locks.HEARTBEAT_SECONDS, locks.SILENT_SECONDS = 0.1, 1.0
"""

NO_SUCH = {
    "flock: not implemented": "import fcntl\ndef flock(*_): raise OSError(38, 'Function not implemented')\nfcntl.flock = flock",
    "flock: no locks": "import fcntl\ndef flock(*_): raise OSError(37, 'No locks available')\nfcntl.flock = flock",
    "flock: not supported": "import fcntl\ndef flock(*_): raise OSError(95, 'Operation not supported')\nfcntl.flock = flock",
    "flock: locks nothing": "import fcntl\nfcntl.flock = lambda *_: None",
    "hard links": "import os\ndef link(*_, **__): raise OSError(1, 'Operation not permitted')\nos.link = link",
}


@pytest.fixture(params=["", *NO_SUCH])
def environ(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """The environment of processes on a file system that lacks something; at first, on one that lacks nothing."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(NO_SUCH.get(request.param, ""))
    return os.environ | {"PYTHONPATH": str(site)}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where a lock may be taken."""
    return tmp_path / "runs" / "stage.lock"


def started(script: str, *arguments: object, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """A process that runs `script`, a Python program."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=env)


@pytest.fixture
def holder(place: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock."""
    with started(HOLD, place) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


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


def test_of_many_that_contend_and_die_one_at_a_time_is_inside_and_nothing_stays(
    place: Path, environ: dict[str, str]
) -> None:
    running = [started(CONTEND, place, 6, seed, env=environ) for seed in range(12)]
    for process in running:
        _, said = process.communicate(timeout=120)
        assert process.returncode in (0, -signal.SIGKILL), said
    assert {process.returncode for process in running} >= {-signal.SIGKILL}
    with locks.hold(place, "test"):
        assert {path.name for path in place.parent.iterdir()} <= {place.name, "inside"}
    assert {path.name for path in place.parent.iterdir()} <= {"inside"}


def test_a_killed_owner_is_noticed_at_once(place: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(locks.LockHeld, match=f"test: process {holder.pid} on "), locks.hold(place, "test"):
        pass
    holder.kill()
    holder.wait()
    with locks.hold(place, "test"):
        found = locks.owner(place)
        assert found is not None
        assert found.pid == os.getpid()


def test_only_what_ended_processes_left_is_cleared(place: Path, holder: subprocess.Popen[str]) -> None:
    own = place.with_name(f"own-{place.name}")
    with locks.hold(own, "test"):
        locks.clear(place.parent)
        assert {path.name for path in place.parent.iterdir()} == {place.name, own.name}
        holder.kill()
        holder.wait()
        locks.clear(place.parent, "own-")
        assert {path.name for path in place.parent.iterdir()} == {place.name, own.name}
        locks.clear(place.parent, place.name)
        assert [path.name for path in place.parent.iterdir()] == [own.name]


def test_the_draft_of_a_lock_is_cleared_too(place: Path) -> None:
    dying = "import os, signal\nos.link = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n" + HOLD
    with started(dying, place) as process:
        assert process.wait() == -signal.SIGKILL
    assert [path.suffix for path in place.parent.iterdir()] == [".tmp"]
    locks.clear(place.parent)
    assert not list(place.parent.iterdir())


@pytest.mark.parametrize("moment", ["os.link", "os.replace"])
def test_what_one_that_was_killed_while_taking_it_left_is_removed_by_the_next(
    place: Path, holder: subprocess.Popen[str], moment: str
) -> None:
    holder.kill()
    holder.wait()
    dying = f"import os, signal\n{moment} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n" + HOLD
    with started(dying, place) as second:
        assert second.wait() == -signal.SIGKILL
    assert len(list(place.parent.iterdir())) > 1
    with locks.hold(place, "test"):
        assert list(place.parent.iterdir()) == [place]


def test_a_silent_process_of_another_host_loses_its_lock_to_one_and_ends_when_it_comes_back(place: Path) -> None:
    script = HOLD.replace("with locks", ON_ANOTHER_HOST + "with locks")
    with started(script, place, "a") as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        time.sleep(1.5)  # longer than a silence that counts as death
        assert started(script, place, "b").communicate("")[0] == ""
        first.send_signal(signal.SIGSTOP)
        time.sleep(1.5)
        with started(script, place, "b") as second, started(script, place, "c") as third:
            said = [process.stdout.readline() for process in (second, third) if process.stdout]
            assert sorted(said) == ["", "held\n"]
            first.send_signal(signal.SIGCONT)
            assert first.wait() == 75
            assert first.stderr is not None
            assert "has taken the lock" in first.stderr.read()
            found = locks.owner(place)
            assert found is not None
            assert found.host in ("host-b", "host-c")
            for process in (second, third):
                process.communicate("")
    assert not place.exists()


def test_the_age_of_a_sign_of_life_is_that_of_the_file_system(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locks.hold(place.with_name("other.lock"), "test"):
        held = metadata.read(place.with_name("other.lock"), locks.OWNER)
        metadata.write(place, {**held, "host": "another-host"})
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert locks.owner(place) is not None
    past = place.stat().st_mtime - 2 * locks.SILENT_SECONDS
    os.utime(place, (past, past))
    assert locks.owner(place) is None


def test_a_lock_that_somebody_removed_comes_back(place: Path) -> None:
    with started(HOLD.replace("with locks", "locks.HEARTBEAT_SECONDS = 0.1\nwith locks"), place) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        place.unlink()
        while not place.exists():
            time.sleep(0.02)
        assert holder.communicate("") == ("", "")
    assert not place.exists()


def test_a_lock_that_is_not_whole_counts_while_it_is_young(place: Path) -> None:
    place.parent.mkdir()
    place.write_text('{"host')
    with pytest.raises(locks.LockHeld, match="somebody is already working on it"), locks.hold(place, "test"):
        pass
    past = place.stat().st_mtime - 2 * locks.SILENT_SECONDS
    os.utime(place, (past, past))
    with locks.hold(place, "test"):
        assert locks.owner(place) is not None


def test_folders_that_only_a_lock_needed_go_with_it(place: Path) -> None:
    with locks.hold(place.parent / "deeper" / "x.lock", "test"):
        (place.parent / "kept").touch()
    assert [path.name for path in place.parent.iterdir()] == ["kept"]
