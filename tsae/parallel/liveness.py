"""Signs of life between processes: one that dies, or is asked to leave, is noticed while the others work alone."""

from __future__ import annotations

import os
import sys
import threading

import torch
import torch.distributed as dist

from tsae.parallel.group import Group, lost
from tsae.runtime import preemption
from tsae.runtime.errors import TsaeError

BEAT_SECONDS = 1.0
GRACE_SECONDS = 10.0
"""How long the main thread has to notice a loss by itself before the process is ended where it stands."""
LOST = 2
"""Exit code of a process that ends because another one did."""


class Heartbeat:
    """A thread that meets those of the other processes about every second until all have called `stop`.

    `beats` is a process group of its own, whose timeout bounds how long a process may be silent. A connection that
    breaks ends this process within `GRACE_SECONDS`, even if it waits inside a GPU's collective.
    """

    def __init__(self, group: Group, beats: dist.ProcessGroup) -> None:
        self._group, self._beats = group, beats
        self._leaving, self._ended = threading.Event(), threading.Event()
        self._failure: TsaeError | None = None
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Wait until the other processes call this, too. Raises TsaeError if one ends instead."""
        self._leaving.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def abandon(self) -> None:
        """Take no more notice of the others, once they have met a last time: this process is on its way out."""
        self._leaving.set()
        self._ended.set()
        self._thread.join(GRACE_SECONDS)

    def _beat(self) -> None:
        try:
            while not self._ended.is_set():
                signs = torch.tensor([not self._leaving.is_set(), preemption.requested()], dtype=torch.uint8)
                dist.all_reduce(signs, dist.ReduceOp.MAX, group=self._beats)
                some_stay, some_leave = signs.tolist()
                if some_leave:
                    preemption.request()
                if not some_stay:
                    return
                self._leaving.wait(BEAT_SECONDS)
        except RuntimeError as error:
            self._failure = lost(self._group.rank, self._group.world, error)
            self._end(self._failure)

    def _end(self, failure: TsaeError) -> None:
        """End the process, unless its main thread comes to its own end."""
        if self._leaving.is_set() or self._ended.wait(GRACE_SECONDS):
            return
        print(f"tsae: {failure}", file=sys.stderr, flush=True)
        os._exit(LOST)
