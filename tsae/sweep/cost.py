"""What work costs before it starts: bytes on disk and in memory of each stage, its GPUs; what cannot fit is refused.

Bytes of a store that is prepared are exact. Everything else follows from settings and sizes of files: enough to tell
gigabytes from terabytes, and to say which setting would make it fit.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tsae.checkpoint import RunFolder
from tsae.config.run import RunConfig
from tsae.config.sections import KIND_SETTINGS, ModelConfig
from tsae.data.size import tokens_of
from tsae.lm.size import ITEMSIZE, ModelSize, size_of
from tsae.runtime.errors import TsaeError
from tsae.runtime.space import free_for, gpu_bytes, memory_bytes, shown
from tsae.stages import is_harvested, store_path
from tsae.store.layout import StoreLayout
from tsae.sweep.cluster import Cluster
from tsae.sweep.plan import Plan
from tsae.sweep.queue.machine import visible_gpus
from tsae.sweep.stage import Stage

LARGE = 500_000_000
"""Parameters from which on a language model wants a GPU."""
NOTABLE = 1_000_000_000
"""Bytes of disk from which on a single harvest or training tells its cost unasked."""
SPARE = 0.98
"""Share of the free space that a proposed setting would fill."""
STATE = 16
"""Bytes of a parameter in training: itself, its gradient and Adam's two moments, in float32."""
SIBLINGS = 12
"""Bytes of a position beside its activation: token, document and norm."""
TEXT = 64
"""Bytes of memory for each context while text is cut into them; measured: 28, and 0.22 for each token."""
IDS = 4
"""Bytes on disk of each token until it has been cut."""


class Work(NamedTuple):
    """One stage to be run on one configuration."""

    kind: str
    config: RunConfig
    folder: Path
    """Where its results go; of a harvest the store."""
    gpus: int


class Need(NamedTuple):
    """What one stage takes, in bytes; None: not known before."""

    disk: int | None = 0
    passing: int = 0
    """On the disk only while it runs."""
    memory: int | None = None
    device: int | None = None
    """Of the GPU's memory, or of the machine's where there is no GPU."""


class Store(NamedTuple):
    """A store as far as it is known before it is there."""

    bytes: int
    missing: int
    """Bytes that are still to be written."""
    positions: int
    width: int


class Cost(NamedTuple):
    """What is to be told before anything starts, and why it cannot start."""

    works: tuple[Work, ...]
    lines: tuple[str, ...]
    refused: tuple[str, ...]
    notable: bool
    """Whether one who asked for a single run wants to hear of it: gigabytes, or something not known or warned of."""

    def require(self) -> None:
        """Refuse what cannot fit. Raises TsaeError."""
        if self.refused:
            raise TsaeError(self.refused[0])


def cost_of_launch(plan: Plan, stages: Sequence[Stage], site: Cluster | None) -> Cost:
    """The cost of `stages` of a sweep, on a cluster with the defaults of `site`, or else on this machine."""
    configs, gpus = {point.name: point for point in plan.points}, len(visible_gpus()) if site is None else 0
    works = []
    for stage in stages:
        wanted = stage.resources if site is None else site.resources_of(stage.kind, stage.resources)
        given = (wanted.gpus or 0) * (wanted.nodes or 1)
        if site is None:
            given = min(gpus, given if wanted.gpus is not None else int(stage.on_gpu))
        for one in stage.apart:
            for name in [one.config] if isinstance(one.config, str) else one.config or ():
                point = configs[name]
                folder = store_path(point.config) if one.kind == "harvest" else plan.run(point).path
                works.append(Work(one.kind, point.config, folder, given))
    return cost_of(works, here=site is None)


def cost_of_run(config: RunConfig, run: RunFolder | None) -> Cost:
    """The cost of a harvest by this process and, with `run`, of its training; of what is not done yet."""
    gpus, works = min(1, len(visible_gpus())), []
    if not is_harvested(config):
        works.append(Work("harvest", config, store_path(config), gpus if config.model.device != "cpu" else 0))
    if run is not None and not run.is_trained(config):
        works.append(Work("train", config, run.path, gpus if config.training.device != "cpu" else 0))
    return cost_of(works, here=True)


def cost_of(works: Sequence[Work], here: bool) -> Cost:
    """The cost of `works`; `here`: on this machine, whose memory counts then."""
    works = tuple({(work.kind, work.folder): work for work in works}.values())
    if not works:
        return Cost((), (), (), notable=False)
    needs = [_need(work) for work in works]
    remarks = [*_without_gpu(works), *_unknown(works, needs)]
    room, too_much = _disks(works, needs)
    if here:
        too_much += _memory(works, needs)
    notable = bool(remarks) or sum((need.disk or 0) + need.passing for need in needs) >= NOTABLE
    return Cost(works, (*_table(works, needs), *remarks, *room), tuple(too_much), notable)


