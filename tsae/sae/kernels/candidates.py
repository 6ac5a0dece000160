"""Rounding to bfloat16, and the list of pre-activations above guesses.

Shapes: N rows, D activation_dim, F dict_size, n candidates.
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

ROUNDED = 1024
"""Columns that a program rounds at a time."""
LATENTS = 1024
"""Pre-activations that a program looks at, at a time."""
FIRST_ROOM = 64
"""Entries per row that the first list has room for."""

Margin = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float]
"""What makes a screened product an upper bound of the true one: bias [F], added to every row; norms and errors of rows
[N] and of latents [F]; how far a product in bfloat16 can be from what was rounded to it, relative to itself. Before that
it differs by row_norm · latent_error + row_error · latent_norm at most."""


@triton.jit
def _round_rows(matrix, rounded, norms, errors, width, stride, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    square = tl.zeros((BLOCK_D,), tl.float32)
    rounded_square = tl.zeros((BLOCK_D,), tl.float32)
    error = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        value = tl.load(matrix + row * stride + d, mask=d < width, other=0.0)
        low = value.to(tl.bfloat16)
        tl.store(rounded + row * width + d, low, mask=d < width)
        near = low.to(tl.float32)
        square += value * value
        rounded_square += near * near
        error += (value - near) * (value - near)
    tl.store(norms + row, tl.sqrt(tl.maximum(tl.sum(square, axis=0), tl.sum(rounded_square, axis=0))))
    tl.store(errors + row, tl.sqrt(tl.sum(error, axis=0)))


def round_rows(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [n, D] in bfloat16; the larger norm of each row before and after [n]; the norm of the difference [n]."""
    assert matrix.stride(1) == 1
    n_rows, width = matrix.shape
    rounded = torch.empty(n_rows, width, dtype=torch.bfloat16, device=matrix.device)
    norms, errors = matrix.new_empty(n_rows), matrix.new_empty(n_rows)
    if n_rows:
        block = min(ROUNDED, triton.next_power_of_2(width))
        with on_device_of(matrix):
            _round_rows[(n_rows,)](matrix, rounded, norms, errors, width, matrix.stride(0), block)
    return rounded, norms, errors


# The list of entries above guesses needs no atomics and does not wait for the GPU: one program takes one row; a first
# pass counts its entries, a second writes them from where the rows before it end. So the list ascends by row and latent,
# and is the same in every run. In the kernels below a `row` is counted within its block, and `first_row` is the number
# of the block's first row.


@triton.jit
def _value(block, row, latent, width, stride):
    return tl.load(block + row * stride + latent, mask=latent < width, other=float("-inf")).to(tl.float32)


