"""Harvest: a source's activations (text through a language model, or a synthetic world) into a store.

The shards are dealt out to the tasks in turn, each is written by one task, and a shard that is there is not read again:
the same command continues after a kill at any moment, and the last task to end declares the store complete.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tsae.config import run as configuration
from tsae.config.run import RunConfig
from tsae.lm.source import check_tokens
from tsae.runtime import locks, preemption
from tsae.runtime.errors import TsaeError
from tsae.runtime.progress import Progress
from tsae.runtime.space import free_for, shown
from tsae.store.layout import StoreLayout, content_hash, sources, store_path
from tsae.store.window import Window

if TYPE_CHECKING:
    from torch import Tensor

    from tsae.data.contexts import Contexts

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

    def contexts(self) -> Contexts:
        """All sequences."""

    def extras(self) -> dict[str, np.ndarray]:
        """Arrays kept beside the activations, by the names of `layout.EXTRAS`."""

    def read(self, layout: StoreLayout, sequences: np.ndarray) -> Tensor:
        """Activations [S, L, D] of sequences of the store."""


def source_of(config: RunConfig, commit: str | None = None) -> Source:
    """What the store of `config` is made from; `commit` is the one of a hub model with which it was begun."""
    return SyntheticSource(config) if config.is_synthetic else LanguageModelSource(config, commit)


def harvest(config: RunConfig, task: int = 0, tasks: int = 1) -> Path:
    """Write what is missing of the shards `task`, `task + tasks`, … of the store of `config`; return the store's path.

    Does nothing for a complete store. Raises TsaeError for a store of another configuration, a model that cannot be
    read as asked, and activations that are not finite.
    """
    if not 0 <= task < tasks:
        raise TsaeError(f"harvest: task {task} of {tasks} is impossible; tasks are counted from 0 to {tasks - 1}")
    layout = StoreLayout(store_path(config))
    begun = layout.exists()
    if begun:
        layout.require(config)
        if layout.is_whole():
            return layout.path
    commit = layout.attributes["model"].get("revision") if layout.exists() else None
    source = source_of(config, commit)
    check_tokens(config.model, config.data.exclude_tokens, source.identity.get("vocabulary"))
    _prepare_once(layout, config, source)
    _require_room(layout, [shard for shard in layout.measured[task::tasks] if shard in layout.kept])
    try:
        window = Window(layout, config) if layout.rolling else None
        write_missing(layout, layout.measured[task::tasks], _Reading(layout, source).activations, window)
    except TsaeError:
        if not begun and tasks == 1 and not any(map(layout.is_written, layout.measured)):
            shutil.rmtree(layout.path)  # refused at the first shard: the place stays free for other settings
        raise
    if layout.attributes["complete"] and not config.is_synthetic:
        from tsae.store.massive import MassiveTokens
        from tsae.store.reader import Store

        log.warning("%s: %s", layout.path.name, MassiveTokens.of(Store.open(layout.path), config.counted).line())
    return layout.path


def write_missing(
    layout: StoreLayout,
    shards: Sequence[int],
    activations: Callable[[int], Iterator[Tensor]],
    window: Window | None = None,
) -> None:
    """Write those of `shards` that are not there, and finish the store once all are; `activations` gives a shard's, in order.

    Of a rolling store, those that come and go are kept within its `window`.
    """
    from tsae.store.writer import finalise, write_shard

    if layout.attributes["complete"]:
        # A shard was lost since; until it is back nobody may take the store for whole.
        layout.set_attributes(complete=False)
    for shard in shards:
        if not layout.is_settled(shard):
            with nullcontext() if window is None or shard in layout.kept else window.room([shard]):
                write_shard(layout, shard, activations(shard))
    if all(map(layout.is_settled, layout.measured)):
        finalise(layout)
        layout.progress.unlink(missing_ok=True)


def _require_room(layout: StoreLayout, shards: Sequence[int]) -> None:
    """Refuse to begin what the disk, or a quota, has no room for: now the size is exact. Raises TsaeError."""
    missing = sum(layout.geometry.shard_bytes(shard) for shard in shards if not layout.is_written(shard))
    free = free_for(layout.path).bytes
    if missing > free:
        raise TsaeError(
            f"{layout.path}: {shown(missing)} of activations are to be written and there is room for {shown(free)}; make "
            "room and run the same harvest again, or lower data.max_tokens"
        )


def _prepare_once(layout: StoreLayout, config: RunConfig, source: Source) -> None:
    """Make the store's frame if it is not there; tasks that come meanwhile wait rather than tokenise the same text."""
    lock = layout.path.with_name(f"{layout.path.name}.preparing.lock")
    if not layout.exists():
        with locks.hold_when_free(lock, str(layout.path)):
            if not layout.exists():
                _prepare(layout, config, source)
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


