"""Triton kernels that list the entries of pre-activations above guesses, in order and without waiting for the GPU.

One program takes one row. A first pass counts its entries, a second writes them from where the rows before it end, so
the list ascends by row and latent, needs no atomics, and is the same in every run.
Shapes: N rows, F dict_size, n candidates.
"""

# Triton gives kernels their own types of arguments.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from tsae.sae.kernels.launch import on_device_of
from tsae.sae.kernels.margin import Margin

LATENTS = 1024
"""Pre-activations that a program looks at, at a time."""
FIRST_ROOM = 64
"""Entries per row that the first list has room for."""


# In the kernels below a `row` is counted within its block, and `first_row` is the number of the block's first row.


@triton.jit
def _pre_activation(block, row, latent, width, stride, bias, MARGIN: tl.constexpr):
    value = tl.load(block + row * stride + latent, mask=latent < width, other=float("-inf"))
    if MARGIN:
        value += tl.load(bias + latent, mask=latent < width, other=0.0)
    return value


@triton.jit
def _upper_bound(value, row, latent, width, row_norms, row_errors, latent_norms, latent_errors, MARGIN: tl.constexpr):
    if MARGIN:
        norm = tl.load(latent_norms + latent, mask=latent < width, other=0.0)
        error = tl.load(latent_errors + latent, mask=latent < width, other=0.0)
        value += tl.load(row_norms + row) * error + tl.load(row_errors + row) * norm
    return value


@triton.jit
def _count(
    block, bias, row_norms, row_errors, latent_norms, latent_errors, counts,
    guesses, first_row, width, stride, MARGIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    guess = tl.load(guesses + first_row + row)
    found = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, width, BLOCK):
        latent = first + tl.arange(0, BLOCK)
        value = _pre_activation(block, row, latent, width, stride, bias, MARGIN)
        upper = _upper_bound(
            value, first_row + row, latent, width, row_norms, row_errors, latent_norms, latent_errors, MARGIN
        )
        found += (upper > guess).to(tl.int32)
    tl.store(counts + row, tl.sum(found, axis=0).to(tl.int64))


@triton.jit
def _write(
    block, bias, row_norms, row_errors, latent_norms, latent_errors, starts, rows, latents, values, capacity,
    guesses, first_row, width, stride, MARGIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    guess = tl.load(guesses + first_row + row)
    place = tl.load(starts + row)
    for first in range(0, width, BLOCK):
        latent = first + tl.arange(0, BLOCK)
        value = _pre_activation(block, row, latent, width, stride, bias, MARGIN)
        upper = _upper_bound(
            value, first_row + row, latent, width, row_norms, row_errors, latent_norms, latent_errors, MARGIN
        )
        chosen = (upper > guess).to(tl.int32)
        target = place + tl.cumsum(chosen, axis=0) - 1
        fits = (chosen > 0) & (target < capacity)
        tl.store(rows + target, first_row + row, mask=fits)
        tl.store(latents + target, latent.to(tl.int64), mask=fits)
        tl.store(values + target, value, mask=fits)
        place += tl.sum(chosen, axis=0)


class Candidates:
    """Lists entries above guesses; remembers how long the lists were, since room is made before they are counted."""

    def __init__(self) -> None:
        self._capacity = 0

    def above(
        self,
        guesses: Tensor,
        blocks: Callable[[], Iterable[Tensor]],
        width: int,
        margin: Margin | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Row, latent and value [n] of the pre-activations above their row's guess [N], ascending.

        `blocks` makes pre-activations: [rows, ≥ width] one after the other, once more if there was not enough room; a
        row's guess may still change until its block is there. With a margin the blocks are products without bias, and
        what may be above the guess is listed with its product plus bias.
        """
        self._capacity = max(self._capacity, FIRST_ROOM * len(guesses))
        while True:
            listed = _List(self._capacity, guesses)
            for block in blocks():
                listed.add(block, width, margin)
            # The only place that waits for the GPU.
            count = int(listed.found)
            if count <= self._capacity:
                return listed.rows[:count], listed.latents[:count], listed.values[:count]
            self._capacity = count + count // 4


class _List:
    """Room for `capacity` entries; what is found beyond that is counted, not kept."""

    def __init__(self, capacity: int, guesses: Tensor) -> None:
        self.capacity, self.guesses, self.next_row = capacity, guesses, 0
        device = guesses.device
        self.found = torch.zeros(1, dtype=torch.int64, device=device)
        self.rows = torch.empty(capacity, dtype=torch.int64, device=device)
        self.latents = torch.empty_like(self.rows)
        self.values = torch.empty(capacity, device=device)

    def add(self, block: Tensor, width: int, margin: Margin | None) -> None:
        """List what is above the guesses in the next rows."""
        if len(block) == 0:
            return
        counts = torch.empty(len(block), dtype=torch.int64, device=block.device)
        # Without a margin these are never read, but kernels want pointers all the same.
        given = margin or Margin(block, block, block, block, block)
        shape = (self.guesses, self.next_row, width, block.stride(0), margin is not None)
        grid, tile = (len(block),), min(LATENTS, triton.next_power_of_2(width))
        # Fused multiply-adds could make the two passes disagree about an entry at the very edge.
        with on_device_of(block):
            _count[grid](block, *given, counts, *shape, tile, enable_fp_fusion=False)
        ends = counts.cumsum(0) + self.found
        own = (ends - counts, self.rows, self.latents, self.values, self.capacity)
        with on_device_of(block):
            _write[grid](block, *given, *own, *shape, tile, enable_fp_fusion=False)
        self.found = ends[-1:]
        self.next_row += len(block)
