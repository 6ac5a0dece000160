"""A sweep's YAML: typed, checked, and laid over its base."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from tsae.config import run as configuration
from tsae.config import schema
from tsae.config.bounds import Count
from tsae.config.paths import Place, located
from tsae.config.points import file_name, shown
from tsae.config.sections import DataConfig
from tsae.report.compared import ReportConfig
from tsae.runtime.environment import SWEEPS
from tsae.runtime.errors import TsaeError, suggestion
from tsae.sweep.resources import SweepResources

StageKind = Literal[
    "harvest", "train", "evaluate", "probe", "tsne", "sequences", "align", "steer", "explain", "features", "report"
]
BASES = SWEEPS / "bases"


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A sweep: the product of `grid`, `zip`, `list` and `random` over a base configuration."""

    name: str | None = None
    """Name of the sweep; by default the name of its file."""
    base: str = "embedded"
    """Name of a file in sweeps/bases, or a path to a run's YAML."""
    grid: dict[str, Any] = field(default_factory=dict)
    """Key path: list of values. Every combination is a point."""
    zip: dict[str, Any] = field(default_factory=dict)
    """Key path: list of values, all of one length, which vary together."""
    list: tuple[dict[str, Any], ...] = ()
    """Explicit points: one mapping of key path to value for each."""
    random: dict[str, Any] = field(default_factory=dict)
    """`n` points, drawn by `seed`; every other key is a key path with a list to choose from, or `uniform`, `log_uniform` or `integers` with its bounds."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Settings that differ from the base in every point."""
    stages: tuple[StageKind, ...] = ("harvest", "train", "evaluate", "report")
    """What to do; experiments of the paper may be among it."""
    resources: SweepResources = field(default_factory=SweepResources)
    """What the jobs of each stage may use."""
    max_parallel: Count | None = None
    """Jobs that run at the same time, at most: of this sweep on one machine, of each of its arrays on Slurm."""
    container: str | None = None
    """Image that the jobs run in, as for --container."""
    report: ReportConfig = field(default_factory=ReportConfig)
    """Axes of the report."""


@dataclass(frozen=True)
class Sweep:
    """A sweep's file together with what the command line made of it."""

    path: Path
    config: SweepConfig
    base: dict[str, Any]
    """The base, as a tree of a RunConfig."""
    asked: dict[str, Any]
    """Key path → value, of the overrides in the file and on the command line."""
    folder_name: str
    """Names its folders under TSAE_HOME: the sweep, its base and the overrides that change results."""
    base_path: Path
    overrides: tuple[str, ...]
    """As they were given on the command line."""
    folders: Mapping[str, str]
    """What relative paths mean in the sweep, in the base and in the overrides."""

    @property
    def settings(self) -> dict[str, Any]:
        """Base and overrides as one tree of a RunConfig, without the swept values."""
        return self.settings_with({})

    def settings_with(self, swept: Mapping[str, Any]) -> dict[str, Any]:
        """The tree of a point: key paths with their values, laid over the base together with the overrides."""
        return configuration.lay_over(copy.deepcopy(self.base), {**self.asked, **swept})


def load_sweep(
    path: str | Path,
    base: str | None = None,
    overrides: list[str] | None = None,
    name: str | None = None,
    folders: Mapping[str, str] | None = None,
) -> Sweep:
    """The sweep in `path` on `base` (else its own) with `section.key=value` overrides.

    What relative paths mean in the copies that a launch made, `folders` says: see `Sweep.folders`.
    """
    path, given = Path(path), folders or {}
    folder = Path(given.get("sweep", path.absolute().parent))
    tree = schema.read_yaml(path)
    config = _located(schema.build(SweepConfig, tree, str(path)), folder)
    if not config.stages or set(config.stages) <= {"report"}:
        raise TsaeError(f"{path}: stages: nothing to run; allowed: {', '.join(get_args(StageKind))}")
    if config.resources.chain and config.resources.train.processes > 1:
        raise TsaeError(
            f"{path}: resources.chain: true is impossible where train asks for {config.resources.train.processes} processes; "
            "experiments are made by one"
        )
    # An empty name, as of a shell's variable that is not set, is not the lack of one.
    asked, where = (config.base, f"{path}: base") if base is None else (base, "--base")
    base_path = find_base(asked, path, where)
    base_folder = Path(given.get("base", base_path.absolute().parent))
    settings = configuration.read(base_path, base_folder)
    configuration.from_mapping(settings, str(base_path))
    own = dict(schema.flatten(config.overrides))
    configuration.check_part(own, f"{path}: overrides")
    command_folder = Path(given.get("overrides", Path.cwd()))
    extra = configuration.parse_overrides(overrides or [], command_folder)
    configuration.check_part(extra, "command line")
    _refuse_swept(config, extra, path)
    # Of a sweep that has been launched the folder's name is given.
    value, given_by = (config.name, f"{path}: name") if name is None else (name, "--name")
    if value is not None and (not value.strip(" ./") or "/" in value):
        raise TsaeError(f"{given_by} {value!r}: a folder name below TSAE_HOME/sweeps is expected, without '/'")
    names = file_name(name or "-".join([config.name or path.stem, base_path.stem]) + _override_suffix(extra))
    places = {"sweep": str(folder), "base": str(base_folder), "overrides": str(command_folder)}
    return Sweep(path, config, settings, {**own, **extra}, names, base_path, tuple(overrides or ()), places)


def _located(config: SweepConfig, folder: Path) -> SweepConfig:
    """`config` with the paths of its settings, axes and container absolute; relative ones mean `folder`."""

    def absolute(settings: Mapping[str, Any]) -> dict[str, Any]:
        return configuration.locate(dict(schema.flatten(settings)), folder)

    return dataclasses.replace(
        config,
        grid=absolute(config.grid),
        zip=absolute(config.zip),
        list=tuple(map(absolute, config.list)),
        random=absolute(config.random),
        overrides=absolute(config.overrides),
        container=located(config.container, folder, Place()),
    )


def find_base(name: str, sweep: Path, where: str) -> Path:
    """The YAML of base `name`: a path (beside the sweep that names it, or from here), or a name in sweeps/bases."""
    near = [sweep.parent / name, Path(name)]
    if where.startswith("--"):  # of the command line
        near.reverse()
    candidates = [*near, sweep.parent / "bases" / f"{name}.yaml", BASES / f"{name}.yaml"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = sorted(path.stem for path in BASES.glob("*.yaml"))
    raise TsaeError(
        f"{where}: there is no base '{name}'; {suggestion(name, known)}allowed: {', '.join(known)}, or a YAML file"
    )


def _refuse_swept(config: SweepConfig, extra: Mapping[str, Any], path: Path) -> None:
    swept = {key for part in (config.grid, config.zip, config.random, *config.list) for key, _ in schema.flatten(part)}
    for key in extra:
        if key in swept:
            raise TsaeError(f"command line: {key}: {path} sweeps it; edit the sweep's values there instead")


def _override_suffix(extra: Mapping[str, Any]) -> str:
    """Names the overrides that change results, so that they get folders of their own."""
    runs = (configuration.RunConfig(data=DataConfig(source=source)) for source in ("embedded", "synthetic"))
    counted = {key for run in runs for key, _ in schema.flatten(configuration.evaluation_settings(run))}
    parts = [f"{key}={shown(value)}" for key, value in extra.items() if key in counted or key in configuration.PRESETS]
    return "".join(f",{part}" for part in parts)
