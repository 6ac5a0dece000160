"""Codes from lists of candidates, and what is asked of codes row by row; nothing of it waits for the GPU.

A list is sorted by row, so that a program has the candidates of one row. Which of them are kept is counted, and the counts
of the rows before it say where a row's entries begin: a code that is sorted, too, and the same in every run.

Shapes: N rows, of H halves, D activation_dim, F dict_size, c places of a list, n entries of a code, G budgets or groups of latents.
"""

# Triton gives kernels their own types of arguments.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tsae.sae.kernels.candidates import List, of_budgets
from tsae.sae.kernels.launch import on_device_of
from tsae.sae.kernels.sums import ENTRIES, bounds, brought, products, tile_width

OF_ROW = 32
"""Candidates, or entries, of a row that a program has at a time: one for each thread."""
OPTIONS = {"num_warps": 1}
PROGRAMS = 4096
"""That share the candidates out: several times as many as a GPU runs at once."""

Code = tuple[Tensor, Tensor, Tensor, Tensor]
"""Offsets [N + 1], latents, values and rows [n], as of `SparseCode`; empty entries come last."""


@triton.jit
def _refine(
    rows, latents, found, x, matrix, bias, guesses, starts, out, capacity, per_half, n_halves, n_budgets, width, x_stride,
    matrix_stride, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # A list has room for two or three times as many: programs go through what there is, in turns.
    last = tl.minimum(tl.load(found), capacity).to(tl.int32)
    for first in range(tl.program_id(0) * BLOCK_E, last, tl.num_programs(0) * BLOCK_E):
        entry = first + tl.arange(0, BLOCK_E)
        latent = tl.load(latents + entry, mask=entry < last, other=-1)
        value = products(rows, entry, latent, x, matrix, width, x_stride, matrix_stride, BLOCK_E, BLOCK_D)
        value += tl.load(bias + latent, mask=entry < last, other=0.0)
        half = tl.load(rows + entry, mask=entry < last, other=0) // per_half
        guess = of_budgets(guesses, half, n_halves, latent, starts, n_budgets)
        tl.store(out + entry, tl.where(value > guess, value, float("-inf")), mask=entry < last)


def refined(listed: List, x: Tensor, matrix: Tensor, bias: Tensor, guesses: Tensor) -> Tensor:
    """The pre-activations x [N, D] · matrix [F, D] + bias [F] of a list's candidates that are above their guess → [c].

    What is not is −inf, and what there is beyond the candidates is not written. The guesses [G, H] are of the list's budgets
    and the halves of the N rows.
    """
    out = listed.values
    (n_budgets, n_halves), width = guesses.shape, x.shape[1]
    shape = (len(out), len(x) // n_halves, n_halves, n_budgets, width, x.stride(0), matrix.stride(0))
    with on_device_of(out):
        _refine[(min(PROGRAMS, triton.cdiv(len(out), ENTRIES)),)](
            listed.rows, listed.latents, listed.found, x, matrix, bias, guesses, listed.starts, out, *shape, ENTRIES,
            tile_width(width),
        )  # fmt: skip
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
def _count_kept(
    ends, latents, values, cuts, starts, counts, n_rows, per_half, n_halves, n_budgets, capacity, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    start, stop = _bounds_of(ends, row, capacity)
    for budget in range(0, n_budgets):
        least = tl.load(cuts + budget * n_halves + row // per_half)
        first_latent, last_latent = tl.load(starts + budget), tl.load(starts + budget + 1)
        kept = tl.zeros((BLOCK,), tl.int32)
        tied = tl.zeros((BLOCK,), tl.int32)
        above = tl.zeros((BLOCK,), tl.int32)
        for first in range(start, stop, BLOCK):
            place = first + tl.arange(0, BLOCK)
            latent = tl.load(latents + place, mask=place < stop, other=-1)
            inside = (latent >= first_latent) & (latent < last_latent)
            value = tl.load(values + place, mask=inside, other=float("-inf"))
            real = value > float("-inf")
            kept += (value > least).to(tl.int32)
            tied += (real & (value == least)).to(tl.int32)
            above += real.to(tl.int32)
        out = counts + budget * n_rows + row
        tl.store(out, tl.sum(kept, axis=0).to(tl.int64))
        tl.store(out + n_budgets * n_rows, tl.sum(tied, axis=0).to(tl.int64))
        tl.store(out + 2 * n_budgets * n_rows, tl.sum(above, axis=0).to(tl.int64))


@triton.jit
def _write_kept(
    ends, latents, values, cuts, starts, wanted, sums, offsets, smallest, code_latents, code_values, code_rows, room,
    n_rows, per_half, n_halves, n_budgets, capacity, BLOCK: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    start, stop = _bounds_of(ends, number, capacity)
    half, row = number // per_half, number % per_half
    # After what the rows before it in this half keep of all budgets.
    target = half * 0
    for budget in range(0, n_budgets):
        kept = sums + budget * n_rows + half * per_half
        ties = tl.load(wanted + budget) - tl.load(kept + per_half - 1)
        tied = tl.load(kept + n_budgets * n_rows + row - 1, mask=row > 0, other=0)
        target += tl.load(kept + row - 1, mask=row > 0, other=0) + tl.minimum(tied, ties)
    tl.store(offsets + half * (per_half + 1) + row, target)
    code = half * room
    for budget in range(0, n_budgets):
        kept = sums + budget * n_rows + half * per_half
        # So many of those that are equal to the cut are wanted: those of the first rows.
        ties = tl.load(wanted + budget) - tl.load(kept + per_half - 1)
        tied = tl.load(kept + n_budgets * n_rows + row - 1, mask=row > 0, other=0)
        least = tl.load(cuts + budget * n_halves + half)
        first_latent, last_latent = tl.load(starts + budget), tl.load(starts + budget + 1)
        lowest = tl.full((BLOCK,), float("inf"), tl.float32)
        for first in range(start, stop, BLOCK):
            place = first + tl.arange(0, BLOCK)
            latent = tl.load(latents + place, mask=place < stop, other=-1)
            inside = (latent >= first_latent) & (latent < last_latent)
            value = tl.load(values + place, mask=inside, other=float("-inf"))
            tie = ((value > float("-inf")) & (value == least)).to(tl.int64)
            taken = (value > least) | ((tie > 0) & (tied + tl.cumsum(tie, axis=0) <= ties))
            chosen = taken.to(tl.int64)
            to = code + target + tl.cumsum(chosen, axis=0) - 1
            tl.store(code_latents + to, latent, mask=taken)
            tl.store(code_values + to, value, mask=taken)
            tl.store(code_rows + to, row, mask=taken)
            lowest = tl.minimum(lowest, tl.where(taken, value, float("inf")))
            tied += tl.sum(tie, axis=0)
            target += tl.sum(chosen, axis=0)
        tl.store(smallest + budget * n_rows + number, tl.min(lowest, axis=0))
    if row == per_half - 1:
        tl.store(offsets + half * (per_half + 1) + per_half, target)
        # What is left is empty; nearly always there is none.
        for first in range(target, room, BLOCK):
            place = first + tl.arange(0, BLOCK)
            tl.store(code_latents + code + place, -1, mask=place < room)
            tl.store(code_values + code + place, 0.0, mask=place < room)
            tl.store(code_rows + code + place, row, mask=place < room)


def kept(listed: List, values: Tensor, cuts: Tensor, wanted: Sequence[int]) -> tuple[list[Code], Tensor, Tensor]:
    """A code of each half: the candidates whose values [c] are above the cut [G, H], and the first that are equal to it.

    `wanted` of each budget; as many places it has in all. The smallest value that is kept of each budget and row [G, H, N / H],
    infinite where there is none; and how many candidates are above −inf [G, H].
    """
    (n_budgets, n_halves), n_rows, room, ends = cuts.shape, len(listed.guesses), sum(wanted), listed.ends()
    per_half = n_rows // n_halves
    counts = listed.rows.new_empty(3, n_budgets, n_halves, per_half)
    shape = (n_rows, per_half, n_halves, n_budgets, listed.capacity, OF_ROW)
    candidates = ends, listed.latents, values, cuts, listed.starts
    with on_device_of(values):
        _count_kept[(n_rows,)](*candidates, counts, *shape, **OPTIONS)
    sums = counts.cumsum(dim=3)
    offsets = counts.new_empty(n_halves, per_half + 1)
    latents, rows = counts.new_empty(2, n_halves, room)
    chosen, smallest = values.new_empty(n_halves, room), values.new_empty(n_budgets, n_halves, per_half)
    out = brought(tuple(wanted), values.device), sums, offsets, smallest, latents, chosen, rows
    with on_device_of(values):
        _write_kept[(n_rows,)](*candidates, *out, room, *shape, **OPTIONS)
    return list(zip(offsets, latents, chosen, rows, strict=True)), smallest, sums[2, :, :, -1]


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