def _prepare(layout: StoreLayout, config: RunConfig, source: Source) -> None:
    from tsae.store.writer import prepare

    attributes = {
        "config_hash": content_hash(config),
        "sources": sources(config),
        "settings": configuration.store_settings(config),
        "paths": {"model.name": config.model.name, "data.source": config.data.source},
        "model": source.identity,
        "packages": {name: version(name) for name in ("tsae", "zarr", *source.packages)},
    }
    extras, contexts = source.extras(), source.contexts()
    prepare(layout.path, contexts, source.activation_dim, store=config.store, attributes=attributes, extras=extras)


class _Reading:
    """The activations of the store's sequences, with progress over the whole store."""

    def __init__(self, layout: StoreLayout, source: Source) -> None:
        self._layout, self._source = layout, source
        self._progress = Progress(
            "harvest", self._tokens(layout.measured), "tokens", layout.progress, start=self._finished_tokens()
        )

    def activations(self, shard: int) -> Iterator[Tensor]:
        """The activations [S, L, D] of the sequences of one shard, batch by batch.

        Batches begin with the shard, so that a shard does not depend on which were written before it.
        """
        finished, rows = self._finished_tokens(), self._layout.geometry.sequences_of(shard)
        for first in preemption.polled(range(rows.start, rows.stop, self._source.batch_size)):
            batch = range(first, min(first + self._source.batch_size, rows.stop))
            yield self._source.read(self._layout, np.array(batch))
            finished += int(self._layout.lengths[batch.start : batch.stop].sum())
            self._progress.update(finished, shard=f"{shard + 1}/{self._layout.geometry.shards}")

    def _finished_tokens(self) -> int:
        """Tokens in finished shards, whoever wrote them."""
        return self._tokens(shard for shard in self._layout.measured if self._layout.marker(shard).exists())

    def _tokens(self, shards: Iterable[int]) -> int:
        rows = map(self._layout.geometry.sequences_of, shards)
        return sum(int(self._layout.lengths[part.start : part.stop].sum()) for part in rows)


class LanguageModelSource:
    """Text through a language model."""

    packages: tuple[str, ...] = ("torch", "transformers", "tokenizers", "nnsight")

    def __init__(self, config: RunConfig, commit: str | None = None) -> None:
        """`commit` is the one of a hub model with which the store was begun."""
        from tsae.lm.model import load_language_model

        self._lm, self._data = load_language_model(config.model, commit), config.data
        self.activation_dim, self.identity = self._lm.activation_dim, self._lm.identity
        self.batch_size = config.model.batch_size

    def contexts(self) -> Contexts:
        """The text, cut into contexts."""
        from tsae.data.contexts import make_contexts
        from tsae.data.documents import read_documents

        tokenizer = self._lm.tokenizer
        return make_contexts(read_documents(self._data, tokenizer), tokenizer, self._data)

    def extras(self) -> dict[str, np.ndarray]:
        """Nothing more is known of a language model."""
        return {}

    def read(self, layout: StoreLayout, sequences: np.ndarray) -> Tensor:
        """Activations [S, L, D]."""
        import torch

        tokens = torch.from_numpy(layout.tokens[sequences]).long()
        lengths = torch.from_numpy(layout.lengths[sequences]).long()
        return self._lm.read(tokens, lengths)


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

    def contexts(self) -> Contexts:
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
