"""Harvest: a source's activations (text through a language model, or a synthetic world) into a store.

The shards are dealt out to the tasks in turn, each is written by one task, and a shard that is there is not read again:
the same command continues after a kill at any moment, and the last task to end declares the store complete.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from glob import escape
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tsae.config import run as configuration
from tsae.config.run import RunConfig
from tsae.lm.source import check_tokens
from tsae.runtime import locks, preemption
from tsae.runtime.errors import BrokenOff, TsaeError
from tsae.runtime.progress import Progress
from tsae.store.layout import StoreLayout, content_hash, sources, store_path
from tsae.store.window import Window

if TYPE_CHECKING:
    from torch import Tensor

    from tsae.data.contexts import Contexts
    from tsae.lm.model import LanguageModel

log = logging.getLogger("tsae")


class Source(Protocol):
    """What a harvest asks of its source."""

    activation_dim: int
    identity: dict[str, Any]
    """What tells it from any other source; a store that another one began is refused."""
    packages: tuple[str, ...]
    """Packages whose versions decide the numbers."""
    batch_size: int
    """Sequences read at a time."""

    def contexts(self, folder: Path) -> Contexts:
        """All sequences; what need not be made again after a kill may be kept in `folder`."""

    def extras(self) -> dict[str, np.ndarray]:
        """Arrays kept beside the activations, by the names of `layout.EXTRAS`."""

    def read(self, layout: StoreLayout, sequences: np.ndarray) -> Tensor:
        """Activations [S, L, D] of sequences of the store."""


def source_of(config: RunConfig, commit: str | None = None, others: Sequence[RunConfig] = ()) -> Source:
    """What the store of `config` is made from; `commit` is the one of a hub model with which it was begun.

    `others` are read at the same time (see `LanguageModelSource.at`).
    """
    if config.is_synthetic:
        return SyntheticSource(config)
    from tsae.lm.model import load_language_model

    places = [config.model, *(other.model for other in others)]
    return LanguageModelSource(config, load_language_model(config.model, commit, places), commit)


def harvest(config: RunConfig, task: int = 0, tasks: int = 1) -> Path:
    """Write what is missing of the shards `task`, `task + tasks`, … of the store of `config`; return the store's path.

    Does nothing for a complete store. Raises TsaeError for a store of another configuration, a model that cannot be
    read as asked, and activations that are not finite.
    """
    harvest_places([config], task, tasks)
    return store_path(config)


def harvest_places(configs: Sequence[RunConfig], task: int = 0, tasks: int = 1) -> None:
    """The same for configurations that differ in the place that is read: one forward pass is for the stores of all.

    Each store comes out as if it was harvested alone.
    """
    if not 0 <= task < tasks:
        raise TsaeError(f"harvest: task {task} of {tasks} is impossible; tasks are counted from 0 to {tasks - 1}")
    missing: list[tuple[RunConfig, StoreLayout]] = []
    commits: set[str | None] = set()
    for config in configs:
        layout = StoreLayout(store_path(config))
        begun = layout.exists()
        if config.is_stored:
            sources(config)  # which must be there, whole
        if begun:
            layout.require(config)
        if not (begun and layout.is_whole()):
            missing.append((config, layout))
            commits.add(layout.attributes["model"].get("revision") if begun else None)
    if len(commits) > 1:  # of one hub model, which has moved since
        for config, _ in missing:
            harvest_places([config], task, tasks)
    elif missing:
        _harvest(missing, task, tasks, commits.pop())


def _harvest(missing: Sequence[tuple[RunConfig, StoreLayout]], task: int, tasks: int, commit: str | None) -> None:
    from tsae.store.filling import require_room, write_missing

    one, *others = (config for config, _ in missing)
    sources = [source_of(one, commit, others)]
    for config in others:
        first = sources[0]
        sources.append(first.at(config) if isinstance(first, LanguageModelSource) else source_of(config))
    begun = [layout.exists() for _, layout in missing]
    for (config, _), source in zip(missing, sources, strict=True):
        check_tokens(config.model, config.data.exclude_tokens, source.identity.get("vocabulary"))
    _prepare_once(missing, sources)
    require_room([(layout, layout.measured[task::tasks]) for _, layout in missing])
    # Stores of one width are cut alike, so that a batch is of one shard of each.
    alike: dict[Any, list[int]] = defaultdict(list)
    for number, (_, layout) in enumerate(missing):
        alike[layout.geometry.shard_sequences, layout.measured].append(number)
    try:
        for (_, shards), numbers in alike.items():
            layouts = [missing[number][1] for number in numbers]
            windows = [
                Window(layout, missing[n][0]) if layout.rolling else None
                for n, layout in zip(numbers, layouts, strict=True)
            ]
            reading = _Reading(layouts, [sources[number] for number in numbers])
            write_missing(layouts, shards[task::tasks], reading.activations, windows)
    except TsaeError:
        for (_, layout), was_there in zip(missing, begun, strict=True):
            if not was_there and tasks == 1 and not any(map(layout.is_written, layout.measured)):
                shutil.rmtree(layout.path)  # refused at the first shard: the place stays free for other settings
        raise
    for config, layout in missing:
        if layout.attributes["complete"] and not config.is_synthetic:
            from tsae.store.massive import MassiveTokens
            from tsae.store.reader import Store

            log.warning("%s: %s", layout.path.name, MassiveTokens.of(Store.open(layout.path), config.counted).line())


def _prepare_once(missing: Sequence[tuple[RunConfig, StoreLayout]], sources: Sequence[Source]) -> None:
    """Make the frames of stores that have none; tasks that come meanwhile wait rather than tokenise the same text.

    The text's ids lie beside the first of them until all are there; a process that goes on after a kill finds them.
    """
    order = sorted(range(len(missing)), key=lambda number: missing[number][1].path)  # all wait for locks in one order
    contexts: Contexts | None = None
    with ExitStack() as held:
        for (config, layout), source in ((missing[number], sources[number]) for number in order):
            if layout.exists() and not _texts(layout):
                continue
            folder = held.enter_context(_text_beside(layout, content_hash(config)))
            if not layout.exists():
                contexts = contexts or source.contexts(folder)
                _prepare(layout, config, source, contexts)
    for (config, layout), source in zip(missing, sources, strict=True):
        layout.require(config)
        # The model may be another one all the same, such as a folder whose content was replaced.
        began, now = layout.attributes["model"], json.loads(json.dumps(source.identity))
        # Of an older store `require` has compared the weights in the way of its time.
        passed = {"weights"} if "sources" not in layout.attributes else set()
        different = [key for key in sorted({*began, *now} - passed) if began.get(key) != now.get(key)]
        if different:
            key = different[0]
            raise TsaeError(
                f"{layout.path}: was begun with another language model ({key} was {began.get(key)!r} and is now "
                f"{now.get(key)!r}); remove the store to harvest anew"
            )


@contextmanager
def _text_beside(layout: StoreLayout, name: str) -> Iterator[Path]:
    """Hold a store that has no frame yet; gives a folder for its text's ids.

    It goes at the end, and where the text or the settings are refused: they will be others then, under another name. It
    stays where the same command continues: the process was stopped, the network broke off, the disk is full.
    """
    with locks.hold_when_free(layout.path.with_name(f"{layout.path.name}.preparing.lock"), str(layout.path)):
        try:
            yield layout.path.with_name(f"{layout.path.name}.text-{name}")
        except BrokenOff:
            raise
        except TsaeError:
            _remove_texts(layout)
            raise
        _remove_texts(layout)


def _remove_texts(layout: StoreLayout) -> None:
    for folder in _texts(layout):
        shutil.rmtree(folder)


def _texts(layout: StoreLayout) -> list[Path]:
    """The folders of ids beside a store, also of a process that was killed."""
    return list(layout.path.parent.glob(f"{escape(layout.path.name)}.text-*"))


def _prepare(layout: StoreLayout, config: RunConfig, source: Source, contexts: Contexts) -> None:
    from tsae.store.writer import prepare

    attributes = {
        "config_hash": content_hash(config),
        "sources": sources(config),
        "settings": configuration.store_settings(config),
        "paths": {"model.name": config.model.name, "data.source": config.data.source},
        "model": source.identity,
        "packages": {name: version(name) for name in ("tsae", "zarr", *source.packages)},
    }
    dim, extras = source.activation_dim, source.extras()
    prepare(layout.path, contexts, dim, store=config.store, attributes=attributes, extras=extras)


class _Reading:
    """The activations of the sequences of stores that are cut alike, with progress over the whole text."""

    def __init__(self, layouts: Sequence[StoreLayout], sources: Sequence[Source]) -> None:
        self._layouts, self._layout, self._sources = layouts, layouts[0], sources
        self._given = set[int]()
        self._progress = Progress(
            "harvest",
            self._tokens(self._layout.measured),
            "tokens",
            self._layout.progress,
            start=self._finished_tokens(),
        )

    def activations(self, shard: int, numbers: Sequence[int]) -> Iterator[list[Tensor]]:
        """The activations [S, L, D] of the sequences of one shard, batch by batch, for each of the stores `numbers`.

        Batches begin with the shard, so that a shard does not depend on which were written before it.
        """
        sources = [self._sources[number] for number in numbers]
        finished, rows = self._finished_tokens(), self._layout.geometry.sequences_of(shard)
        size = sources[0].batch_size
        batches = [range(begin, min(begin + size, rows.stop)) for begin in range(rows.start, rows.stop, size)]
        for batch, blocks in zip(batches, _read_all(sources, self._layout, batches), strict=True):
            yield blocks
            finished += int(self._layout.lengths[batch.start : batch.stop].sum())
            self._progress.update(finished, shard=f"{shard + 1}/{self._layout.geometry.shards}")
        self._given.add(shard)

    def _finished_tokens(self) -> int:
        """Tokens in shards that are finished in every store, whoever wrote them, or are on their way there."""
        return self._tokens(
            shard
            for shard in self._layout.measured
            if shard in self._given or all(layout.marker(shard).exists() for layout in self._layouts)
        )

    def _tokens(self, shards: Iterable[int]) -> int:
        rows = map(self._layout.geometry.sequences_of, shards)
        return sum(int(self._layout.lengths[part.start : part.stop].sum()) for part in rows)


class LanguageModelSource:
    """Text through a language model."""

    packages: tuple[str, ...] = ("torch", "transformers", "tokenizers", "nnsight")

    def __init__(self, config: RunConfig, lm: LanguageModel, commit: str | None = None) -> None:
        """`commit` is the one of a hub model with which the store was begun."""
        self.lm = lm
        self._data, self._commit = config.data, commit
        self.activation_dim, self.identity = self.lm.activation_dim, self.lm.identity
        self.batch_size = config.model.batch_size

    def at(self, config: RunConfig) -> LanguageModelSource:
        """The same text and language model, read at the place of another configuration."""
        return LanguageModelSource(config, self.lm.at(config.model, self._commit), self._commit)

    def contexts(self, folder: Path) -> Contexts:
        """The text, cut into contexts."""
        from tsae.data.contexts import make_contexts
        from tsae.data.documents import read_documents

        tokenizer = self.lm.tokenizer
        return make_contexts(read_documents(self._data, tokenizer), tokenizer, self._data, folder)

    def extras(self) -> dict[str, np.ndarray]:
        """Nothing more is known of a language model."""
        return {}

    def read(self, layout: StoreLayout, sequences: np.ndarray) -> Tensor:
        """Activations [S, L, D]."""
        return self.lm.read(*_rows(layout, sequences))


class SyntheticSource:
    """A synthetic world, whose truth about the held-out sequences is kept beside them."""

    packages: tuple[str, ...] = ("numpy",)

    def __init__(self, config: RunConfig) -> None:
        from tsae.data import synthetic

        self._world = synthetic.World.of(config)
        self.activation_dim = config.synthetic.activation_dim
        kinds = list(config.synthetic.group_names)
        self.identity = {"name": "synthetic", "version": synthetic.VERSION, "feature_kinds": kinds}
        self.batch_size = synthetic.BLOCK

    def contexts(self, folder: Path) -> Contexts:  # noqa: ARG002
        """Sequences without text."""
        return self._world.contexts()

    def extras(self) -> dict[str, np.ndarray]:
        """Directions, kinds and held-out activations of the true features."""
        truth = self._world.truth()
        return {
            "truth_directions": truth.directions,
            "truth_group": truth.group,
            "truth_features": truth.features,
        }

    def read(self, layout: StoreLayout, sequences: np.ndarray) -> Tensor:
        """Activations [S, L, D]."""
        import torch

        del layout  # the world needs no tokens
        # The world is made in blocks, of which neighbours share one.
        breaks = np.flatnonzero(np.diff(sequences) != 1) + 1
        runs = [range(run[0], run[-1] + 1) for run in np.split(sequences, breaks)]
        return torch.from_numpy(np.concatenate([self._world.read(run)[1] for run in runs]))


def _read_all(sources: Sequence[Source], layout: StoreLayout, batches: Sequence[range]) -> Iterator[list[Tensor]]:
    """What each of the sources gives of each batch; places of one language model are read by one forward pass."""
    models = [source.lm for source in sources if isinstance(source, LanguageModelSource)]
    numbers = map(np.array, preemption.polled(batches))
    if len(models) < len(sources):
        return ([source.read(layout, sequences) for source in sources] for sequences in numbers)
    from tsae.lm.model import readings

    return readings(models, (_rows(layout, sequences) for sequences in numbers))


def _rows(layout: StoreLayout, sequences: np.ndarray) -> tuple[Tensor, Tensor]:
    """Tokens [S, L] and lengths [S] of sequences."""
    import torch

    return torch.from_numpy(layout.tokens[sequences]).long(), torch.from_numpy(layout.lengths[sequences]).long()
