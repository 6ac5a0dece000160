"""Filling stores: one thread reads activations, another writes them, so that neither a disk nor a GPU waits for the other."""

from __future__ import annotations

import queue
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from threading import Event
from typing import NamedTuple

import torch
from torch import Tensor

from tsae.runtime.errors import TsaeError
from tsae.runtime.space import free_for, shown
from tsae.runtime.streams import stream_for
from tsae.store.layout import StoreLayout
from tsae.store.window import Window
from tsae.store.writer import finalise, writing

BLOCKS_AHEAD = 2
"""Batches of a shard that may wait to be written."""
POLL_SECONDS = 0.1

Activations = Callable[[int, Sequence[int]], Iterator[Sequence[Tensor]]]


class Abandoned(Exception):
    """The rest of a shard will not come."""


class _Given(NamedTuple):
    """A batch on its way to the disk: a tensor [S, L, D] for each store."""

    blocks: Sequence[Tensor]
    ready: torch.cuda.Event | None
    """Since when they are there, on a GPU."""


def write_missing(
    layouts: Sequence[StoreLayout],
    shards: Sequence[int],
    activations: Activations,
    windows: Sequence[Window | None] | None = None,
) -> None:
    """Write those of `shards` that are not there, and finish each store, all cut alike, once all of its are.

    `activations(shard, numbers)` gives a shard's batches in order, a tensor for each of the stores that lack it; the next
    one is asked for while it is written. Of a rolling store, shards that come and go are kept within its window.
    """
    for layout in layouts:
        if layout.attributes["complete"]:
            # A shard was lost since; until it is back nobody may take the store for whole.
            layout.set_attributes(complete=False)
    with ThreadPoolExecutor(1, "writer") as writer:
        before: Future[None] | None = None
        for shard in shards:
            lacking = [number for number, layout in enumerate(layouts) if not layout.is_settled(shard)]
            if lacking:
                coming = _Coming()
                places = [layouts[number] for number in lacking]
                rooms = [windows[n] for n, at in zip(lacking, places, strict=True) if windows and shard not in at.kept]
                try:
                    written = writer.submit(_write, places, [room for room in rooms if room], shard, coming)
                    for blocks in activations(shard, lacking):
                        coming.put(blocks, [before, written])
                    coming.end([before, written])
                except BaseException:
                    coming.abandon()
                    raise
                if before is not None:
                    before.result()  # no more than one shard is written while the next one is read
                before = written
        if before is not None:
            before.result()
    for layout in layouts:
        if all(map(layout.is_settled, layout.measured)):
            finalise(layout)
            layout.progress.unlink(missing_ok=True)


def _write(layouts: Sequence[StoreLayout], windows: Sequence[Window], shard: int, coming: _Coming) -> None:
    """Write one shard of each store, on a GPU beside what is computed there meanwhile."""
    with ExitStack() as held:
        for window in windows:
            held.enter_context(window.room([shard]))
        writers = [held.enter_context(writing(layout, shard)) for layout in layouts]
        stream: torch.cuda.Stream | None = None
        for blocks, ready in coming:
            if ready is not None:
                stream = stream_for("stores", blocks[0].device)
                stream.wait_event(ready)
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                for write, block in zip(writers, blocks, strict=True):
                    write(block)


class _Coming:
    """The batches of a shard, from the thread that reads them to the one that writes them."""

    def __init__(self) -> None:
        self._queue: queue.Queue[_Given | None] = queue.Queue(BLOCKS_AHEAD)
        self._abandoned = Event()

    def put(self, blocks: Sequence[Tensor], writing: Sequence[Future[None] | None]) -> None:
        """Hand over a batch once there is room; raises what has gone wrong in `writing`."""
        on_gpu = blocks[0].is_cuda
        self._put(
            _Given(blocks, torch.cuda.current_stream(blocks[0].device).record_event() if on_gpu else None), writing
        )

    def end(self, writing: Sequence[Future[None] | None]) -> None:
        """No more will come."""
        self._put(None, writing)

    def _put(self, given: _Given | None, writing: Sequence[Future[None] | None]) -> None:
        while True:
            for each in writing:
                if each is not None and each.done():
                    each.result()
            try:
                return self._queue.put(given, timeout=POLL_SECONDS)
            except queue.Full:
                continue

    def abandon(self) -> None:
        """Let the shard be as it was."""
        self._abandoned.set()

    def __iter__(self) -> Iterator[_Given]:
        while not self._abandoned.is_set():
            try:
                given = self._queue.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            if given is None:
                return
            yield given
        raise Abandoned


def require_room(wanted: Sequence[tuple[StoreLayout, Sequence[int]]]) -> None:
    """Refuse to begin what the disk, or a quota, has no room for: now the size is exact. Raises TsaeError."""
    missing: dict[int, int] = defaultdict(int)
    for layout, shards in wanted:
        free = free_for(layout.path)
        lacking = (shard for shard in shards if shard in layout.kept and not layout.is_written(shard))
        missing[free.disk] += sum(map(layout.geometry.shard_bytes, lacking))
        if missing[free.disk] > free.bytes:
            raise TsaeError(
                f"{layout.path}: {shown(missing[free.disk])} of activations are to be written and there is room for "
                f"{shown(free.bytes)}; make room and run the same harvest again, or lower data.max_tokens"
            )
