"""Harvest: text through the language model into a store.

The shards are dealt out to the tasks in turn, each is written by one task, and a shard that is there is not read again:
the same command continues after a kill at any moment, and the last task to end declares the store complete.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tsae import config as configuration
from tsae import locks
from tsae.config import RunConfig
from tsae.errors import TsaeError
from tsae.progress import Progress
from tsae.store.layout import StoreLayout, content_hash, store_path

if TYPE_CHECKING:
    from torch import Tensor

    from tsae.lm.model import LanguageModel

WAIT_SECONDS = 1.0


def harvest(config: RunConfig, task: int = 0, tasks: int = 1) -> Path:
    """Write what is missing of the shards `task`, `task + tasks`, … of the store of `config`; return the store's path.

    Does nothing for a complete store. Raises TsaeError for a store of another configuration, a model that cannot be
    read as asked, and activations that are not finite.
    """
    if not 0 <= task < tasks:
        raise TsaeError(f"harvest: task {task} of {tasks} is impossible; tasks are counted from 0 to {tasks - 1}")
    layout = StoreLayout(store_path(config))
    if layout.exists():
        layout.require(config)
        if layout.is_whole():
            return layout.path
    from tsae.lm.model import load_language_model
    from tsae.store.writer import finalise, write_shard

    lm = load_language_model(config.model)
    _prepare_once(layout, config, lm)
    if layout.attributes["complete"]:
        # A shard was lost since; until it is back nobody may take the store for whole.
        layout.set_attributes(complete=False)
    reading = _Reading(layout, lm, config.model.batch_size)
    for shard in range(task, layout.geometry.shards, tasks):
        if not layout.is_written(shard):
            write_shard(layout, shard, reading.activations(shard))
    if all(layout.is_written(shard) for shard in range(layout.geometry.shards)):
        finalise(layout)
        layout.progress.unlink(missing_ok=True)
    return layout.path


def _prepare_once(layout: StoreLayout, config: RunConfig, lm: LanguageModel) -> None:
    """Make the store's frame if it is not there; tasks that come meanwhile wait rather than tokenise the same text."""
    lock = layout.path.with_name(f"{layout.path.name}.preparing.lock")
    while not layout.exists():
        try:
            with locks.hold(lock, str(layout.path)):
                if not layout.exists():
                    _prepare(layout, config, lm)
        except locks.LockHeld:
            time.sleep(WAIT_SECONDS)
    layout.require(config)
    _same_model(layout, lm)


def _prepare(layout: StoreLayout, config: RunConfig, lm: LanguageModel) -> None:
    from tsae.data.contexts import make_contexts
    from tsae.data.documents import read_documents
    from tsae.store.writer import prepare

    contexts = make_contexts(read_documents(config.data), lm.tokenizer, config.data)
    attributes = {
        "config_hash": content_hash(config),
        "settings": configuration.store_settings(config),
        "model": lm.identity,
        "packages": _versions(),
    }
    prepare(layout.path, contexts, lm.activation_dim, store=config.store, attributes=attributes)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("tsae", "torch", "transformers", "tokenizers", "nnsight", "zarr")}


def _same_model(layout: StoreLayout, lm: LanguageModel) -> None:
    """Refuse to continue a store that another model began, such as a folder whose content was replaced."""
    began, now = layout.attributes["model"], json.loads(json.dumps(lm.identity))
    different = [key for key in sorted({*began, *now}) if began.get(key) != now.get(key)]
    if different:
        key = different[0]
        raise TsaeError(
            f"{layout.path}: was begun with another language model ({key} was {began.get(key)!r} and is now "
            f"{now.get(key)!r}); remove the store to harvest anew"
        )


class _Reading:
    """The language model's activations of the store's sequences, with progress over the whole store."""

    def __init__(self, layout: StoreLayout, lm: LanguageModel, batch_size: int) -> None:
        self._layout, self._lm, self._batch_size = layout, lm, batch_size
        self._tokens, self._checked = layout.array("tokens"), False
        self._progress = Progress(
            "harvest", int(layout.lengths.sum()), "tokens", layout.progress, start=self._finished_tokens()
        )

    def activations(self, shard: int) -> Iterator[Tensor]:
        """The activations [S, L, D] of the sequences of one shard, batch by batch.

        Batches begin with the shard, so that a shard does not depend on which were written before it.
        """
        import torch

        finished, rows = self._finished_tokens(), self._layout.geometry.sequences_of(shard)
        for first in range(rows.start, rows.stop, self._batch_size):
            batch = slice(first, min(first + self._batch_size, rows.stop))
            tokens = torch.from_numpy(self._tokens[batch]).long()
            lengths = torch.from_numpy(self._layout.lengths[batch]).long()
            if not self._checked:
                self._lm.verify_hook(tokens, lengths)
                self._checked = True
            yield self._lm.read(tokens, lengths)
            finished += int(lengths.sum())
            self._progress.update(finished, shard=f"{shard + 1}/{self._layout.geometry.shards}")

    def _finished_tokens(self) -> int:
        """Tokens in finished shards, whoever wrote them."""
        geometry, lengths = self._layout.geometry, self._layout.lengths
        written = [shard for shard in range(geometry.shards) if self._layout.marker(shard).exists()]
        return sum(int(lengths[slice(rows.start, rows.stop)].sum()) for rows in map(geometry.sequences_of, written))
