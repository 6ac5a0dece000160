"""What names a sweep on the command lines of this folder, and the plan it stands for."""

from __future__ import annotations

import argparse
from pathlib import Path

from tsae.runtime import environment
from tsae.runtime.errors import TsaeError
from tsae.sweep.plan import Plan, make_plan
from tsae.sweep.sweepfile import Sweep, load_sweep


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """What names a sweep on a command line."""
    parser.add_argument(
        "file", nargs="?", type=Path, metavar="FILE", help="the sweep's YAML, such as sweeps/split_fraction.yaml"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that differ from the base, such as sae.k=40"
    )
    parser.add_argument("--base", metavar="NAME|FILE", help="another base configuration than the sweep's own")
    parser.add_argument(
        "--name", help="name of the sweep's folders, instead of one made from sweep, base and overrides"
    )


def sweep_of(given: argparse.Namespace) -> Sweep:
    """The sweep that is named. Raises TsaeError, for a missing FILE among others."""
    environment.load_dotenv()
    if given.file is None:
        raise TsaeError("command line: FILE: the sweep's YAML is missing; for example sweeps/split_fraction.yaml")
    return load_sweep(given.file, given.base, given.overrides, given.name)


def plan_of(given: argparse.Namespace) -> Plan:
    """The plan of the sweep that is named. Raises TsaeError."""
    return make_plan(sweep_of(given))
