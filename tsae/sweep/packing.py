"""Packing: trainings that read the same batches become one job, which reads them once (`training.pack`)."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterable, Sequence

from tsae.config import run as configuration
from tsae.config import schema
from tsae.config.points import Point
from tsae.sweep.stage import Stage


def pack(points: Iterable[Point], plan: Sequence[Stage]) -> list[Stage]:
    """The stages with unfinished trainings merged, at most `training.pack` in one; what follows waits for the pack."""
    configs = {point.name: point.config for point in points}
    groups: dict[str, list[Stage]] = defaultdict(list)
    for stage in plan:
        if stage.kind == "train" and configs[stage.subject].training.pack > 1 and not stage.is_done():
            groups[schema.stable_hash(configuration.reading_settings(configs[stage.subject]))].append(stage)
    pack_of: dict[str, Stage] = {}
    for members in groups.values():
        size = min(configs[stage.subject].training.pack for stage in members)
        for first in range(0, len(members), size):
            part = members[first : first + size]
            if len(part) > 1:
                pack_of |= dict.fromkeys((stage.key for stage in part), _merged(part))
    packed = [pack_of.get(stage.key, stage) for stage in plan]
    return [_after_packs(stage, pack_of) for stage in {stage.key: stage for stage in packed}.values()]


def _merged(members: Sequence[Stage]) -> Stage:
    """One stage that trains all of `members`; it shows the progress of the first."""
    names = tuple(stage.subject for stage in members)
    key = schema.stable_hash([stage.key for stage in members])
    return dataclasses.replace(
        members[0],
        key=key,
        subject=f"{names[0]} and {len(members) - 1} more",
        function="tsae.stages:train_pack_stage",
        config=names,
        arguments=(members[0].arguments[0], names),
        record=members[0].record.with_name(f"train-pack-{key}"),
        points=tuple(dict.fromkeys(name for stage in members for name in stage.points)),
        is_done=functools.partial(_all_done, members),
    )


def _all_done(members: Sequence[Stage]) -> bool:
    return all(stage.is_done() for stage in members)


def _after_packs(stage: Stage, pack_of: dict[str, Stage]) -> Stage:
    inputs = tuple(pack_of[key].key if key in pack_of else key for key in stage.depends_on)
    return dataclasses.replace(stage, depends_on=inputs)