@triton.jit
def _upper_bound(
    value, row, latent, width, bias, row_norms, row_errors, latent_norms, latent_errors,
    MARGIN: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    if MARGIN:
        norm = tl.load(latent_norms + latent, mask=latent < width, other=0.0)
        error = tl.load(latent_errors + latent, mask=latent < width, other=0.0)
        value += tl.where(latent < width, tl.abs(value) * ROUNDING, 0.0)
        value += tl.load(bias + latent, mask=latent < width, other=0.0)
        value += tl.load(row_norms + row) * error + tl.load(row_errors + row) * norm
    return value


@triton.jit
def _count(
    block, bias, row_norms, row_errors, latent_norms, latent_errors, counts,
    guesses, first_row, width, stride, MARGIN: tl.constexpr, BLOCK: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    guess = tl.load(guesses + first_row + row)
    found = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, width, BLOCK):
        latent = first + tl.arange(0, BLOCK)
        upper = _upper_bound(
            _value(block, row, latent, width, stride), first_row + row, latent, width,
            bias, row_norms, row_errors, latent_norms, latent_errors, MARGIN, ROUNDING,
        )  # fmt: skip
        found += (upper > guess).to(tl.int32)
    tl.store(counts + row, tl.sum(found, axis=0).to(tl.int64))


@triton.jit
def _write(
    block, bias, row_norms, row_errors, latent_norms, latent_errors, starts, rows, latents, values, capacity,
    guesses, first_row, width, stride, MARGIN: tl.constexpr, BLOCK: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    guess = tl.load(guesses + first_row + row)
    place = tl.load(starts + row)
    for first in range(0, width, BLOCK):
        latent = first + tl.arange(0, BLOCK)
        value = _value(block, row, latent, width, stride)
        upper = _upper_bound(
            value, first_row + row, latent, width,
            bias, row_norms, row_errors, latent_norms, latent_errors, MARGIN, ROUNDING,
        )  # fmt: skip
        chosen = (upper > guess).to(tl.int32)
        target = place + tl.cumsum(chosen, axis=0) - 1
        fits = (chosen > 0) & (target < capacity)
        tl.store(rows + target, first_row + row, mask=fits)
        tl.store(latents + target, latent.to(tl.int64), mask=fits)
        tl.store(values + target, value, mask=fits)
        place += tl.sum(chosen, axis=0)


class Candidates:
    """Lists entries above guesses; remembers how long the lists were (`capacity`), since room is made before they are counted."""

    def __init__(self) -> None:
        self.capacity = 0

    def above(
        self,
        guesses: Tensor,
        blocks: Callable[[], Iterable[Tensor]],
        width: int,
        margin: Margin | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Row, latent and value [n] of the pre-activations above their row's guess [N], ascending.

        `blocks` makes pre-activations: [rows, ≥ width] one after the other, once more if there was not enough room; a
        row's guess may still change until its block is there. With a margin the blocks are products in bfloat16,
        without bias; what may be above the guess is listed with its product.
        """
        while True:
            listed = self.list(guesses, blocks(), width, margin)
            # The only place that waits for the GPU.
            count = int(listed.found)
            if count <= listed.capacity:
                return listed.rows[:count], listed.latents[:count], listed.values[:count]
            self.make_room(count)

    def list(
        self, guesses: Tensor, blocks: Iterable[Tensor], width: int, margin: Margin | None = None, least: int = 0
    ) -> List:
        """The same, perhaps not all of them: as many as there was room for, which is `least` at least."""
        self.capacity = max(self.capacity, FIRST_ROOM * len(guesses), least)
        listed = List(self.capacity, guesses)
        for block in blocks:
            listed.add(block, width, margin)
        return listed

    def make_room(self, found: int) -> None:
        """Have room for so many, and some more, from now on."""
        self.capacity = max(self.capacity, found + found // 4)


class List:
    """Room for `capacity` entries, empty at first; what is found beyond that is counted, not kept."""

    def __init__(self, capacity: int, guesses: Tensor) -> None:
        self.capacity, self.guesses, self.next_row = capacity, guesses, 0
        device = guesses.device
        self.found = torch.zeros(1, dtype=torch.int64, device=device)
        self.rows = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.latents = torch.full_like(self.rows, -1)
        self.values = torch.empty(capacity, device=device)

    def add(self, block: Tensor, width: int, margin: Margin | None) -> None:
        """List what is above the guesses in the next rows."""
        if len(block) == 0:
            return
        counts = torch.empty(len(block), dtype=torch.int64, device=block.device)
        # Without a margin these are never read, but kernels want pointers all the same.
        *given, rounding = margin or (*(block,) * 5, 0.0)
        shape = (self.guesses, self.next_row, width, block.stride(0), margin is not None)
        grid, tile = (len(block),), min(LATENTS, triton.next_power_of_2(width))
        # Fused multiply-adds could make the two passes disagree about an entry at the very edge.
        with on_device_of(block):
            _count[grid](block, *given, counts, *shape, tile, rounding, enable_fp_fusion=False)
        ends = counts.cumsum(0) + self.found
        room = (ends - counts, self.rows, self.latents, self.values, self.capacity)
        with on_device_of(block):
            _write[grid](block, *given, *room, *shape, tile, rounding, enable_fp_fusion=False)
        self.found = ends[-1:]
        self.next_row += len(block)
