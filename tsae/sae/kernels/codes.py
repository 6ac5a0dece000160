"""Codes from lists of candidates, and what is asked of codes row by row; nothing of it waits for the GPU.

A list is sorted by row, so that a program has the candidates of one row. Which of them are kept is counted, and the counts
of the rows before it say where a row's entries begin: a code that is sorted, too, and the same in every run.

Shapes: N rows, D activation_dim, F dict_size, c places of a list, n entries of a code, G groups of latents.
"""

# Triton gives kernels their own types of arguments.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tsae.sae.kernels.candidates import List
from tsae.sae.kernels.launch import on_device_of
from tsae.sae.kernels.sums import ENTRIES, bounds, products, tile_width

OF_ROW = 32
"""Candidates, or entries, of a row that a program has at a time: one for each thread."""
OPTIONS = {"num_warps": 1}

Code = tuple[Tensor, Tensor, Tensor, Tensor]
"""Offsets [N + 1], latents, values and rows [n], as of `SparseCode`; empty entries come last."""


@triton.jit
def _refine(
    rows, latents, x, matrix, bias, guess, out, count, width, x_stride, matrix_stride,
    BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    latent = tl.load(latents + entry, mask=entry < count, other=-1)
    live = latent >= 0
    value = products(rows, entry, latent, x, matrix, width, x_stride, matrix_stride, BLOCK_E, BLOCK_D)
    value += tl.load(bias + latent, mask=live, other=0.0)
    value = tl.where(live & (value > tl.load(guess)), value, float("-inf"))
    tl.store(out + entry, value, mask=entry < count)


def refined(listed: List, x: Tensor, matrix: Tensor, bias: Tensor, guess: Tensor) -> Tensor:
    """The pre-activations x [N, D] · matrix [F, D] + bias [F] of a list's candidates that are above the guess, a scalar → [c].

    What is not is −inf.
    """
    out = torch.empty_like(listed.values)
    width = x.shape[1]
    shape = (len(out), width, x.stride(0), matrix.stride(0), ENTRIES, tile_width(width))
    with on_device_of(out):
        _refine[(triton.cdiv(len(out), ENTRIES),)](listed.rows, listed.latents, x, matrix, bias, guess, out, *shape)
    return out


@triton.jit
def _bounds_of(ends, row, capacity):
    """Where a row's candidates begin and end in a list that has room for so many."""
    start = tl.load(ends + row - 1, mask=row > 0, other=0)
    return tl.minimum(start, capacity), tl.minimum(tl.load(ends + row), capacity)


@triton.jit
def _largest(ends, values, out, k, capacity, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start, stop = _bounds_of(ends, row, capacity)
    for first in range(start, stop, BLOCK):
        place = first + tl.arange(0, BLOCK)
        value = tl.load(values + place, mask=place < stop, other=float("-inf"))
        larger = tl.zeros((BLOCK,), tl.int32)
        for other_first in range(start, stop, BLOCK):
            other_place = other_first + tl.arange(0, BLOCK)
            other = tl.load(values + other_place, mask=other_place < stop, other=float("-inf"))
            before = (other[None, :] > value[:, None]) | (
                (other[None, :] == value[:, None]) & (other_place[None, :] < place[:, None])
            )
            larger += tl.sum(before.to(tl.int32), axis=1)
        tl.store(out + place, tl.where(larger < k, value, float("-inf")), mask=place < stop)


def largest_of_rows(listed: List, values: Tensor, k: int) -> Tensor:
    """`values` [c], but −inf where they are not among the k largest of their row; of equal ones the first are."""
    out = torch.full_like(values, -torch.inf)
    with on_device_of(out):
        _largest[(len(listed.guesses),)](listed.ends(), values, out, k, listed.capacity, OF_ROW, **OPTIONS)
    return out


@triton.jit
def _count_kept(ends, values, cut, counts, n_rows, capacity, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start, stop = _bounds_of(ends, row, capacity)
    least = tl.load(cut)
    kept = tl.zeros((BLOCK,), tl.int32)
    tied = tl.zeros((BLOCK,), tl.int32)
    above = tl.zeros((BLOCK,), tl.int32)
    for first in range(start, stop, BLOCK):
        place = first + tl.arange(0, BLOCK)
        value = tl.load(values + place, mask=place < stop, other=float("-inf"))
        real = value > float("-inf")
        kept += (value > least).to(tl.int32)
        tied += (real & (value == least)).to(tl.int32)
        above += real.to(tl.int32)
    tl.store(counts + row, tl.sum(kept, axis=0).to(tl.int64))
    tl.store(counts + n_rows + row, tl.sum(tied, axis=0).to(tl.int64))
    tl.store(counts + 2 * n_rows + row, tl.sum(above, axis=0).to(tl.int64))


@triton.jit
def _write_kept(
    ends, latents, values, cut, sums, offsets, smallest, code_latents, code_values, code_rows, n_rows, capacity, wanted,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start, stop = _bounds_of(ends, row, capacity)
    least = tl.load(cut)
    # So many of those that are equal to the cut are wanted: those of the first rows.
    ties = wanted - tl.load(sums + n_rows - 1)
    tied = tl.load(sums + n_rows + row - 1, mask=row > 0, other=0)
    target = tl.load(sums + row - 1, mask=row > 0, other=0) + tl.minimum(tied, ties)
    tl.store(offsets + row, target)
    lowest = tl.full((BLOCK,), float("inf"), tl.float32)
    for first in range(start, stop, BLOCK):
        place = first + tl.arange(0, BLOCK)
        value = tl.load(values + place, mask=place < stop, other=float("-inf"))
        tie = ((value > float("-inf")) & (value == least)).to(tl.int64)
        taken = (value > least) | ((tie > 0) & (tied + tl.cumsum(tie, axis=0) <= ties))
        number = taken.to(tl.int64)
        to = target + tl.cumsum(number, axis=0) - 1
        tl.store(code_latents + to, tl.load(latents + place, mask=taken, other=0), mask=taken)
        tl.store(code_values + to, value, mask=taken)
        tl.store(code_rows + to, row, mask=taken)
        lowest = tl.minimum(lowest, tl.where(taken, value, float("inf")))
        tied += tl.sum(tie, axis=0)
        target += tl.sum(number, axis=0)
    tl.store(smallest + row, tl.min(lowest, axis=0))
    if row == n_rows - 1:
        tl.store(offsets + n_rows, target)


def kept(listed: List, values: Tensor, cut: Tensor, wanted: int) -> tuple[Code, Tensor, Tensor]:
    """A code of the candidates whose values [c] are above the cut, a scalar, and of the first that are equal to it.

    `wanted` in all; as many places it has. The smallest value that is kept of each row [N], infinite where there is none;
    and how many candidates are above −inf, [1].
    """
    n_rows, device = len(listed.guesses), values.device
    counts = torch.empty(3, n_rows, dtype=torch.int64, device=device)
    grid, ends = (n_rows,), listed.ends()
    with on_device_of(values):
        _count_kept[grid](ends, values, cut, counts, n_rows, listed.capacity, OF_ROW, **OPTIONS)
    sums = counts.cumsum(dim=1)
    offsets = torch.empty(n_rows + 1, dtype=torch.int64, device=device)
    code, smallest = _empty(wanted, n_rows, values), values.new_empty(n_rows)
    with on_device_of(values):
        _write_kept[grid](
            ends, listed.latents, values, cut, sums, offsets, smallest, *code, n_rows, listed.capacity, wanted, OF_ROW,
            **OPTIONS,
        )  # fmt: skip
    return (offsets, *code), smallest, sums[2, -1:]


def _empty(room: int, n_rows: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, values and rows of empty entries."""
    latents = torch.full((room,), -1, dtype=torch.int64, device=like.device)
    return latents, like.new_zeros(room), torch.full_like(latents, n_rows - 1)


@triton.jit
def _copy_rows(
    offsets, before, together, latents, values, out_latents, out_values, out_rows, first_latent, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(offsets + row), tl.load(offsets + row + 1)
    # After the entries of the codes before this one.
    target = tl.load(together + row) + tl.load(before + row + 1) - tl.load(before + row)
    for first in range(start, stop, BLOCK):
        place = first + tl.arange(0, BLOCK)
        to = target + place - start
        inside = place < stop
        tl.store(out_latents + to, tl.load(latents + place, mask=inside, other=0) + first_latent, mask=inside)
        tl.store(out_values + to, tl.load(values + place, mask=inside, other=0.0), mask=inside)
        tl.store(out_rows + to, row, mask=inside)


def side_by_side(codes: Sequence[Sequence[Tensor]], sizes: Sequence[int]) -> Code:
    """One code of the latents of several, in their order. Each has its offsets, latents and values first, and F of `sizes`."""
    every = torch.stack([code[0] for code in codes]).cumsum(dim=0)
    together, none = every[-1], torch.zeros_like(every[0])
    n_rows, room = len(together) - 1, sum(len(code[1]) for code in codes)
    out = _empty(room, n_rows, codes[0][2])
    first_latent = 0
    for place, (code, size) in enumerate(zip(codes, sizes, strict=True)):
        offsets, latents, values = code[:3]
        before = every[place - 1] if place else none
        with on_device_of(values):
            _copy_rows[(n_rows,)](offsets, before, together, latents, values, *out, first_latent, OF_ROW, **OPTIONS)
        first_latent += size
    return together, *out


@triton.jit
def _of_groups(offsets, latents, values, starts, mass, numbers, n_groups, n_rows, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(offsets + row), tl.load(offsets + row + 1)
    for group in range(0, n_groups):
        first_latent, last_latent = tl.load(starts + group), tl.load(starts + group + 1)
        total = tl.zeros((BLOCK,), tl.float32)
        number = tl.zeros((BLOCK,), tl.int32)
        for first in range(start, stop, BLOCK):
            place = first + tl.arange(0, BLOCK)
            latent = tl.load(latents + place, mask=place < stop, other=-1)
            inside = (latent >= first_latent) & (latent < last_latent)
            total += tl.load(values + place, mask=inside, other=0.0)
            number += inside.to(tl.int32)
        tl.store(mass + group * n_rows + row, tl.sum(total, axis=0))
        tl.store(numbers + group * n_rows + row, tl.sum(number, axis=0).to(tl.int64))


def of_groups(offsets: Tensor, latents: Tensor, values: Tensor, groups: Sequence[slice]) -> tuple[Tensor, Tensor]:
    """Sum of the values of each group of latents, which follow each other, and how many they are [G]."""
    n_rows, size = len(offsets) - 1, len(groups)
    mass, numbers = values.new_empty(size, n_rows), offsets.new_empty(size, n_rows)
    with on_device_of(values):
        _of_groups[(n_rows,)](
            offsets, latents, values, bounds(groups, values.device), mass, numbers, size, n_rows, OF_ROW, **OPTIONS
        )
    return mass.sum(dim=1), numbers.sum(dim=1)