def _need(work: Work) -> Need:
    if work.kind == "harvest":
        return _harvest(work.config)
    if work.kind == "train":
        return _train(work.config)
    return _reading(work)


def _harvest(config: RunConfig) -> Need:
    store, size = store_of(config), _size_of(config.model)
    batch = config.model.batch_size * config.data.context_length
    if config.without_text:
        return Need(disk=store and store.missing)
    tokens = tokens_of(config.data)
    device = None if size is None else (size.parameters + 16 * batch * size.width) * ITEMSIZE[config.model.dtype]
    left = None if tokens is None or StoreLayout(store_path(config)).exists() else tokens
    return Need(
        disk=store and store.missing,
        passing=IDS * (left or 0),
        memory=None if left is None else TEXT * left // config.data.context_length,
        device=device,
    )


def _train(config: RunConfig) -> Need:
    store, training = store_of(config), config.training
    width = store.width if store else _width(config)
    if width is None:
        return Need(disk=None)
    parameters = _parameters(config, width)
    encoded = training.batch_size * (2 if KIND_SETTINGS[config.sae.kind].temporal else 1)
    memory = None
    if store is not None:
        pools = min(2 * training.pool_sequences * config.data.context_length, store.positions)
        memory = pools * (store.width * ITEMSIZE[config.store.dtype] + SIBLINGS)
    return Need(
        disk=4 * parameters * (1 + len(training.save_steps) + 3 * training.keep_state),
        passing=12 * parameters * (training.resume_keep + 1),
        memory=memory,
        device=STATE * parameters + 4 * encoded * (config.sae.dict_size + 3 * width),
    )


def _reading(work: Work) -> Need:
    """An evaluation or an experiment: the dictionary, and the language model where it is read."""
    config = work.config
    width, size = _width(config), _size_of(config.model)
    if width is None:
        return Need()
    device = 4 * _parameters(config, width)
    if size is not None and reads_model(work):
        scores = config.evaluation.batch_size * config.data.context_length * size.vocabulary
        device += size.parameters * ITEMSIZE[config.model.dtype] + 4 * scores
    return Need(device=device)


def reads_model(work: Work) -> bool:
    """Whether a stage runs the language model."""
    if work.config.without_text or work.kind == "train":
        return False
    return work.kind != "evaluate" or work.config.evaluation.loss_recovered


def store_of(config: RunConfig) -> Store | None:
    """The store of a configuration: exactly if it is prepared, else about; None where its size is not known."""
    path, itemsize = store_path(config), ITEMSIZE[config.store.dtype]
    layout = StoreLayout(path)
    if layout.exists():
        geometry = layout.geometry
        missing = [geometry.shard_bytes(shard) for shard in range(geometry.shards) if not layout.is_written(shard)]
        positions = geometry.sequences * geometry.context_length
        whole = positions * geometry.activation_dim * itemsize
        left = sum(missing)
        if layout.rolling:
            left = min(left, _on_disk(config, whole, geometry.activation_dim * itemsize))
        return Store(whole, left, positions, geometry.activation_dim)
    width = _width(config)
    world = config.synthetic.sequences * config.data.context_length if config.is_synthetic else None
    tokens = world or tokens_of(config.data)
    if width is None or tokens is None:
        return None
    whole = tokens * (width * itemsize + SIBLINGS)
    # Of a rolling store, too, tokens and documents are there for good.
    left = min(whole, _on_disk(config, whole, width * itemsize) + 2 * IDS * tokens)
    return Store(whole, left, tokens, width)


def _on_disk(config: RunConfig, whole: int, token_bytes: int) -> int:
    """Bytes that a store of `whole` ones has on disk at a time: its window, a shard and what is held out, or all of it."""
    window = config.store.window_bytes(token_bytes)
    within = window + 1_000_000 * config.store.shard_mb + config.data.holdout * whole
    return int(min(whole, within))


def _width(config: RunConfig) -> int | None:
    if config.is_synthetic:
        return config.synthetic.activation_dim
    if config.is_stored:
        return StoreLayout(store_path(config)).geometry.activation_dim
    size = _size_of(config.model)
    return None if size is None else size.width


@cache
def _size_of(model: ModelConfig) -> ModelSize | None:
    return size_of(model)


def _parameters(config: RunConfig, width: int) -> int:
    return config.sae.dict_size * (2 * width + 1) + width


