"""`tsae compare`: which runs the words of the command line name, and by what settings each was measured."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tsae.checkpoint import RunFolder
from tsae.config import run as configuration
from tsae.config.run import RunConfig
from tsae.config.schema import flatten
from tsae.interop.settings import find_run, settings_of
from tsae.report.side_by_side import Entry
from tsae.runtime.environment import home
from tsae.runtime.errors import TsaeError
from tsae.sweep.commandline import load_folder
from tsae.sweep.plan import make_plan
from tsae.sweep.sweepfile import load_sweep


def entries_of(words: Sequence[str]) -> list[Entry]:
    """The runs behind names and folders of runs, of sweeps and their YAMLs, and folders that hold several runs.

    Raises TsaeError for a word that stands for none.
    """
    found: dict[Path, Entry] = {}
    for word in words:
        for entry in _entries(word):
            found.setdefault(entry.run.path.resolve(), entry)
    last = Counter(entry.name.rpartition("/")[2] for entry in found.values())
    # As short as they tell the runs apart.
    return [
        entry if last[name := entry.name.rpartition("/")[2]] > 1 else dataclasses.replace(entry, name=name)
        for entry in found.values()
    ]


def _entries(word: str) -> Iterator[Entry]:
    path, kept = Path(word), os.environ.get("TSAE_HOME")
    sweep = next((folder for folder in (path, home() / "sweeps" / word) if (folder / "attempts").is_dir()), None)
    if sweep is not None or (path.is_file() and path.suffix in (".yaml", ".yml")):
        plan = make_plan(load_folder(sweep) if sweep else load_sweep(path, None, [], None), to_look_at=True)
        entries = [Entry(f"{plan.name}/{point.name}", plan.run(point), point.config) for point in plan.points]
        if kept is None:
            os.environ.pop("TSAE_HOME", None)
        else:
            os.environ["TSAE_HOME"] = kept  # which a sweep's folder moves to where it lies
        yield from entries
        return
    for folder in (home() / "checkpoints" / word, path):
        several = sorted({place.parent for place in folder.glob("*/trainer_0/config.json")}) if folder.is_dir() else []
        if several and not (folder / "trainer_0").is_dir():
            yield from (_entry(f"{folder.name}/{run.parent.name}", RunFolder(run)) for run in several)
            return
    run = find_run(word, home() / "checkpoints")
    place = run.path.parent if run.path.name == "trainer_0" else run.path
    yield _entry(place.name, run)


def _entry(name: str, run: RunFolder) -> Entry:
    return Entry(name, run, _measured_by(run))


def _measured_by(run: RunFolder) -> RunConfig:
    """The settings by which `run` was measured last; of one that is not measured, those by which it would be."""
    measured = run.read_results().get("measured_with")
    if run.resolved.exists():
        given = {f"evaluation.{key}": value for key, value in flatten((measured or {}).get("evaluation", {}))}
        return settings_of(run, given, ("evaluation",))
    if measured is None:
        raise TsaeError(
            f"{run.path}: is not measured, or by an older version; name what it is measured on: tsae evaluate {run.path} "
            "store.path=… (the store of the runs that it is compared with)"
        )
    return configuration.from_mapping(measured, str(run.eval_results))
