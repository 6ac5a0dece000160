"""The commands `tsae sweep`, `status`, `report`, `claims`, `cancel` and `runs`: what names a sweep, and its plan."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tsae.runtime import environment
from tsae.runtime.environment import SWEEPS
from tsae.runtime.errors import TsaeError, suggestion
from tsae.sweep.schedulers import SCHEDULERS

if TYPE_CHECKING:
    from tsae.sweep.plan import Plan
    from tsae.sweep.sweepfile import Sweep

AddCommand = Callable[[str, Callable[[argparse.Namespace], int | None], str], argparse.ArgumentParser]


def add_commands(add: AddCommand) -> None:
    """The commands that take a sweep. Heavy imports wait until one of them runs."""
    sweep = add("sweep", _sweep, "run what is missing of a sweep, and report it")
    _add_sweep_arguments(sweep)
    bases = ", ".join(sorted(path.stem for path in (SWEEPS / "bases").glob("*.yaml")))
    sweep.epilog = (
        f"bases: {bases}. Everything lands under TSAE_HOME (default ./runs). "
        "Running the same command again continues and does only what is missing."
    )
    sweep.add_argument(
        "--executor",
        choices=("auto", *SCHEDULERS, "local", "debug"),
        default="auto",
        help=f"{', '.join(SCHEDULERS)}: submit and return; local: processes of this machine; debug: inside this process; "
        "auto: the first scheduler that answers, else local",
    )
    sweep.add_argument(
        "--cluster", type=Path, metavar="FILE", help="a site's defaults, instead of ~/.config/tsae/cluster.yaml"
    )
    sweep.add_argument(
        "--container", metavar="IMAGE", help="run every job in tsae.sif, docker://owner/image or docker:image"
    )
    sweep.add_argument("--retry-failed", action="store_true", help="try again what failed; else it is only named")
    sweep.add_argument("--detach", action="store_true", help="local: return once the queue runs, do not follow it")
    sweep.add_argument("--cancel", action="store_true", help="end what runs or waits of this sweep, and nothing else")
    sweep.add_argument("--dry-run", action="store_true", help="show points, stages and job scripts, start nothing")
    sweep.add_argument("--settings", action="store_true", help="print every setting with its meaning")

    status = add("status", _status, "how a sweep is doing")
    _add_sweep_arguments(status)
    status.add_argument("--watch", action="store_true", help="draw anew every few seconds until nothing runs or waits")
    status.add_argument("--logs", metavar="POINT", help="the end of each log of one point")
    status.add_argument("--all", action="store_true", help="every point, however many there are")

    _add_sweep_arguments(add("report", _report, "write the tables, figures and page of a sweep, whatever is there"))
    _add_sweep_arguments(add("claims", _claims, "judge the paper's claims on a sweep over kinds and seeds"))
    _add_sweep_arguments(add("cancel", _cancel, "end what runs or waits of a sweep, and nothing else"))

    runs = add("runs", _runs, "list the runs and sweeps under TSAE_HOME")
    runs.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="another folder than TSAE_HOME")


def _add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        nargs="?",
        metavar="SWEEP",
        help="a sweep's YAML such as sweeps/split_fraction.yaml, the name of a shipped one, or a sweep's folder",
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


def sweep_of(given: argparse.Namespace) -> Sweep:
    """The sweep that is named by its YAML, by the name of a shipped one, or by its folder. Raises TsaeError."""
    if given.file is None:
        raise TsaeError("command line: SWEEP: the sweep's YAML is missing; for example sweeps/split_fraction.yaml")
    from tsae.sweep.sweepfile import load_sweep

    path = Path(given.file)
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
    if not path.exists() and path.name == given.file and not path.suffix:
        shipped = sorted(found.stem for found in SWEEPS.glob("*.yaml"))
        if given.file not in shipped:
            near = suggestion(given.file, shipped)
            raise TsaeError(f"{given.file}: no file, and no shipped sweep; {near}shipped: {', '.join(shipped)}")
        path = SWEEPS / f"{given.file}.yaml"
    return load_sweep(path, given.base, given.overrides, given.name)


def load_folder(folder: Path) -> Sweep:
    """The sweep as the latest launch left it in its folder, whatever became of its YAML; TSAE_HOME is where that lies."""
    from tsae.runtime import files
    from tsae.sweep.plan import BASE_FILE, LAUNCH_FILE, SWEEP_FILE
    from tsae.sweep.sweepfile import load_sweep

    folder = folder.absolute()
    launches = sorted((folder / "attempts").glob("[0-9]*"))
    if not launches:
        raise TsaeError(f"{folder}: no launch of this sweep has started anything; give the sweep's YAML")
    os.environ["TSAE_HOME"] = str(folder.parents[1])
    newest = launches[-1]
    record = newest / LAUNCH_FILE
    overrides = files.read_whole_json(record)["overrides"] if record.exists() else _overrides_given(newest)
    return load_sweep(newest / SWEEP_FILE, str(newest / BASE_FILE), overrides, folder.name)


def plan_of(given: argparse.Namespace) -> Plan:
    """The plan of the sweep that is named. Raises TsaeError."""
    from tsae.sweep.plan import make_plan

    return make_plan(sweep_of(given))


def words_of(given: argparse.Namespace) -> str:
    """What names the sweep on a command line."""
    options = [
        word for name in ("base", "name") if getattr(given, name) for word in (f"--{name}", getattr(given, name))
    ]
    return shlex.join([str(given.file), *given.overrides, *options])


def _overrides_given(launch: Path) -> list[str]:
    """The overrides of a launch from before they were recorded: they are in the command that provenance.json keeps."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    _add_sweep_arguments(parser)
    command = json.loads((launch / "provenance.json").read_text())["command"][1:]
    given, rest = parser.parse_known_args(command)
    return [*given.overrides, *(word for word in rest if "=" in word and not word.startswith("-"))]


def _sweep(given: argparse.Namespace) -> int:
    from tsae.sweep import command

    return command.sweep(given)


def _cancel(given: argparse.Namespace) -> int:
    from tsae.sweep import command

    return command.cancel_sweep(given)


def _status(given: argparse.Namespace) -> None:
    from tsae.sweep import status

    status.show(plan_of(given), logs=given.logs, watch=given.watch, everything=given.all)


def _report(given: argparse.Namespace) -> None:
    from tsae.sweep import command

    command.report(plan_of(given))


def _claims(given: argparse.Namespace) -> None:
    from tsae.sweep import command

    command.claims(plan_of(given))


def _runs(given: argparse.Namespace) -> None:
    from tsae.sweep.runs import listing

    print("\n".join(listing(given.folder or environment.home())))
