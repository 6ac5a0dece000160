"""The same commands where something is missing, full, shared or oddly named: the same bytes, or one line."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import pytest

from tests.system.chaos import places
from tests.system.chaos.commands import COMMANDS, EXPERIMENTS, Command
from tests.system.chaos.conftest import Line, contents, different
from tests.system.chaos.test_chaos import SEED, SIGNALS

BLOCK = 4096
"""What a file takes at least, of a tmpfs."""


@pytest.mark.parametrize("place", [places.in_a_container, places.on_a_bare_machine], ids=lambda place: place.__name__)
def test_every_command_leaves_the_same_bytes(line: Line, may: Callable[..., None], place: Callable[..., None]) -> None:
    may(place)
    for name, command in COMMANDS.items():
        line.back_to(command.after)
        shared(line.folder)
        assert line.run(command, place=place) == [0] * command.processes, (name, line.said())
        assert different(line.left_by(name), contents(line.folder)) == [], name


def test_users_of_a_group_work_in_one_folder(line: Line, may: Callable[..., None]) -> None:
    users = [partial(places.as_user, user) for user in places.USERS]
    may(users[0])
    line.back_to("nothing")
    shared(line.folder)
    chain = {
        name: command for name, command in COMMANDS.items() if command.processes == 1 and name != "train on a window"
    }
    for (name, command), user in zip(chain.items(), itertools.cycle(users), strict=False):
        assert line.run(command, place=user) == [0], (name, line.said())
    assert {path.stat().st_gid for path in line.folder.rglob("*")} == {places.GROUP}
    # A sweep's copy of the code has the modes of what it is a copy of.
    others = [path for path in line.folder.rglob("*") if "code" not in path.parts]
    assert [path for path in others if not path.stat().st_mode & 0o020] == []
    # Each has written what the other's command needs, and both the same run.
    assert {path.stat().st_uid for path in (line.folder / "home/checkpoints/one").rglob("*.json")} == set(places.USERS)


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if command.processes == 1])
def test_a_full_disk_is_one_line_and_the_next_attempt_ends_with_the_same_bytes(
    line: Line, disk: Callable[..., None], name: str
) -> None:
    command, draw, expected = COMMANDS[name], random.Random(f"{SEED} {name}"), line.left_by(name)
    print(f"TSAE_CHAOS_SEED={SEED}")
    line.back_to(command.after)
    before = contents(line.folder)
    need = sum(-(-len(expected[path]) // BLOCK) * BLOCK for path in expected if before.get(path) != expected[path])
    line.folder.rename(line.folder.with_name("unmounted"))
    line.folder.mkdir()
    limits: list[dict[str, int]] = [{"bytes": 0}, {"bytes": draw.randrange(0, max(need, BLOCK), BLOCK)}]
    limits.append({"inodes": draw.randrange(20)})
    for limit in draw.sample(limits, min(len(limits), -(-SIGNALS // 100))):
        disk(line, **limit)
        (code,) = line.run(command)
        assert code in ((0, 2) if name != "sweep" else (0, 1, 2)), (limit, line.said())
        assert "Traceback" not in line.said(), limit
        if code:
            assert re.search("No space left on device|are needed, .* free", line.said()), (limit, line.said())
            disk(line)
            assert line.run(command) == [0], (limit, line.said())
        assert different(expected, contents(line.folder)) == [], limit


@pytest.fixture
def disk(line: Line, may: Callable[..., None]) -> Iterator[Callable[..., None]]:
    """`disk(line, bytes=N)` has the folder on a file system with so much room, or `inodes`; with neither it then has enough."""
    may(places.where_one_may_mount)

    def limit(line: Line, **least: int) -> None:
        if not least:
            subprocess.run(["mount", "-o", "remount,size=1g,nr_inodes=100k", line.folder], check=True)
            return
        if os.path.ismount(line.folder):
            subprocess.run(["umount", line.folder], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g,nr_inodes=100k", "tmpfs", line.folder], check=True)
        shutil.copytree(line.folder.with_name("unmounted"), line.folder, dirs_exist_ok=True)
        taken = os.statvfs(line.folder)
        size = (taken.f_blocks - taken.f_bfree) * taken.f_bsize + least.get("bytes", 2**30)
        files = taken.f_files - taken.f_ffree + least.get("inodes", 100_000)
        subprocess.run(["mount", "-o", f"remount,size={size},nr_inodes={files}", line.folder], check=True)

    yield limit
    if os.path.ismount(line.folder):
        subprocess.run(["umount", line.folder], check=True)
    if line.folder.with_name("unmounted").exists():
        line.folder.rmdir()
        line.folder.with_name("unmounted").rename(line.folder)


def test_spaces_other_alphabets_and_a_home_behind_a_link_change_no_number(line: Line) -> None:
    odd = Line(line.folder.parent / 'a "place" & 模型 ñ\'ä#%41')
    shutil.copytree(line.folder.parent / "kept" / "nothing", odd.folder)
    (odd.folder.parent / "elsewhere").mkdir()
    (odd.folder / "home").symlink_to(odd.folder.parent / "elsewhere", target_is_directory=True)
    for name, command in COMMANDS.items():
        if command.after != "nothing" or name in ("harvest", "sweep"):
            assert odd.run(command) == [0] * command.processes, (name, odd.said())
    expected: dict[str, bytes] = {}
    for name in (*EXPERIMENTS, "report"):
        expected |= line.left_by(name)
    (odd.folder / "home").unlink()
    (odd.folder.parent / "elsewhere").rename(odd.folder / "home")
    found = contents(odd.folder)
    results = [name for name in expected if name.startswith("home/checkpoints/") and name.endswith((".json", ".pt"))]
    assert len(results) > 30
    assert [name for name in results if results_of(found[name]) != results_of(expected[name])] == []


def results_of(content: bytes) -> Any:
    """The numbers of a JSON file; other bytes as they are."""
    return numbers(json.loads(content)) if content.startswith(b"{") else content


def numbers(value: Any) -> Any:
    """A JSON value with the numbers alone."""
    if isinstance(value, dict):
        return {key: numbers(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [numbers(entry) for entry in value]
    return value if isinstance(value, Real) else None


def shared(folder: Path) -> None:
    """Let the group write, and own, everything in a folder, and what is made there later."""
    for path in (folder, *folder.rglob("*")):
        os.chown(path, -1, places.GROUP)
        os.chmod(path, 0o2775 if path.is_dir() else 0o664)


@pytest.fixture
def may(line: Line, require: Callable[[str, bool, str], None]) -> Callable[..., None]:
    """Skip a test whose place cannot be made here: by another user than root, or in a container that may not mount."""

    def check(place: Callable[[Path], None]) -> None:
        for folder in (line.folder, *line.folder.parents):
            if folder.is_relative_to("/tmp") and folder != Path("/tmp"):
                folder.chmod(0o755)
        able = os.getuid() == 0 and line.run(Command(["--version"], "nothing"), place=place) == [0]
        require("hostile places", able, "a root that may mount")

    return check
