"""Top-k codes that the host has not seen: nothing of theirs, not even a size, is read back from the GPU while they are made.

Candidates of both halves and of all budgets go to one list of fixed capacity, with their number beside it on the device,
and what is selected of them into codes of exactly the k·B entries that they can have, some of which may be empty
(`SparseCode.spare`). Two things can go wrong, which the device counts and the host looks at when it has launched what
follows: the list was too short, or a guess so high that too little is above it. Then the selection is to be made again
(`Check.again`), with more room or lower guesses, and nothing that was made of the first one may be kept. A selection that
passes is exactly that of `tsae.sae.selection.top_k`, ties included, whatever the guesses and the capacity were.

Shapes: B rows of each of H halves, D activation_dim, F dict_size, G budgets, c places of a list, n entries of a code.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tsae.runtime.phases import phase
from tsae.sae.selection.screens import Screen, guess_of_rows
from tsae.sae.selection.top_k import GUESS_MARGIN, Encoder, Prepared, first_guess, lowered
from tsae.sae.sparse import SparseCode, kernels_that_run

Budgets = Sequence[tuple[slice, float]]
"""Latents that follow each other, and how many of them a token has on average."""


class Check(NamedTuple):
    """What tells whether a selection is right."""

    counts: Tensor
    """Candidates that there were; of each budget and half those above the guess; and whether the guess can be lowered [1 + 2GH]."""
    guesses: Tensor
    """[G, H]"""
    wanted: list[int]
    """Entries of each budget above the guess that are enough."""
    room: int
    """Candidates that could be listed."""
    listing: Any

    def again(self, counts: Sequence[int], passes: int) -> Tensor | None:
        """With the counts read, after so many passes: None if the selection is right, or else the guesses of the next pass."""
        candidates, *numbers = counts
        if candidates > self.room:
            self.listing.make_room(candidates)
            return self.guesses
        size = self.guesses.numel()
        wanted = [number for number in self.wanted for _ in range(size // len(self.wanted))]
        factors = [
            lowered(1.0, passes, above, enough) if above < enough and positive else 1.0
            for above, positive, enough in zip(numbers[:size], numbers[size:], wanted, strict=True)
        ]
        if min(factors) == 1:
            return None
        lower = torch.tensor(factors, device=self.guesses.device).view_as(self.guesses)
        return (self.guesses * lower).where(lower > 0, 0)


class Listed(NamedTuple):
    """A selection that is not known to be right."""

    codes: list[SparseCode]
    """Of each half."""
    cuts: Tensor
    """Smallest selected activation of each budget and half [G, H]; 0 if fewer than wanted were positive."""
    smallest: Tensor
    """That of each row [G, H, B]; infinite where none was."""
    check: Check


@phase("selection")
def listed_codes(
    encoder: Encoder, halves: Tensor, weight: Tensor, bias: Tensor, budgets: Budgets, guesses: Tensor | None, per_token: bool
) -> Listed:  # fmt: skip
    """What `batch_top_k_codes`, or with `per_token` `top_k_codes`, selects of halves [H, B, D], if the guesses [G, H] let it.

    Without guesses they are made from a few rows. With `per_token` there is one budget, and nothing to guess.
    """
    prepared, (n_halves, n_rows, _) = encoder.prepare(weight, bias, halves.shape[0] * halves.shape[1]), halves.shape
    kernels, slices = kernels_that_run(halves), [latents for latents, _ in budgets]
    if guesses is None or per_token:
        guesses = halves.new_zeros(len(budgets), n_halves)
        if not per_token:
            of_budgets = [(Prepared(prepared.weight[:, each], bias[each], None), k) for each, k in budgets]
            first = [GUESS_MARGIN * first_guess(x, part, k) for part, k in of_budgets for x in halves]
            guesses = torch.stack(first).view_as(guesses)
    x, k = halves.flatten(0, 1), int(budgets[0][1]) if per_token else None
    sizes = [latents.stop - latents.start for latents in slices]
    wanted = [
        n_rows * min(k, size) if k is not None else min(round(most * n_rows), n_rows * size)
        for size, (_, most) in zip(sizes, budgets, strict=True)
    ]
    listing, room = encoder.listing(x), n_halves * sum(wanted)
    if isinstance(prepared.screen, Screen):
        listed, values = prepared.screen.listed(x, guesses, slices, k, listing, room)
    else:
        fill = partial(encoder.fill, x, prepared.weight, bias)
        listed = listing.list(guess_of_rows(guesses, len(x)), slices, fill, room)
        places = torch.arange(listed.capacity, device=x.device)
        values = listed.values.where(places < listed.found, -torch.inf)
    if k is not None:
        values, cuts = kernels.largest_of_rows(listed, values, k), torch.full_like(guesses, -torch.inf)
    else:
        cuts = kernels.cuts(listed, values, wanted, n_halves)
    parts, smallest, above = kernels.kept(listed, values, cuts, wanted)
    codes = [SparseCode(offsets, latents, chosen, len(bias), True, rows) for offsets, latents, chosen, rows in parts]
    counts = torch.cat([listed.found, above.flatten(), (guesses > 0).flatten()])
    enough = [0 for _ in wanted] if per_token else wanted
    return Listed(codes, cuts.where(cuts > 0, 0), smallest, Check(counts, guesses, enough, listed.capacity, listing))
