"""Batch-top-k over the batches of all processes, without any of them seeing another's activations.

Every process lists its entries above a common guess. The cut is then found by radix search: activations are positive,
so that their bits, read as an integer, are in their order, and a histogram of a few of those bits, summed over
processes, tells in which bin the cut lies. Three histograms (float32: 11, 11 and 9 bits) give it exactly. Among entries
equal to the cut those of the first rows of the whole batch are taken, as one process would.

An example with 4 bits, in two digits of 2. The 3 largest are wanted; process 0 has 1101, 1001, 0110, process 1 has 1110,
1001, 0011. The first digits 11, 10, 01, 00 occur 2, 2, 1, 1 times in both processes together: counted from the top, the
third entry begins with 10, and 1 is still wanted among those. Of the entries that begin with 10 the second digit is 01
both times. So the cut is 1001, of the 2 entries that are equal to it 1 is kept, and it is process 0's: what is wanted of
ties goes to the lowest ranks first. No process has seen another's entries, only how many there are in each bin.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tsae.parallel.group import Group
from tsae.runtime.phases import phase
from tsae.sae.selection.top_k import (
    GUESS_MARGIN,
    INTEGERS,
    Encoder,
    Entries,
    Prepared,
    Selection,
    candidates,
    first_guess,
    lowered,
)
from tsae.sae.sparse import from_entries

DIGIT_BITS = 11


class Cut(NamedTuple):
    """Where the wanted entries end."""

    bits: int
    """Of the smallest activation kept."""
    ties: int
    """Entries of exactly that activation that are kept, over all processes."""
    equal: int
    """Those that there are."""


@phase("selection")
def global_top_k_codes(
    encoder: Encoder,
    halves: list[Tensor],
    weight: Tensor,
    bias: Tensor,
    k: float,
    guesses: list[float | None],
    group: Group,
) -> list[Selection]:
    """What `batch_top_k_codes` selects of all processes' rows, which are as many in each; returns this one's part.

    `guesses` must be the same in all processes. A selection's cut and passes are those of the whole.
    """
    prepared = encoder.prepare(weight, bias, sum(map(len, halves)))
    wanted = round(k * len(halves[0]) * group.world)
    agreed = [_agreed_guess(x, prepared, k, group) if g is None else g for x, g in zip(halves, guesses, strict=True)]
    found, totals, passes = _enough_candidates(encoder, halves, prepared, agreed, wanted, group)
    cuts = kth_largest([values for _, _, values in found], [min(wanted, total) for total in totals], group)
    selections = []
    for x, (rows, latents, values), cut, total, n in zip(halves, found, cuts, totals, passes, strict=True):
        chosen = _chosen(values, cut, group)
        code = from_entries(rows[chosen], latents[chosen], values[chosen], len(x), len(bias))
        selections.append(Selection(code, _value(cut.bits, values.dtype) if total >= wanted else 0.0, n))
    return selections


def _agreed_guess(x: Tensor, prepared: Prepared, k: float, group: Group) -> float:
    """The lowest of all processes' first guesses."""
    return -float(group.max(-GUESS_MARGIN * first_guess(x, prepared, k)))


def _enough_candidates(
    encoder: Encoder, halves: list[Tensor], prepared: Prepared, guesses: list[float], wanted: int, group: Group
) -> tuple[list[Entries], list[int], list[int]]:
    """Each half's entries above a guess that leaves `wanted` over all processes, their number, and the passes taken."""
    guesses, passes = list(guesses), [1] * len(halves)
    found = [candidates(encoder, x, prepared, guess) for x, guess in zip(halves, guesses, strict=True)]
    while True:
        counts = torch.tensor([len(values) for _, _, values in found], device=halves[0].device)
        totals = [int(total) for total in group.sum(counts)]
        short = [half for half, total in enumerate(totals) if total < wanted and guesses[half] > 0]
        if not short:
            return found, totals, passes
        for half in short:
            guesses[half] = lowered(guesses[half], passes[half], totals[half], wanted)
            found[half] = candidates(encoder, halves[half], prepared, guesses[half])
            passes[half] += 1


def kth_largest(lists: list[Tensor], wanted: list[int], group: Group) -> list[Cut]:
    """For each list of positive numbers, spread over processes, the cut that leaves the `wanted` largest."""
    keys = [values.contiguous().view(INTEGERS[values.dtype]) for values in lists]
    remaining = torch.tensor(wanted, device=lists[0].device)
    prefixes = torch.zeros_like(remaining)
    equal = torch.zeros_like(remaining)
    low = torch.iinfo(keys[0].dtype).bits - 1  # without the sign
    while low > 0:
        width = min(DIGIT_BITS, low)
        low -= width
        counts = [_histogram(key, prefix, low, width) for key, prefix in zip(keys, prefixes, strict=True)]
        histograms = group.sum(torch.stack(counts))
        from_top = histograms.flip(1).cumsum(dim=1)
        steps = (from_top < remaining[:, None]).sum(dim=1, keepdim=True).clamp_max((1 << width) - 1)
        digit = (1 << width) - 1 - steps
        equal = histograms.gather(1, digit)[:, 0]
        remaining = remaining - (from_top.gather(1, steps)[:, 0] - equal)
        prefixes = (prefixes << width) | digit[:, 0]
    return [Cut(*row) for row in torch.stack([prefixes, remaining, equal], dim=1).tolist()]


def _histogram(keys: Tensor, prefix: Tensor, low: int, width: int) -> Tensor:
    """How many keys with the bits `prefix` have each value of the `width` bits that follow, from bit `low` up."""
    digits = (keys >> low) & ((1 << width) - 1)
    digits = torch.where((keys >> (low + width)) == prefix, digits, 1 << width).long()
    counts = torch.zeros((1 << width) + 1, dtype=torch.int64, device=keys.device)
    return counts.scatter_add_(0, digits, torch.ones_like(digits))[:-1]


def _chosen(values: Tensor, cut: Cut, group: Group) -> Tensor:
    """Places of this process's share of the selected entries, ascending."""
    keys = values.contiguous().view(INTEGERS[values.dtype])
    if cut.equal == cut.ties:
        return (keys >= cut.bits).nonzero()[:, 0]
    keep = keys > cut.bits
    ties = (keys == cut.bits).nonzero()[:, 0]
    counts = group.gather(torch.tensor([len(ties)], device=values.device)).tolist()
    keep[ties[: max(0, cut.ties - sum(counts[: group.rank]))]] = True
    return keep.nonzero()[:, 0]


def _value(bits: int, dtype: torch.dtype) -> float:
    return float(torch.tensor([bits], dtype=INTEGERS[dtype]).view(dtype))
