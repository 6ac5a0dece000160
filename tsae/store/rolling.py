"""A rolling store while somebody reads it: shards that are not on disk are made by the language model, others go for them.

An epoch has one order of all shards. The language model reads their sequences in that order, `model.batch_size` at a
time, and always as many: what a shard holds does not depend on which others are there, on who needs them, or on what was
killed before. Of the shards on disk, those go first that the order comes to last.

An example: shards of 13 sequences and batches of 64. Batch 1 holds sequences 64 to 127 of the order: the last one of the
shard in place 4, all of those in places 5 to 8, and 11 of the one in place 9, whose last two come in batch 2. If the
shards in places 5 and 9 are wanted and missing, batches 1 and 2 are read; if all but the one in place 4 are there, batches
0 and 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tsae.config.run import RunConfig
from tsae.runtime.progress import Progress
from tsae.store.harvest import Source, source_of
from tsae.store.layout import StoreLayout, store_path
from tsae.store.reader import Store
from tsae.store.window import Window
from tsae.store.writer import write_shard


def open_store(config: RunConfig) -> Store:
    """The complete store of `config`; if it is rolling, what has left the window is made again when it is read.

    Raises TsaeError as `Store.open` does, and for a window that is too small.
    """
    store = Store.open(store_path(config), config)
    if store.layout.rolling:
        store.maker = ShardMaker(store.layout, config)
    return store


class ShardMaker:
    """Makes shards of a rolling store, within its window."""

    def __init__(self, layout: StoreLayout, config: RunConfig) -> None:
        self._layout, self._config = layout, config
        self._size = config.model.batch_size
        self.window = Window(layout, config)
        self._made = 0
        self._last: tuple[np.ndarray, Tensor] | None = None
        self._progress = Progress("harvest of the window", None, "tokens")

    @cached_property
    def _source(self) -> Source:
        return source_of(self._config, self._layout.attributes["model"].get("revision"))

    def make(self, shard: int) -> None:
        """Put `shard` on disk, and others away for it; of neighbours, one after another, no batch is read twice."""
        for _ in self.provide(np.arange(self._layout.kept.start), shard, shard + 1):
            pass

    def provide(
        self,
        order: np.ndarray,
        first: int,
        last: int,
        need: Callable[[int], float] = float,
        leaving: Callable[[], bool] = lambda: False,
    ) -> Iterator[int]:
        """The shards in places `first` to `last` of an epoch's `order`, each as soon as it is on disk.

        To make room, shards of the largest `need` go first. Ends early once `leaving` says so.
        """
        per_shard, wanted = self._layout.geometry.shard_sequences, set(order[first:last].tolist())
        pieces: dict[int, list[Tensor]] = {}
        there: set[int] = set()
        for begin in range(first * per_shard // self._size * self._size, last * per_shard, self._size):
            if leaving():
                return
            rows = np.arange(begin, min(begin + self._size, len(order) * per_shard))
            shards = order[rows // per_shard]
            for shard in np.unique(shards).tolist():
                if shard in wanted and shard not in there and shard not in pieces:
                    if shard in self._layout.kept or self._layout.is_written(shard):
                        there.add(shard)
                        yield shard
                    else:
                        pieces[shard] = []
            here = pieces.keys() & set(shards.tolist())
            if not here:
                continue
            block = self._read(np.minimum(shards * per_shard + rows % per_shard, self._layout.geometry.sequences - 1))
            for shard in here:
                pieces[shard].append(block[torch.from_numpy(shards == shard)])
            whole = [shard for shard in pieces if sum(map(len, pieces[shard])) == per_shard]
            if whole:
                with self.window.room(whole, need):
                    for shard in whole:
                        made = pieces.pop(shard)
                        if not self._layout.is_written(shard):  # by another one meanwhile
                            write_shard(self._layout, shard, made)
                        there.add(shard)
                yield from whole

    def _read(self, sequences: np.ndarray) -> Tensor:
        """Activations [S, L, D], read in a batch of the usual size; those of the last call are kept.

        For the last batch of a pool is often the first one of the next: a pool of 64 contexts touches five batches of 16.
        """
        if self._last is not None and np.array_equal(self._last[0], sequences):
            return self._last[1]
        filled = np.concatenate([sequences, np.repeat(sequences[:1], self._size - len(sequences))])
        block = self._source.read(self._layout, filled)[: len(sequences)]
        self._made += int(self._layout.lengths[sequences].sum())
        self._progress.update(self._made)
        self._last = sequences, block
        return block
