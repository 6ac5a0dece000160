"""A step's launches, recorded once and given to the GPU as a whole: CUDA graphs.

A step of the sparse engine is 120 to 260 launches, of 5 µs or more each for the host and often less for the GPU, which
then waits. Recorded, most of them are three, or four where its terms are told. What is recorded does not run through Python again: it reads and writes the same
memory in every step, so that all a step is given lies in fixed places, its numbers too, and what is made of it does.
What a step returns is overwritten by the next.

Where something cannot be recorded, it runs as it stands, which gives the same numbers.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from tsae.runtime import phases
from tsae.runtime.streams import stream_for

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Recording = tuple[Any, Callable[[], None]]
"""What a function returned while it was recorded, and what launches all of it again."""
Record = Callable[[Callable[[], Any]], Recording]

EAGER = 2
"""Steps of a kind that run as they stand: kernels are compiled in them, and buffers made that stay."""
MOST = 8
"""Kinds of steps of which recordings are kept."""


class _Recorder:
    """Records, until that fails. It knows no recordings: what they keep on a GPU is free as soon as their trainer is gone."""

    def __init__(self, record: Record) -> None:
        self.record: Record | None = record

    def recording_of(self, part: Callable[[], Any]) -> Recording | None:
        """None, from now on, where a part cannot be recorded."""
        if self.record is None:
            return None
        try:
            return self.record(part)
        except RuntimeError as error:
            self.record = None
            logger.warning("training goes on without CUDA graphs, more slowly and with the same numbers: %s", error)
            return None


class Recorded:
    """The recordings of the steps of one kind, part by part; a part without one is recorded, if that can be."""

    def __init__(self, recorder: _Recorder) -> None:
        self._recorder = recorder
        self._recordings: dict[str, Recording] = {}
        self._met: Counter[str] = Counter()
        self._fixed: dict[str, Tensor] = {}

    def run(self, name: str, part: Callable[[], Result], always: bool = True) -> Result:
        """What `part()` returns. It may look at fixed tensors alone, and at what earlier parts of the step returned.

        One that is not `always` a part of the step may not have run in the steps before: as it stands it runs here first.
        """
        self._met[name] += 1
        if not always and self._met[name] <= EAGER:
            return part()
        recording = self._recordings.get(name) or self._recorder.recording_of(part)
        if recording is None:
            return part()
        self._recordings[name] = recording
        result: Result
        result, launch = recording
        launch()
        return result

    def fixed(self, name: str, given: Tensor) -> Tensor:
        """A tensor with the same values, in the place where the parts look for it."""
        if name not in self._fixed:
            self._fixed[name] = torch.empty_like(given)
        return self._fixed[name].copy_(given)


class Recordings:
    """Those of one trainer, by kind of step: steps of a kind launch the same on tensors of the same shapes."""

    def __init__(self, record: Record) -> None:
        self._recorder = _Recorder(record)
        self._kept: dict[Hashable, Recorded] = {}
        self._met: Counter[Hashable] = Counter()

    def of(self, kind: Hashable) -> Recorded | None:
        """What to run a step of a kind by; None where it runs as it stands, as one does of the kind None."""
        if self._recorder.record is None:
            self._kept.clear()  # nothing launches them any more, and each keeps memory of the GPU
        if self._recorder.record is None or kind is None or phases.recording():
            return None
        if kind not in self._kept:
            self._met[kind] += 1
            if self._met[kind] <= EAGER:
                return None
            if len(self._kept) == MOST:
                self._kept.pop(next(iter(self._kept)))
            self._kept[kind] = Recorded(self._recorder)
        self._kept[kind] = self._kept.pop(kind)  # the one that has been met least recently goes first
        return self._kept[kind]


def on_cuda(device: torch.device) -> Record:
    """Records CUDA graphs on a GPU, in memory that those of a trainer share: no step needs what another made."""
    pool = torch.cuda.graph_pool_handle()

    def record(part: Callable[[], Any]) -> Recording:
        graph, stream = torch.cuda.CUDAGraph(), stream_for("graphs", device)
        # Other threads read pools and write states meanwhile, which is none of the graph's.
        local = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        # cuBLAS keeps a workspace for each stream: one from the memory of another trainer's graphs, which are gone, makes
        # the next recording fail.
        torch._C._cuda_clearCublasWorkspaces()
        with torch.cuda.device(device):
            before = torch.cuda.current_stream(device)
            try:
                with local:
                    result = part()
            finally:
                # torch does not go back to it where recording fails. Outside this GPU would become the current one.
                torch.cuda.set_stream(before)
        return result, graph.replay

    return record
