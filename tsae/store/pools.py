"""Where the pools of a training lie, and how its batches are made of them: in memory, or on the GPU that trains.

A step on a GPU takes a few milliseconds, less than the processor needs to gather its batch: 8,192 pairs of width 2,304
are 75 MB of bfloat16, scattered over a pool. So a pool that fits is on the GPU, which gathers them in a tenth of a
millisecond; of any other the batches are gathered ahead of need, and copied while the GPU computes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from tsae.runtime.space import free_on_gpu
from tsae.runtime.streams import stream_for
from tsae.store.reader import Store, uninitialised

BATCHES_AHEAD = 3
SCRATCH_BYTES = 512 * 1024
MOST_FREE = 8
SPARE = 16
BESIDE = 12
"""Bytes of a position beside its activation: its pair of rows and its document."""
MOST_OF_FREE = 0.5
"""Share of a GPU's free memory that pools may take: the other is for what the steps need."""


class Pools:
    """In the machine's memory; batches are float32 there, gathered by a thread of their own."""

    ahead = BATCHES_AHEAD
    """Batches that are made before they are needed."""

    def __init__(self, store: Store, sequences: int) -> None:
        """`sequences` is what a pool has, more or less."""
        self._store, self._sequences, self._batches = store, sequences, Recycled()

    def buffer(self, sequences: int, spare: Tensor | None) -> Tensor:
        """[≥ `sequences`, L, D] in the store's dtype, to be filled: `spare` where that is large enough."""
        if spare is not None and len(spare) >= sequences:
            return spare
        return self._empty(with_spare(max(sequences, self._sequences)))

    def _empty(self, sequences: int) -> Tensor:
        return self._store.empty(sequences)

    def fill(self, place: Tensor, read: Callable[[Tensor], None]) -> Tensor:
        """Let `read` fill a part of a buffer; returns what it read, in the machine's memory."""
        read(place)
        return place

    def table(self, values: np.ndarray) -> Tensor:
        """What goes with a buffer that has been filled, beside it."""
        return torch.from_numpy(values)

    def batch(self, activations: Tensor, document: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """[n, slots, D] of `activations` [R, D] at `rows` [n, slots], and `document` [R] of the first of them [n]."""
        flat, width = rows.flatten(), activations.shape[1]
        batch = self._batches.take((len(flat), width))
        scratch = uninitialised((max(1, SCRATCH_BYTES // (width * activations.itemsize)), width), activations.dtype)
        # A piece at a time, so that what is gathered is still in the processor's cache when it is widened.
        for begin in range(0, len(flat), len(scratch)):
            piece = flat[begin : begin + len(scratch)]
            gathered = torch.index_select(activations, 0, piece, out=scratch[: len(piece)])
            batch[begin : begin + len(piece)] = gathered
        return batch.view(*rows.shape, -1), document.index_select(0, rows[:, 0])

    def received(self, batch: Tensor, document: Tensor) -> tuple[Tensor, Tensor]:
        """A batch that was made ahead, when it is needed."""
        return batch, document


class StagedPools(Pools):
    """In the machine's memory; batches are gathered in the store's dtype, and are on a GPU when they are needed."""

    def __init__(self, store: Store, sequences: int, device: torch.device) -> None:
        super().__init__(store, sequences)
        self._device, self._stream = device, _stream(device)

    def batch(self, activations: Tensor, document: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        gathered = _pinned((rows.numel(), activations.shape[1]), self._store.dtype, self._device)
        torch.index_select(activations, 0, rows.flatten(), out=gathered)
        with _on(self._stream):
            batch = gathered.to(self._device, non_blocking=True).view(*rows.shape, -1)
            documents = document.index_select(0, rows[:, 0]).to(self._device)
        _wait(self._stream)
        return batch, documents

    def received(self, batch: Tensor, document: Tensor) -> tuple[Tensor, Tensor]:
        if self._stream is not None:
            for part in (batch, document):  # whose memory is the copies', and must not serve the next one too soon
                part.record_stream(torch.cuda.current_stream(self._device))
        return batch, document


class GpuPools(Pools):
    """On a GPU, which gathers a batch, in the store's dtype, when it is needed; the copies there have a stream of their own."""

    ahead = 0

    def __init__(self, store: Store, sequences: int, device: torch.device) -> None:
        super().__init__(store, sequences)
        self._device, self._stream = device, _stream(device)
        self._training = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def buffer(self, sequences: int, spare: Tensor | None) -> Tensor:
        buffer = super().buffer(sequences, spare)
        self._after_training()
        return buffer

    def _empty(self, sequences: int) -> Tensor:
        shape = (sequences, self._store.context_length, self._store.activation_dim)
        return torch.empty(shape, dtype=self._store.dtype, device=self._device)

    def fill(self, place: Tensor, read: Callable[[Tensor], None]) -> Tensor:
        part = _pinned(place.shape, self._store.dtype, self._device)
        read(part)
        with _on(self._stream):
            place.copy_(part, non_blocking=True)  # while the next part is read
        return part

    def table(self, values: np.ndarray) -> Tensor:
        there = torch.empty(values.shape, dtype=torch.from_numpy(values).dtype, device=self._device)
        self._after_training()
        with _on(self._stream):
            there.copy_(torch.from_numpy(values))
        _wait(self._stream)
        return there

    def batch(self, activations: Tensor, document: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        gathered = activations.index_select(0, rows.flatten())
        return gathered.view(*rows.shape, -1), document.index_select(0, rows[:, 0])

    def _after_training(self) -> None:
        """Copy only once the steps that were launched so far are done with the memory that is copied to."""
        if self._stream is not None and self._training is not None:
            self._stream.wait_stream(self._training)


def pools_for(device: torch.device | None, store: Store, sequences: int, pools: int, spoken_for: int = 0) -> Pools:
    """The fastest of those that a training on `device` (None: this machine's memory) has room for.

    So many `pools` of `sequences` contexts are there at a time, and no more than half of what a GPU has free is taken for
    them, without the bytes that are `spoken_for`.
    """
    if device is None or device.type != "cuda":
        return Pools(store, sequences)
    position = store.activation_dim * store.dtype.itemsize + BESIDE
    wanted = pools * with_spare(sequences) * store.context_length * position
    fits = wanted <= MOST_OF_FREE * (free_on_gpu(device) - spoken_for)
    return (GpuPools if fits else StagedPools)(store, sequences, device)


def with_spare(sequences: int) -> int:
    """A little more than a pool has, since the next one may be larger."""
    return sequences + sequences // SPARE


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    return stream_for("pools", device) if device.type == "cuda" else None


def _on(stream: torch.cuda.Stream | None) -> AbstractContextManager[None]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def _wait(stream: torch.cuda.Stream | None) -> None:
    if stream is not None:
        stream.synchronize()


def _pinned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory from which a GPU copies without the processor; torch does not give it away before a copy from it is done."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


class Recycled:
    """Memory for batches that serves again once no tensor refers to it: new pages cost as much as filling them."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """An uninitialised float32 tensor."""
        fitting = self._free and self._free[-1].shape == shape
        memory = self._free.pop() if fitting else np.empty(shape, np.float32)
        # torch holds this very object until the last view of the tensor is gone.
        held = memory[:]
        weakref.finalize(held, self._give_back, memory).atexit = False
        return torch.from_numpy(held)

    def _give_back(self, memory: np.ndarray) -> None:
        if len(self._free) < MOST_FREE:
            self._free.append(memory)
