"""The list of pre-activations above guesses.

Latents are of budgets, runs of them that follow each other, and each row has a guess for every budget.

Shapes: N rows, D activation_dim, F dict_size, G budgets, n candidates.
"""

# Triton gives kernels their own types of arguments.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tsae.sae.kernels.launch import on_device_of
from tsae.sae.kernels.sums import bounds

TILE = 1024
"""Pre-activations, or words of bits, that a program looks at, at a time."""
FIRST_ROOM = 64
"""Entries per row that the first list has room for."""

# The list of entries above guesses needs no atomics and does not wait for the GPU: one program takes one row; a first
# pass counts its entries, a second writes them from where the rows before it end. So the list ascends by row and latent,
# and is the same in every run. In the kernels below a `row` is counted within its block, and `first_row` is the number
# of the block's first row.


@triton.jit
def of_budgets(table, place, stride, latent, starts, n_budgets):
    """What a table has at a place for the budget of each latent; the next budget's is `stride` numbers on."""
    found = tl.load(table + place) + tl.zeros_like(latent).to(tl.float32)
    for budget in range(1, n_budgets):
        found = tl.where(latent >= tl.load(starts + budget), tl.load(table + place + budget * stride), found)
    return found


@triton.jit
def _count(block, counts, guesses, starts, n_budgets, first_row, width, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    found = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, width, BLOCK):
        latent = first + tl.arange(0, BLOCK)
        guess = of_budgets(guesses, (first_row + row) * n_budgets, 1, latent, starts, n_budgets)
        value = tl.load(block + row * stride + latent, mask=latent < width, other=float("-inf")).to(tl.float32)
        found += (value > guess).to(tl.int32)
    tl.store(counts + row, tl.sum(found, axis=0).to(tl.int64))


