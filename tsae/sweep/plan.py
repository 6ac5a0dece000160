"""From a sweep to the stages that make its points; nothing here writes or starts anything.

sweep file ─► points (one validated run each) ─► stages (harvest → train → evaluate, experiments → report), identical
ones merged
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml

from tsae import stages
from tsae.checkpoint import RunFolder
from tsae.config import run as configuration
from tsae.config import schema
from tsae.config.points import Point
from tsae.config.schema import flatten
from tsae.experiments.registry import EXPERIMENTS, require_possible
from tsae.report.compared import Compared
from tsae.runtime import metadata
from tsae.runtime.errors import TsaeError
from tsae.sweep.chain import Chain, chained, merge
from tsae.sweep.points import expand, require_baseline
from tsae.sweep.stage import KINDS, Stage
from tsae.sweep.sweepfile import Sweep

SWEEP_FILE, BASE_FILE, LAUNCH_FILE = "sweep.yaml", "base.yaml", "launch.json"
"""A launch's copies of the sweep and of its base, and what its command line added."""
LAUNCH = {"overrides": [str], "folders?": {"sweep": str, "base": str, "overrides": str}}
FEEDING = ("harvest", "train")
"""Stages that are there for what follows them; they run on their own account only if nothing follows."""


@dataclass(frozen=True)
class Plan:
    """All points and stages of a sweep, and the folders that belong to it."""

    sweep: Sweep
    points: tuple[Point, ...]
    stages: tuple[Stage, ...]
    """All but the report, in an order in which they can run."""
    damaged: Mapping[str, str] = field(default_factory=dict)
    """Point → why its run's folder cannot be read, where that was to be put up with."""

    @property
    def name(self) -> str:
        """Sweep, base and overrides in one word."""
        return self.sweep.folder_name

    @cached_property
    def _chain(self) -> Chain:
        return Chain(self.sweep)

    @property
    def folder(self) -> Path:
        """Where the sweep keeps its launches, records and report."""
        return self._chain.folder

    def run(self, point: Point) -> RunFolder:
        """Where `point` is trained and measured."""
        return self._chain.run(point)

    def unfinished(self) -> list[Stage]:
        """Stages to run: not done, and asked for by the user or by a stage that has to run itself."""
        listed = {stage.kind for each in self.stages for stage in each.apart}
        asked = listed - set(FEEDING) or {max(listed, key=KINDS.index)}
        needed: list[Stage] = []
        wanted: set[str] = set()
        for stage in reversed(self.stages):
            is_asked = any(one.kind in asked for one in stage.apart)
            if (is_asked or stage.key in wanted) and not stage.is_done():
                needed.append(stage)
                wanted.update(stage.depends_on)
        return needed[::-1]

    def changes(self) -> dict[str, str]:
        """Point → in words, what of its data has changed since its run was trained or begun; of all where anything has."""
        found = {point.name: stages.changed_since(point.config, self.run(point)) for point in self._readable()}
        return {name: what for name, what in found.items() if what}

    def _readable(self) -> list[Point]:
        return [point for point in self.points if point.name not in self.damaged]

    def decide_on_data(self, accept: bool) -> None:
        """Refuse runs whose data have changed since, or have those that are trained measured on what is there now."""
        changed = self.changes()
        if accept:
            for point in self.points:
                if point.name in changed:
                    stages.accept_new_data(point.config, self.run(point))
        elif changed:
            name, what = next(iter(changed.items()))
            more = f", and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise TsaeError(
                f"{self.name}: {name}{more}: trained on other data: {what}; give this sweep another name with --name, "
                "or measure the trained runs on what is there now with --accept-new-data"
            )

    def inexact(self) -> Plan:
        """The same, with trainings that go on from states of other versions of torch and tsae, too."""
        told = [
            dataclasses.replace(stage, arguments=(*stage.arguments, True)) if stage.kind == "train" else stage
            for stage in self.stages
        ]
        return dataclasses.replace(self, stages=tuple(told))

    def report(self) -> Stage | None:
        """The stage that writes the report, if the sweep lists it."""
        if "report" not in self.sweep.config.stages:
            return None
        return self._chain.report(self.points, list(self.stages), lambda: self.compared.is_current())

    def submit(self, *arguments: Any) -> Stage:
        """The stage that submits what finds no room now."""
        return self._chain.submit(arguments)

    @cached_property
    def compared(self) -> Compared:
        """What the report is made from."""
        sweep = self.sweep
        random = {key: value for key, value in sweep.config.random.items() if key not in ("n", "seed")}
        drawn = {path if path in self.points[0].axes else path.rpartition(".")[0] for path, _ in flatten(random)}
        return Compared(
            name=self.name,
            points=self.points,
            runs=tuple(map(self.run, self.points)),
            folder=self.folder / "report",
            settings=sweep.config.report,
            origin=sweep.path,
            base=sweep.base_path,
            common=sweep.settings,
            drawn=tuple(sorted(drawn)),
            command=shlex.join(["tsae", "sweep", str(self.folder)]),
            evaluated="evaluate" in sweep.config.stages,
        )

    def sources(self) -> dict[str, str]:
        """The files from which this can be planned again, by name: the sweep, the base below it, the overrides above it."""
        found = {SWEEP_FILE: self.sweep.path, BASE_FILE: self.sweep.base_path}
        texts = {name: path.read_text(encoding="utf-8") for name, path in found.items()}
        launch = {"overrides": self.sweep.overrides, "folders": self.sweep.folders}
        return {**texts, LAUNCH_FILE: metadata.text_of(launch)}

    def config_texts(self, stages: list[Stage]) -> dict[str, str]:
        """The resolved configuration of each point that `stages` read, as YAML."""
        every = [one.config for stage in stages for one in stage.apart]
        named = [[config] if isinstance(config, str) else config or [] for config in every]
        wanted = {name for names in named for name in names}
        return {point.name: _as_yaml(point.config) for point in self.points if point.name in wanted}


