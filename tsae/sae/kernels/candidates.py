"""The list of pre-activations above guesses.

Shapes: N rows, D activation_dim, F dict_size, n candidates.
"""

# Triton gives kernels their own types of arguments.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from tsae.sae.kernels.launch import on_device_of

LATENTS = 1024
"""Pre-activations that a program looks at, at a time."""
FIRST_ROOM = 64
"""Entries per row that the first list has room for."""

# The list of entries above guesses needs no atomics and does not wait for the GPU: one program takes one row; a first
# pass counts its entries, a second writes them from where the rows before it end. So the list ascends by row and latent,
# and is the same in every run. In the kernels below a `row` is counted within its block, and `first_row` is the number
# of the block's first row.


@triton.jit
def _entries(block, row, latent, width, stride, guess, BITS: tl.constexpr):
    """Which of a row's latents are to be listed, and their values; of bits those are none."""
    if BITS:
        word = tl.load(block + row * stride + latent // 32, mask=latent < width, other=0)
        chosen = (word >> (latent % 32)) & 1
        value = tl.zeros_like(chosen).to(tl.float32)
    else:
        value = tl.load(block + row * stride + latent, mask=latent < width, other=float("-inf")).to(tl.float32)
        chosen = (value > guess).to(tl.int32)
    return chosen, value


@triton.jit
def _count(block, counts, guesses, first_row, width, stride, BITS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    guess = tl.load(guesses + first_row + row)
    found = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, width, BLOCK):
        latent = first + tl.arange(0, BLOCK)
        chosen, _ = _entries(block, row, latent, width, stride, guess, BITS)
        found += chosen
    tl.store(counts + row, tl.sum(found, axis=0).to(tl.int64))


@triton.jit
def _write(
    block, starts, rows, latents, values, capacity, guesses, first_row, width, stride, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    guess = tl.load(guesses + first_row + row)
    place = tl.load(starts + row)
    for first in range(0, width, BLOCK):
        latent = first + tl.arange(0, BLOCK)
        chosen, value = _entries(block, row, latent, width, stride, guess, BITS)
        target = place + tl.cumsum(chosen, axis=0) - 1
        fits = (chosen > 0) & (target < capacity)
        tl.store(rows + target, first_row + row, mask=fits)
        tl.store(latents + target, latent.to(tl.int64), mask=fits)
        if not BITS:
            tl.store(values + target, value, mask=fits)
        place += tl.sum(chosen, axis=0)


class Candidates:
    """Lists entries above guesses; remembers how long the lists were (`capacity`), since room is made before they are counted."""

    def __init__(self) -> None:
        self.capacity = 0

    def all(self, guesses: Tensor, fill: Callable[[List], None]) -> List:
        """All that `fill` adds, which is asked again if there was not enough room. It is of rows with these guesses [N]."""
        while True:
            listed = self.list(guesses, fill)
            # The only place that waits for the GPU.
            count = int(listed.found)
            if count <= listed.capacity:
                return listed.shortened(count)
            self.make_room(count)

    def list(self, guesses: Tensor, fill: Callable[[List], None], least: int = 0) -> List:
        """The same, perhaps not all of them: as many as there was room for, which is `least` at least."""
        self.capacity = max(self.capacity, FIRST_ROOM * len(guesses), least)
        listed = List(self.capacity, guesses)
        fill(listed)
        return listed

    def make_room(self, found: int) -> None:
        """Have room for so many, and some more, from now on."""
        self.capacity = max(self.capacity, found + found // 4)


class List:
    """Room for `capacity` entries, empty at first, ascending by row and latent; what is found beyond that is counted, not kept."""

    def __init__(self, capacity: int, guesses: Tensor) -> None:
        self.capacity, self.guesses, self.next_row = capacity, guesses, 0
        device = guesses.device
        self.found = torch.zeros(1, dtype=torch.int64, device=device)
        self._ends: list[Tensor] = []
        self.rows = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.latents = torch.full_like(self.rows, -1)
        self.values = torch.empty(capacity, device=device)

    def add(self, block: Tensor, width: int) -> None:
        """List what is above the guesses in the next rows: pre-activations [n, ≥ width], or bits of what is, int32 [n, W]."""
        if len(block) == 0:
            return
        counts = torch.empty(len(block), dtype=torch.int64, device=block.device)
        shape = (self.guesses, self.next_row, width, block.stride(0), block.dtype == torch.int32)
        grid, tile = (len(block),), min(LATENTS, triton.next_power_of_2(width))
        with on_device_of(block):
            _count[grid](block, counts, *shape, tile)
        ends = counts.cumsum(0) + self.found
        with on_device_of(block):
            _write[grid](block, ends - counts, self.rows, self.latents, self.values, self.capacity, *shape, tile)
        self.found = ends[-1:]
        self._ends.append(ends)
        self.next_row += len(block)

    def ends(self) -> Tensor:
        """Where the entries of each row end [N], were there room for all."""
        return self._ends[0] if len(self._ends) == 1 else torch.cat(self._ends)

    def shortened(self, count: int) -> List:
        """The first entries alone."""
        self.rows, self.latents, self.values = (each[:count] for each in (self.rows, self.latents, self.values))
        return self
