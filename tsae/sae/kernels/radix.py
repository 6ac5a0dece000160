"""The cut of each half and budget: the k-th largest value of a list, found digit by digit, as a radix sort would.

Positive numbers in float32 are ordered as their bits are, read as an integer. So the values are counted by their seven
highest bits; from the top, the count that reaches k tells those bits of the cut. Of the values that have them the next eight
are counted, and so on. Nothing is sorted, and counts do not depend on the order in which they are made.

Digits are short because a program counts in shared memory: Triton has a thread count the votes for every value of a digit
that it owns, and all threads write to one bank. With 2,048 values that is 512 instructions a thread, with 256 it is 64.

Shapes: c places of a list, G budgets, H halves.
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
from tsae.sae.kernels.sums import brought

COUNTED = 2048
"""Values that a program counts."""
OPTIONS = {"num_warps": 8}
DIGITS = ((24, 7), (16, 8), (8, 8), (0, 8))
"""Where the digits of 31 bits begin, and how many bits they have."""
NONE = tl.constexpr(-1)
"""Digits of a cut that is below all values, for they are too few."""


@triton.jit
def _count_digits(
    values, rows, latents, found, starts, prefixes, counts, capacity, per_half, n_halves, n_budgets,
    FIRST: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    listed = place < tl.minimum(tl.load(found), capacity)
    value = tl.load(values + place, mask=listed, other=float("-inf"))
    live = value > float("-inf")
    half = (tl.load(rows + place, mask=live, other=0) // per_half).to(tl.int32)
    latent = tl.load(latents + place, mask=live, other=0)
    which = half
    for budget in range(1, n_budgets):
        which += (latent >= tl.load(starts + budget)).to(tl.int32) * n_halves
    bits = value.to(tl.int32, bitcast=True)
    digit = tl.arange(0, 1 << BITS)
    for each in range(0, n_halves * n_budgets):
        chosen = live & (which == each) & (bits >> FIRST >> BITS == tl.load(prefixes + each))
        if tl.max(chosen.to(tl.int32), axis=0) > 0:
            number = tl.histogram((bits >> FIRST) & ((1 << BITS) - 1), 1 << BITS, mask=chosen)
            tl.atomic_add(counts + (each << BITS) + digit, number, mask=number > 0, sem="relaxed")


@triton.jit
def _next_digit(counts, prefixes, missing, out, out_missing, cuts, FIRST: tl.constexpr, BITS: tl.constexpr):
    each = tl.program_id(0)
    from_top = tl.arange(0, 1 << BITS)
    number = tl.load(counts + (each << BITS) + (1 << BITS) - 1 - from_top)
    wanted = tl.load(missing + each)
    larger = tl.cumsum(number, axis=0) < wanted
    passed = tl.sum(larger.to(tl.int32), axis=0)
    prefix = tl.where(passed == 1 << BITS, NONE, (tl.load(prefixes + each) << BITS) | ((1 << BITS) - 1 - passed))
    tl.store(out + each, prefix)
    tl.store(out_missing + each, wanted - tl.sum(tl.where(larger, number, 0), axis=0))
    if FIRST == 0:
        tl.store(cuts + each, tl.where(prefix == NONE, float("-inf"), prefix.to(tl.float32, bitcast=True)))


def cuts(listed: List, values: Tensor, wanted: Sequence[int], n_halves: int) -> Tensor:
    """The smallest of the `wanted` largest of each of the list's budgets, in each half of its rows → [G, H].

    `values` [c] are positive or −inf; the latter is the cut where there are too few.
    """
    size = len(wanted) * n_halves
    state = (
        brought((0,) * size, values.device),
        brought(tuple(n for n in wanted for _ in range(n_halves)), values.device),
    )
    found = values.new_empty(len(wanted), n_halves)
    counts = torch.zeros(len(DIGITS), size << max(bits for _, bits in DIGITS), dtype=torch.int32, device=values.device)
    shape = (listed.capacity, len(listed.guesses) // n_halves, n_halves, len(wanted))
    grid, candidates = (
        (triton.cdiv(listed.capacity, COUNTED),),
        (listed.rows, listed.latents, listed.found, listed.starts),
    )
    for (first, bits), number in zip(DIGITS, counts, strict=True):
        told = number.new_empty(2, size).unbind()
        with on_device_of(values):
            _count_digits[grid](values, *candidates, state[0], number, *shape, first, bits, COUNTED, **OPTIONS)
            _next_digit[(size,)](number, *state, *told, found, first, bits)
        state = told
    return found
