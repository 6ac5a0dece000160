"""From a sweep to the stages that make its points; nothing here writes or starts anything.

sweep file ─► points (one validated run each) ─► stages (harvest → train → evaluate), identical ones merged
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from packing import pack
from points import Point, expand
from stage import Stage
from sweepfile import Sweep, file_name

from tsae import config as configuration
from tsae import environment, files, schema, stages
from tsae.checkpoint import RunFolder
from tsae.errors import TsaeError


@dataclass(frozen=True)
class Plan:
    """All points and stages of a sweep, and the folders that belong to it."""

    sweep: Sweep
    points: tuple[Point, ...]
    stages: tuple[Stage, ...]
    """In an order in which they can run."""

    @property
    def name(self) -> str:
        """Sweep, base and overrides in one word."""
        return self.sweep.folder_name

    @property
    def folder(self) -> Path:
        """Where the sweep keeps its configurations, logs and report."""
        return sweep_folder(self.sweep)

    def run(self, point: Point) -> RunFolder:
        """Where `point` is trained and measured."""
        return RunFolder.of(checkpoints_path(self.sweep), point.name)

    def unfinished(self) -> list[Stage]:
        """Stages to run: not done, and asked for by the user or by a stage that has to run itself."""
        needed: list[Stage] = []
        for stage in reversed(self.stages):
            wanted = stage.kind == last_kind(self.sweep) or any(stage.key in later.depends_on for later in needed)
            if wanted and not stage.is_done():
                needed.append(stage)
        return needed[::-1]

    def write_configs(self) -> None:
        """Write the sweep and the resolved configuration of each point, which the jobs read."""
        files.write_text(self.folder / "sweep.yaml", self.sweep.path.read_text(encoding="utf-8"))
        for point in self.points:
            text = yaml.safe_dump(schema.to_plain(point.config), sort_keys=False)
            files.write_text(config_path(self.sweep, point), text)


def make_plan(sweep: Sweep) -> Plan:
    """Points and stages of `sweep`. Raises TsaeError for every setting that cannot work, before anything starts."""
    points = expand(sweep)
    table: dict[str, Stage] = {}
    harvests: dict[str, Stage] = {}
    for point in points:
        _refuse_impossible(sweep, point)
        # The name of a store takes a look at the text's sources; once for each distinct store is enough.
        source = schema.stable_hash(configuration.store_settings(point.config))
        harvest = harvests.get(source) or harvests.setdefault(source, _harvest_stage(sweep, point))
        for stage in _stages_of(sweep, point, harvest):
            known = table.setdefault(stage.key, stage)
            if known is not stage:
                table[stage.key] = dataclasses.replace(known, points=(*known.points, point.name))
    order = ("harvest", "train", "evaluate")
    ordered = sorted(table.values(), key=lambda stage: order.index(stage.kind))
    return Plan(sweep, points, tuple(pack(points, ordered)))


def sweep_folder(sweep: Sweep) -> Path:
    """TSAE_HOME/sweeps/<name>."""
    return environment.home() / "sweeps" / sweep.folder_name


def checkpoints_path(sweep: Sweep) -> Path:
    """TSAE_HOME/checkpoints/<name>: what `--checkpoints_path` of the experiments expects."""
    return environment.home() / "checkpoints" / sweep.folder_name


def config_path(sweep: Sweep, point: Point) -> Path:
    """The resolved configuration of one point."""
    return sweep_folder(sweep) / "points" / f"{point.name}.yaml"


def last_kind(sweep: Sweep) -> str:
    """The stage whose output the user asked for."""
    return max((kind for kind in sweep.config.stages if kind != "report"), key=("harvest", "train", "evaluate").index)


def _refuse_impossible(sweep: Sweep, point: Point) -> None:
    """Refuse what only the model or the disk can tell: a layer that is not there, a folder of another run."""
    from tsae.lm.source import check_layer

    check_layer(point.config.model, f"{sweep.path}: {point.name}")
    run = RunFolder.of(checkpoints_path(sweep), point.name)
    if not run.resolved.exists():
        return
    found = schema.read_yaml(run.resolved)
    wanted = configuration.training_settings(point.config)
    if found.pop("training_hash", None) == schema.stable_hash(wanted):
        return
    here = configuration.training_settings(configuration.from_mapping(found, str(run.resolved)))
    raise TsaeError(
        f"{run.path}: holds a run of another configuration ({_first_difference(here, wanted)}); "
        "give this sweep another name with --name, or remove the folder"
    )


def _first_difference(there: dict[str, Any], here: dict[str, Any]) -> str:
    for section, values in here.items():
        for key, value in values.items():
            if there.get(section, {}).get(key) != value:
                return f"{section}.{key} is {there.get(section, {}).get(key)} there, {value} here"
    return "made by another version of tsae"


def _stages_of(sweep: Sweep, point: Point, harvest: Stage) -> list[Stage]:
    """The chain of one point; what the sweep does not list is left out and must be done already."""
    config, run = point.config, RunFolder.of(checkpoints_path(sweep), point.name)
    training = configuration.training_settings(config)
    train = _run_stage(sweep, point, "train", training, (harvest.key,), lambda: run.is_trained(config))
    measuring = configuration.evaluation_settings(config)
    inputs = (harvest.key, train.key)
    evaluate = _run_stage(sweep, point, "evaluate", measuring, inputs, lambda: run.is_evaluated(config))
    chain = (dataclasses.replace(harvest, points=(point.name,)), train, evaluate)
    return [stage for stage in chain if stage.kind in sweep.config.stages]


def _harvest_stage(sweep: Sweep, point: Point) -> Stage:
    config = point.config
    store = stages.store_path(config)
    return Stage(
        kind="harvest",
        key=schema.stable_hash(["harvest", str(store)]),
        subject=store.name,
        function=stages.harvest_stage,
        arguments=(str(config_path(sweep, point)), 0, 1),
        points=(point.name,),
        depends_on=(),
        progress=stages.harvest_progress(store),
        lock=stages.harvest_lock(store),
        logs=sweep_folder(sweep) / "logs" / file_name(f"harvest-{store.name}"),
        resources=sweep.config.resources.harvest,
        on_gpu=config.model.device != "cpu",
        is_done=lambda: stages.is_harvested(config),
    )


def _run_stage(
    sweep: Sweep,
    point: Point,
    kind: str,
    settings: dict[str, Any],
    depends_on: tuple[str, ...],
    is_done: Callable[[], bool],
) -> Stage:
    run = RunFolder.of(checkpoints_path(sweep), point.name)
    return Stage(
        kind=kind,
        key=schema.stable_hash([kind, str(run.path), settings]),
        subject=point.name,
        function={"train": stages.train_stage, "evaluate": stages.evaluate_stage}[kind],
        arguments=(str(config_path(sweep, point)), str(checkpoints_path(sweep)), point.name),
        points=(point.name,),
        depends_on=depends_on,
        progress=run.progress,
        lock=stages.run_lock(run, kind),
        logs=sweep_folder(sweep) / "logs" / file_name(f"{kind}-{point.name}"),
        resources=getattr(sweep.config.resources, kind),
        on_gpu=point.config.training.device != "cpu",
        is_done=is_done,
    )