def _table(works: Sequence[Work], needs: Sequence[Need]) -> list[str]:
    """A row for each kind of stage, of what the largest takes; the disk is that of all together."""
    rows = [("stage", "", "GPUs", "disk", "while it runs", "memory", "of the device")]
    for kind in dict.fromkeys(work.kind for work in works):
        some = [(work, need) for work, need in zip(works, needs, strict=True) if work.kind == kind]
        disk = [need.disk for _, need in some]
        total = "?" if None in disk else _told(sum(size or 0 for size in disk))
        rows.append(
            (
                kind,
                f"× {len(some)}" if len(some) > 1 else "",
                str(max(work.gpus for work, _ in some)),
                total,
                _told(max(need.passing for _, need in some)),
                _told(max((need.memory or 0 for _, need in some), default=0)),
                _told(max((need.device or 0 for _, need in some), default=0)),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _told(size: int) -> str:
    return shown(size) if size else "-"


def _without_gpu(works: Sequence[Work]) -> Iterable[str]:
    """Warnings of stages of a large model that have no GPU."""
    told: dict[str, str] = {}
    for work in works:
        size = None if work.config.without_text else _size_of(work.config.model)
        if size is not None and size.parameters >= LARGE and not work.gpus:
            told[work.kind] = (
                f"warning: {work.kind}: no GPU, and {work.config.model.name} has {size.parameters / 1e9:.1f} G parameters"
            )
    return told.values()


def _unknown(works: Sequence[Work], needs: Sequence[Need]) -> list[str]:
    """What keeps the disk from being known."""
    unknown = [work.config for work, need in zip(works, needs, strict=True) if need.disk is None]
    if not unknown:
        return []
    config = unknown[0]
    if _width(config) is None:
        return [
            f"not known: the size of {config.model.name}, which is not here: `hf download {config.model.name} config.json`"
        ]
    return [f"not known: how much text {config.data.source} has; data.max_tokens bounds it"]


def _disks(works: Sequence[Work], needs: Sequence[Need]) -> tuple[list[str], list[str]]:
    """Room on each disk that something goes to, and what does not fit there."""
    on: dict[int, list[tuple[Work, Need]]] = defaultdict(list)
    for work, need in zip(works, needs, strict=True):
        if need.disk or need.passing:
            on[free_for(work.folder).disk].append((work, need))
    lines, refused = [], []
    for some in on.values():
        place, free = os.path.commonpath([work.folder.absolute() for work, _ in some]), free_for(some[0][0].folder)
        needed = sum(need.disk or 0 for _, need in some) + max(need.passing for _, need in some)
        limit = "are left by the quota" if free.quota else "are free"
        told = f"{place}: {shown(needed)} of disk are needed, {shown(free.bytes)} {limit}"
        lines.append(told)
        if needed > free.bytes:
            refused.append(f"{told}; {_fitting(some, needed, free.bytes)}")
    return lines, refused


def _fitting(some: Sequence[tuple[Work, Need]], needed: int, free: int) -> str:
    """The settings with which it would fit."""
    harvests = [work.config for work, need in some if work.kind == "harvest" and need.disk]
    stores = [store for store in map(store_of, harvests) if store is not None and store.missing]
    taken = sum(store.missing for store in stores)
    room = SPARE * free - (needed - taken)
    begun = any(StoreLayout(store_path(config)).exists() for config in harvests)
    if not stores or room <= 0 or begun:
        return "make room, or name a folder on another disk in TSAE_HOME or store.path"
    share = room / taken
    config = harvests[0]
    if config.store.window not in (None, "all"):
        return "a smaller store.window, or data.max_tokens, would fit"
    if config.is_synthetic:
        return f"synthetic.sequences={_rounded(share * config.synthetic.sequences)} would fit"
    tokens = _rounded(share * max(store.positions for store in stores))
    return f"data.max_tokens={tokens} would fit, and store.window keeps less of a store on the disk at a time"


def _rounded(number: float) -> int:
    """Down to two digits."""
    unit = 10 ** max(0, len(str(int(number))) - 2)
    return max(1, int(number) // unit * unit)


def _memory(works: Sequence[Work], needs: Sequence[Need]) -> list[str]:
    """What does not fit into this machine's memory, or its GPU's."""
    here, device = memory_bytes(), gpu_bytes() if any(work.gpus for work in works) else None
    refused = []
    for work, need in zip(works, needs, strict=True):
        config, memory = work.config, need.memory or 0
        if memory > here:
            told = f"{work.kind}: {shown(memory)} of memory are needed, this machine has {shown(here)}"
            remedy = f"data.max_tokens={_rounded(SPARE * here * config.data.context_length / TEXT)} would fit"
            if work.kind == "train":
                pool = _rounded(SPARE * config.training.pool_sequences * here / memory)
                remedy = f"training.pool_sequences={pool} would fit"
            refused.append(f"{told}; {remedy}")
        if device is not None and work.gpus and work.kind == "train":
            state = STATE * _parameters(config, _width(config) or 0)
            if state > device:
                latents = _rounded(SPARE * config.sae.dict_size * device / state)
                refused.append(
                    f"train: {shown(state)} of GPU memory are needed for the weights and their moments, this GPU has "
                    f"{shown(device)}; sae.dict_size={latents} would fit"
                )
    return refused
