"""What names a sweep on a command line, and the plan it stands for."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from tsae.runtime.environment import SWEEPS, home
from tsae.runtime.errors import TsaeError, suggestion

if TYPE_CHECKING:
    from tsae.sweep.plan import Plan
    from tsae.sweep.sweepfile import Sweep


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """What names a sweep on a command line."""
    parser.add_argument(
        "file",
        nargs="?",
        metavar="SWEEP",
        help="a sweep's YAML such as sweeps/split_fraction.yaml, the name of a shipped one, or a sweep's folder or its name below TSAE_HOME/sweeps",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="settings that differ from the base, such as sae.k=40",
    )
    parser.add_argument("--base", metavar="NAME|FILE", help="another base configuration than the sweep's own")
    parser.add_argument(
        "--name", help="name of the sweep's folders, instead of one made from sweep, base and overrides"
    )


def part_words(given: argparse.Namespace) -> None:
    """Tell an override that comes first, where no sweep is named, from a sweep."""
    if given.file is not None and re.match(r"[\w.]+=", given.file) and not Path(given.file).exists():
        given.file, given.overrides = None, [given.file, *given.overrides]


def sweep_of(given: argparse.Namespace) -> Sweep:
    """The sweep that is named by its YAML, by the name of a shipped one, or by its folder, also below TSAE_HOME/sweeps. Raises TsaeError."""
    part_words(given)
    if given.file is None:
        raise TsaeError("command line: SWEEP: the sweep's YAML is missing; for example sweeps/split_fraction.yaml")
    from tsae.sweep.sweepfile import load_sweep

    path, shipped = Path(given.file), {found.stem: found for found in SWEEPS.glob("*.yaml")}
    if not path.exists() and given.file not in shipped and (home() / "sweeps" / path / "attempts").is_dir():
        path = home() / "sweeps" / path
    if (path / "attempts").is_dir():
        changed = [*given.overrides, *(f"--{name}" for name in ("base", "name") if getattr(given, name))]
        if changed:
            raise TsaeError(
                f"{path}: a sweep's folder keeps its settings, and {changed[0]} would change them; "
                "give the sweep's YAML for a sweep with other ones"
            )
        return load_folder(path)
    if path.is_dir():
        raise TsaeError(f"{path}: a folder without attempts/; a sweep's YAML, or its folder below sweeps/, is expected")
    if not path.exists() and path.name == given.file and path.suffix not in (".yaml", ".yml"):
        if given.file not in shipped:
            own = [found.parent.name for found in (home() / "sweeps").glob("*/attempts")]
            near = suggestion(given.file, [*shipped, *own])
            raise TsaeError(f"{given.file}: no file, and no shipped sweep; {near}shipped: {', '.join(sorted(shipped))}")
        path = shipped[given.file]
    return load_sweep(path, given.base, given.overrides, given.name)


def load_folder(folder: Path) -> Sweep:
    """The sweep as the latest launch left it in its folder, whatever became of its YAML; TSAE_HOME is where that lies."""
    folder = folder.absolute()
    launches = sorted((folder / "attempts").glob("[0-9]*"))
    if not launches:
        raise TsaeError(f"{folder}: no launch of this sweep has started anything; give the sweep's YAML")
    os.environ["TSAE_HOME"] = str(folder.parents[1])
    return load_launch(launches[-1], folder.name)


def load_launch(launch: Path, name: str, overrides: list[str] | None = None) -> Sweep:
    """The sweep as one launch copied it, by default with that launch's overrides; paths mean what they meant to it."""
    from tsae.runtime import metadata
    from tsae.sweep.plan import BASE_FILE, LAUNCH, LAUNCH_FILE, SWEEP_FILE
    from tsae.sweep.sweepfile import load_sweep

    remedy = "give the sweep's YAML in place of its folder"
    record = metadata.present(launch / LAUNCH_FILE, LAUNCH, remedy)
    if overrides is None:
        overrides = record["overrides"] if record else _overrides_given(launch)
    # Of a launch from before they were recorded, all paths were relative to one folder.
    made = metadata.whole(launch / "provenance.json", {"working_directory?": str})
    where = made.get("working_directory", os.getcwd())
    folders = record.get("folders", dict.fromkeys(("sweep", "base", "overrides"), where))
    return load_sweep(launch / SWEEP_FILE, str(launch / BASE_FILE), overrides, name, folders)


def plan_of(given: argparse.Namespace, to_look_at: bool = False) -> Plan:
    """The plan of the sweep that is named, as `make_plan` makes it. Raises TsaeError."""
    from tsae.sweep.plan import make_plan

    return make_plan(sweep_of(given), to_look_at)


def words_of(given: argparse.Namespace) -> str:
    """What names the sweep on a command line."""
    options = [
        word for name in ("base", "name") if getattr(given, name) for word in (f"--{name}", getattr(given, name))
    ]
    return shlex.join([str(given.file), *given.overrides, *options])


def _overrides_given(launch: Path) -> list[str]:
    """The overrides of a launch from before they were recorded: they are in the command that provenance.json keeps."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_sweep_arguments(parser)
    from tsae.runtime import metadata

    made = metadata.read(launch / "provenance.json", {"command": [str]}, "give the sweep's YAML in place of its folder")
    command = made["command"][1:]
    given, rest = parser.parse_known_args(command)
    return [*given.overrides, *(word for word in rest if "=" in word and not word.startswith("-"))]