def make_plan(sweep: Sweep, to_look_at: bool = False) -> Plan:
    """Points and stages of `sweep`. Raises TsaeError for every setting that cannot work, before anything starts.

    In a plan that is only `to_look_at` a run's folder that cannot be read is named as damaged.
    """
    points, chain = list(expand(sweep)), Chain(sweep)
    if not to_look_at:  # what was launched before this was refused can be looked at still
        require_baseline(sweep, points)
        _refuse_impossible(sweep, points)
    table: dict[str, Stage] = {}
    needed_by: dict[str, list[str]] = {}
    harvests: dict[str, list[Stage]] = {}
    checked: set[str] = set()
    damaged: dict[str, str] = {}
    begun_before = False
    for number, point in enumerate(points):
        try:
            points[number] = dataclasses.replace(point, config=chain.run(point).as_begun(point.config))
        except TsaeError:
            continue  # it is met again below
        begun_before |= points[number].config is not point.config
    for number, point in enumerate(points):
        _check_model(chain, point, checked)
        try:
            if begun_before and chain.run(point).training_hash() is None:
                # Points of one sweep mean the same, whichever version began the first of them.
                config = next(configuration.earlier_meanings(point.config), point.config)
                points[number] = point = dataclasses.replace(point, config=config)
            trained_as = chain.run(point).training_hash()
            if to_look_at:
                stages.require_sound(chain.run(point))
        except TsaeError as error:
            if not to_look_at:
                raise
            damaged[point.name] = f"damaged: {error}"
        else:
            _refuse_another_run(chain, point, trained_as)
        # The name of a store takes a look at the text's sources; once for each distinct store is enough.
        source = schema.stable_hash([configuration.store_settings(point.config), point.config.store.path])
        if source not in harvests:
            harvests[source] = chain.harvests(point)
        own = harvests[source] if "harvest" in sweep.config.stages else []
        for stage in (*own, *chain.of(point, harvests[source])):
            table.setdefault(stage.key, stage)
            needed_by.setdefault(stage.key, []).append(point.name)
    merged = [dataclasses.replace(stage, points=tuple(needed_by[key])) for key, stage in table.items()]
    ordered = sorted(merged, key=lambda stage: KINDS.index(stage.kind))
    readable = [
        dataclasses.replace(stage, is_done=lambda: False)
        if damaged.keys() & set(stage.points) and stage.kind != "harvest"
        else stage
        for stage in ordered
    ]
    together = merge(points, readable)
    return Plan(sweep, tuple(points), tuple(chained(together) if sweep.config.resources.chain else together), damaged)


def _as_yaml(config: configuration.RunConfig) -> str:
    return "".join(_section_as_yaml(json.dumps({name: part})) for name, part in configuration.to_yaml(config).items())


@cache
def _section_as_yaml(section: str) -> str:
    """Points of a sweep have most sections in common, and writing YAML is slow."""
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    text: str = yaml.dump(json.loads(section), Dumper=dumper, sort_keys=False)
    return text


def _refuse_impossible(sweep: Sweep, points: Sequence[Point]) -> None:
    """Refuse what the settings rule out: experiments that a run cannot have, one store for activations of two kinds."""
    stored: dict[str, Point] = {}
    for point in points:
        where, path = f"{sweep.path}: {point.name}", point.config.store.path
        for name in sweep.config.stages:
            if name in EXPERIMENTS:
                require_possible(name, point.config, where, point.config.sae.dict_size)
        if path is not None:
            other = stored.setdefault(str(path), point)
            different = schema.differences(*(configuration.store_settings(each.config) for each in (other, point)))
            if different:
                raise TsaeError(
                    f"{where}: store.path: {path} is that of {other.name}, too, whose activations are others ({different}); "
                    "leave it out, and each gets its own"
                )


def _check_model(chain: Chain, point: Point, checked: set[str]) -> None:
    """Refuse what only the model can tell: a layer or tokens that are not there.

    Points that agree in them share one look at it; `checked` remembers which.
    """
    from tsae.lm.source import check_model

    model, left_out = point.config.model, point.config.data.exclude_tokens
    asked = schema.stable_hash([schema.to_plain(model), left_out])
    if asked not in checked:
        check_model(model, f"{chain.sweep.path}: {point.name}", left_out)
        checked.add(asked)


def _refuse_another_run(chain: Chain, point: Point, trained_as: str | None) -> None:
    """Refuse a folder that holds a run of other settings; `trained_as` is their hash."""
    if trained_as in (None, point.config.training_hash):
        return
    run = chain.run(point)
    if run.shorter(point.config) is not None:
        return
    different = run.differences(point.config) or ""
    raise TsaeError(
        f"{run.path}: holds a run of another configuration ({different}); "
        f"give this sweep another name with --name, or remove the folder{run.onward(different)}"
    )
