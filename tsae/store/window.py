"""The window of a rolling store: how much of its training part may be on disk, and what goes when more comes.

Several processes may write into one store; while one makes room and writes, it holds the window's lock. So the bytes
of all shards that come and go, finished or not, are never more than the window.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from tsae.config.run import RunConfig
from tsae.runtime import locks
from tsae.runtime.errors import TsaeError
from tsae.store.layout import StoreLayout

WAIT_SECONDS = 0.02


def held(layout: StoreLayout) -> list[int]:
    """The shards of a rolling store that come and go and are on disk, finished or not."""
    try:
        names = [entry.name for entry in os.scandir(layout.shards)]
    except FileNotFoundError:
        return []
    return [int(name) for name in names if name.isdigit() and int(name) not in layout.kept]


class Window:
    """The shards of a rolling store's training part that are on disk."""

    def __init__(self, layout: StoreLayout, config: RunConfig) -> None:
        """Raises TsaeError for a window that does not hold what one batch of the language model fills."""
        geometry = layout.geometry
        self._layout, self._shard_bytes = layout, geometry.shard_bytes(0)
        self.bytes = config.store.window_bytes(geometry.sequence_bytes // geometry.context_length)
        fewest = (config.model.batch_size // geometry.shard_sequences + 1) * self._shard_bytes
        if self.bytes < fewest:
            raise TsaeError(
                f"store.window: {config.store.window} is impossible; one batch of the language model fills "
                f"{fewest / 1e6:.3g} MB; a larger window or a smaller model.batch_size is needed"
            )

    def held_bytes(self) -> int:
        """Bytes of the shards that come and go and are on disk now."""
        return len(held(self._layout)) * self._shard_bytes

    @contextmanager
    def room(self, shards: Collection[int], need: Callable[[int], float] = float) -> Iterator[None]:
        """Hold the window while `shards` are written, once others have gone: those of the largest `need` first."""
        lock = self._lock()
        try:
            others = sorted(set(held(self._layout)).difference(shards), key=need)
            room = self.bytes - len(shards) * self._shard_bytes
            while len(others) * self._shard_bytes > room:
                self._remove(others.pop())
            yield
        finally:
            lock.release()

    def _remove(self, shard: int) -> None:
        if not self._layout.is_measured(shard):
            self._layout.marker(shard).unlink(missing_ok=True)
        shutil.rmtree(self._layout.shards / str(shard))

    def _lock(self) -> locks.Lock:
        while True:
            try:
                return locks.Lock(self._layout.path / "window.lock", f"{self._layout.path}: window")
            except locks.LockHeld:
                time.sleep(WAIT_SECONDS)