@triton.jit
def _write(
    block, counts, ends, rows, latents, values, capacity, guesses, starts, n_budgets, first_row, width, stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(ends + row) - tl.load(counts + row)
    for first in range(0, width, BLOCK):
        latent = first + tl.arange(0, BLOCK)
        guess = of_budgets(guesses, (first_row + row) * n_budgets, 1, latent, starts, n_budgets)
        value = tl.load(block + row * stride + latent, mask=latent < width, other=float("-inf")).to(tl.float32)
        chosen = (value > guess).to(tl.int32)
        target = place + tl.cumsum(chosen, axis=0) - 1
        fits = (chosen > 0) & (target < capacity)
        tl.store(rows + target, first_row + row, mask=fits)
        tl.store(latents + target, latent.to(tl.int64), mask=fits)
        tl.store(values + target, value, mask=fits)
        place += tl.sum(chosen, axis=0)


# Of bits, 32 latents are a word, and few words have any: a row that lists 50 of 16,384 latents has 512 words, of which
# fifty have one bit, one or two have two. So words are looked at, not latents, and the bits of all words are taken out
# one by one at the same time, as often as the fullest has some.


@triton.jit
def _bits(word):
    """How many bits are set: added up within pairs, fours and bytes, then over the bytes."""
    word = word.to(tl.uint32, bitcast=True)
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _count_bits(block, counts, words, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    found = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, words, BLOCK):
        column = first + tl.arange(0, BLOCK)
        found += _bits(tl.load(block + row * words + column, mask=column < words, other=0))
    tl.store(counts + row, tl.sum(found, axis=0).to(tl.int64))


@triton.jit
def _write_bits(block, counts, ends, rows, latents, capacity, first_row, words, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(ends + row) - tl.load(counts + row)
    for first in range(0, words, BLOCK):
        column = first + tl.arange(0, BLOCK)
        word = tl.load(block + row * words + column, mask=column < words, other=0)
        number = _bits(word)
        target = place + tl.cumsum(number, axis=0) - number
        place += tl.sum(number, axis=0)
        for _ in range(tl.max(number, axis=0)):
            fits = (word != 0) & (target < capacity)
            lowest = _bits((word & -word) - 1)
            tl.store(rows + target, first_row + row, mask=fits)
            tl.store(latents + target, (column * 32 + lowest).to(tl.int64), mask=fits)
            word &= word - 1
            target += 1


class Candidates:
    """Lists entries above guesses; remembers how long the lists were (`capacity`), since room is made before they are counted."""

    def __init__(self) -> None:
        self.capacity = 0

    def all(self, guesses: Tensor, width: int, fill: Callable[[List], None]) -> List:
        """All that `fill` adds, which is asked again if there was not enough room: of rows with these guesses [N] for F = `width`."""
        while True:
            listed = self.list(guesses[:, None], [slice(0, width)], fill)
            # The only place that waits for the GPU.
            count = int(listed.found)
            if count <= listed.capacity:
                return listed.shortened(count)
            self.make_room(count)

    def list(self, guesses: Tensor, budgets: Sequence[slice], fill: Callable[[List], None], least: int = 0) -> List:
        """The same, perhaps not all of them: as many as there was room for, which is `least` at least.

        The guesses [N, G] are for the latents of each of the budgets.
        """
        self.capacity = max(self.capacity, FIRST_ROOM * len(guesses), least)
        listed = List(self.capacity, guesses, bounds(budgets, guesses.device))
        fill(listed)
        return listed

    def make_room(self, found: int) -> None:
        """Have room for so many, and some more, from now on."""
        self.capacity = max(self.capacity, found + found // 4)


class List:
    """Room for `capacity` entries that ascend by row and latent; what is found beyond that is counted, not kept.

    Beyond what is found nothing has been written.
    """

    def __init__(self, capacity: int, guesses: Tensor, starts: Tensor) -> None:
        assert guesses.is_contiguous()
        self.capacity, self.guesses, self.starts, self.next_row = capacity, guesses, starts, 0
        self._ends: list[Tensor] = []
        self.rows = torch.empty(capacity, dtype=torch.int64, device=guesses.device)
        self.latents = torch.empty_like(self.rows)
        self.values = torch.empty(capacity, device=guesses.device)

    @property
    def found(self) -> Tensor:
        """How many entries there were [1]."""
        return self._ends[-1][-1:] if self._ends else self.rows.new_zeros(1)

    def add(self, block: Tensor, width: int) -> None:
        """List what is above the guesses in the next rows: pre-activations [n, ≥ width], or bits of what is, int32 [n, W]."""
        if len(block) == 0:
            return
        counts = torch.empty(len(block), dtype=torch.int64, device=block.device)
        grid, bits = (len(block),), block.dtype == torch.int32
        budgets = self.guesses, self.starts, self.guesses.shape[1]
        shape: tuple[Any, ...] = (*budgets, self.next_row, width, block.stride(0))
        tile = min(TILE, triton.next_power_of_2(block.shape[1] if bits else width))
        with on_device_of(block):
            if bits:
                assert block.is_contiguous()
                _count_bits[grid](block, counts, block.shape[1], tile)
            else:
                _count[grid](block, counts, *shape, tile)
        ends = counts.cumsum(0)
        if self._ends:
            ends += self.found
        place = (counts, ends, self.rows, self.latents)
        with on_device_of(block):
            if bits:
                _write_bits[grid](block, *place, self.capacity, self.next_row, block.shape[1], tile)
            else:
                _write[grid](block, *place, self.values, self.capacity, *shape, tile)
        self._ends.append(ends)
        self.next_row += len(block)

    def ends(self) -> Tensor:
        """Where the entries of each row end [N], were there room for all."""
        return self._ends[0] if len(self._ends) == 1 else torch.cat(self._ends)

    def shortened(self, count: int) -> List:
        """The first entries alone."""
        self.rows, self.latents, self.values = (each[:count] for each in (self.rows, self.latents, self.values))
        return self
