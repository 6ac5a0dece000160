"""What happens before what, on streams that are not there: two uses of a memory that nothing orders are refused.

Each stream has a clock of vectors: what it has launched itself, and how much of every other stream, and of the host, is known
to be done by then. Waiting for an event or a stream takes over its clock; a launch takes over the host's. A use of a memory
must come after the last write to it, and a write after all uses since. Each thread of the host has a clock like a stream;
what orders threads are their futures and queues.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch.multiprocessing.reductions import StorageWeakRef

DEFAULT = 1
"""The stream that is current in every thread at first; threads of the host have negative numbers."""


class Race(Exception):
    """Two uses of a memory, at least one of which writes, may run at once."""


class Waits(RuntimeError):
    """The host would wait for a GPU while what is launched there is recorded as a graph, which CUDA refuses."""


@dataclass
class Use:
    """Who has used a memory since it was written, each at its own count and by what."""

    alive: StorageWeakRef
    made_on: int
    written: tuple[int, int, str] | None = None
    read: dict[int, tuple[int, str]] = field(default_factory=dict)
    recorded: set[int] = field(default_factory=set)
    """Streams that the allocator was told of."""
    of_graph: bool = False
    """It is of a graph's own memory, which nothing else gets before the GPU has done all that it was given."""

    def all(self) -> Iterator[tuple[int, int, str]]:
        if self.written:
            yield self.written
        yield from ((stream, count, what) for stream, (count, what) in self.read.items())


class Order:
    def __init__(self) -> None:
        self._clocks: dict[int, Counter[int]] = {}
        self._uses: dict[int, Use] = {}
        self._shared: dict[int, Use] = {}
        """Those that more than one stream has used, until their memory is given away."""
        self._thread = threading.local()
        self._lock = threading.RLock()
        self._streams = DEFAULT
        self._refusing = False

    def new_stream(self) -> int:
        with self._lock:
            self._streams += 1
            return self._streams

    @property
    def host(self) -> int:
        """This thread."""
        return -threading.get_ident()

    @property
    def current(self) -> int:
        return getattr(self._thread, "stream", DEFAULT)

    def set_current(self, stream: int) -> None:
        self._thread.stream = stream

    @contextmanager
    def on(self, stream: int) -> Iterator[None]:
        before = self.current
        self.set_current(stream)
        try:
            yield
        finally:
            self.set_current(before)

    def clock(self, stream: int) -> Counter[int]:
        return self._clocks.setdefault(stream, Counter())

    @contextmanager
    def recording(self) -> Iterator[None]:
        """A graph is recorded by this thread."""
        self._thread.recording = True
        try:
            yield
        finally:
            self._thread.recording = False

    def refuse_waits(self, mode: str) -> None:
        """torch.cuda.set_sync_debug_mode, which is of the whole process; events and whole devices may be waited for."""
        self._refusing = mode == "error"

    def wait(self, waiting: int, clock: Counter[int], allowed: bool = False) -> None:
        """What `waiting` does from now on comes after all that `clock` knows of. Raises `Waits`."""
        if waiting < 0 and ((self._refusing and not allowed) or getattr(self._thread, "recording", False)):
            raise Waits
        with self._lock:
            self._clocks[waiting] = self.clock(waiting) | clock

    def snapshot(self, stream: int) -> Counter[int]:
        with self._lock:
            return Counter(self.clock(stream))

    def wait_for_all(self) -> None:
        with self._lock:
            for stream in list(self._clocks):
                self.wait(self.host, self.clock(stream), allowed=True)

    def used(self, stream: int, what: str, reads: Iterable[Any], writes: Iterable[Any]) -> None:
        """Something runs on `stream`, or on the host, and uses these storages. Raises `Race`."""
        if getattr(self._thread, "recording", False):
            return  # it runs when the graph is launched
        with self._lock:
            if stream > 0:
                self.wait(stream, self.clock(self.host))
            clock = self.clock(stream)
            clock[stream] += 1
            self._look_at_freed()
            for storage in reads:
                use = self._use(storage, stream)
                self._require(clock, [use.written] if use.written else [], what)
                use.read[stream] = (clock[stream], what)
                self._note(storage, use, stream)
            for storage in writes:
                use = self._use(storage, stream)
                self._require(clock, use.all(), what)
                use.written, use.read = (stream, clock[stream], what), {}
                self._note(storage, use, stream)

    def made(self, storage: Any) -> None:
        """Memory is taken for the stream that is current, where what had it before may still be at work."""
        with self._lock:
            use = self._use(storage, self.current)
            use.written = (self.current, self.clock(self.current)[self.current], "what had this memory before")
            use.of_graph = getattr(self._thread, "recording", False)

    def record(self, storage: Any, stream: int) -> None:
        """Tensor.record_stream."""
        with self._lock:
            self._use(storage, stream).recorded.add(stream)

    def knows(self, storage: Any) -> bool:
        """Whether a stream has used this memory."""
        use = self._uses.get(storage._cdata)
        return use is not None and not use.alive.expired()

    def _use(self, storage: Any, stream: int) -> Use:
        use = self._uses.get(storage._cdata)
        if use is None or use.alive.expired():
            use = self._uses[storage._cdata] = Use(StorageWeakRef(storage), stream)
            if not len(self._uses) % 4096:
                self._uses = {key: each for key, each in self._uses.items() if not each.alive.expired()}
        return use

    def _note(self, storage: Any, use: Use, stream: int) -> None:
        if stream > 0 and use.made_on > 0 and stream != use.made_on:
            self._shared[storage._cdata] = use

    def _look_at_freed(self) -> None:
        """Memory goes back to the stream that made it, and what is made there next does not wait for other streams.

        Which thread let go of it is not known here: it may be one that knew.
        """
        for key, use in list(self._shared.items()):
            if use.alive.expired():
                del self._shared[key]
                if use.of_graph:
                    continue
                others = (each for each in use.all() if each[0] not in use.recorded)
                known = self.clock(use.made_on).copy()
                for thread in filter(lambda number: number < 0, self._clocks):
                    known |= self._clocks[thread]
                self._require(known, others, "what is made in that memory next")

    @staticmethod
    def _require(clock: Counter[int], before: Iterable[tuple[int, int, str]], what: str) -> None:
        for stream, count, earlier in before:
            if clock[stream] < count:
                raise Race(f"{what} does not wait for {earlier}, launched on stream {stream} as number {count}")
