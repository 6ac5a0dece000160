"""Top-k codes that the host has not seen: nothing of theirs, not even a size, is read back from the GPU while they are made.

Candidates go to a list of fixed capacity, with their number beside it on the device, and what is selected of them into
a code of exactly the k·N entries that it can have, some of which may be empty (`SparseCode.spare`). Two things can go
wrong, which the device counts and the host looks at when it has launched what follows: the list was too short, or the
guess so high that too little is above it. Then the selection is to be made again (`Check.again`), with more room or a
lower guess, and nothing that was made of the first one may be kept. A selection that passes is exactly that of
`tsae.sae.selection.top_k`, ties included, whatever the guess and the capacity were.

Shapes: N rows, D activation_dim, F dict_size, c places of a list, n entries of a code.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tsae.runtime.phases import phase
from tsae.sae.selection.screens import Screen
from tsae.sae.selection.top_k import GUESS_MARGIN, Encoder, Entries, Prepared, first_guess, lowered
from tsae.sae.sparse import SparseCode


class Check(NamedTuple):
    """What tells whether a selection is right."""

    counts: Tensor
    """Candidates that there were; those above the guess; whether the guess can be lowered [3]."""
    guess: Tensor
    """A scalar."""
    wanted: int
    """Entries above the guess that are enough."""
    room: int
    """Candidates that could be listed."""
    listing: Any

    def again(self, counts: Sequence[int], passes: int) -> Tensor | None:
        """With the counts read, after so many passes: None if the selection is right, or else the guess of the next pass."""
        candidates, above, positive = counts
        if candidates > self.room:
            self.listing.make_room(candidates)
            return self.guess
        if above >= self.wanted or not positive:
            return None
        return self.guess * lowered(1.0, passes, above, self.wanted)


class Listed(NamedTuple):
    """A selection that is not known to be right."""

    code: SparseCode
    cut: Tensor
    """Smallest selected activation, a scalar; 0 if fewer than k·N were positive."""
    check: Check


@phase("selection")
def batch_top_k_listed(
    encoder: Encoder, halves: list[Tensor], weight: Tensor, bias: Tensor, k: float, guesses: list[Tensor | None]
) -> list[Listed]:
    """What `batch_top_k_codes` selects, if the guesses (scalars on the device; none: from a few rows) let it."""
    prepared = encoder.prepare(weight, bias, sum(map(len, halves)))
    return [_largest_of_half(encoder, x, prepared, k, guess) for x, guess in zip(halves, guesses, strict=True)]


@phase("selection")
def top_k_listed(
    encoder: Encoder, halves: list[Tensor], weight: Tensor, bias: Tensor, k: float, guesses: list[Tensor | None]
) -> list[Listed]:
    """What `top_k_codes` selects; `guesses` only counts the halves."""
    prepared = encoder.prepare(weight, bias, sum(map(len, halves)))
    return [_largest_of_tokens(encoder, x, prepared, int(k)) for x, _ in zip(halves, guesses, strict=True)]


def _largest_of_half(encoder: Encoder, x: Tensor, prepared: Prepared, k: float, guess: Tensor | None) -> Listed:
    wanted = min(round(k * len(x)), len(x) * len(prepared.bias))
    if guess is None:
        guess = GUESS_MARGIN * first_guess(x, prepared, k)
    (rows, latents, values), listed = _candidates(encoder, x, prepared, guess, None, wanted)
    above = values > guess
    values = torch.where(above, values, -torch.inf)
    cut = values.topk(wanted, sorted=False).values.min()
    # Among ties at the cut the first ones; where too few are above the guess, all of them.
    kept, tied = values > cut, (values == cut) & above
    kept |= tied & (tied.cumsum(0) <= wanted - kept.sum())
    code = _packed((rows, latents, values), kept, wanted, len(x), len(prepared.bias))
    counts = torch.cat([listed.found, above.sum()[None], (guess > 0)[None]])
    return Listed(code, cut.clamp_min(0), Check(counts, guess, wanted, listed.capacity, encoder.listing(x)))


def _largest_of_tokens(encoder: Encoder, x: Tensor, prepared: Prepared, k: int) -> Listed:
    guess, room = x.new_zeros(()), len(x) * min(k, len(prepared.bias))
    (rows, latents, values), listed = _candidates(encoder, x, prepared, guess, k, room)
    values = torch.where(values > 0, values, 0)
    # By row and then by value; ties stay in the order of latents.
    falling = values.argsort(descending=True, stable=True)
    rows = torch.where(latents < 0, len(x), rows)
    order = falling[rows[falling].argsort(stable=True)]
    places = torch.arange(len(rows), device=x.device)
    rank = torch.empty_like(order).scatter_(0, order, places) - torch.searchsorted(rows, rows)
    code = _packed((rows, latents, values), (rank < k) & (values > 0), room, len(x), len(prepared.bias))
    counts = torch.cat([listed.found, listed.found.new_zeros(2)])
    return Listed(code, guess, Check(counts, guess, 0, listed.capacity, encoder.listing(x)))


def _candidates(
    encoder: Encoder, x: Tensor, prepared: Prepared, guess: Tensor, k: int | None, least: int
) -> tuple[Entries, Any]:
    """Row, latent and float32 value [c] of what may be above the guess, first in a list; and that list.

    Places without one have the latent −1. With `k` only what may be among its row's k largest.
    """
    weight, bias, screen = prepared
    listing = encoder.listing(x)
    if isinstance(screen, Screen):
        return screen.listed(x, guess, k, listing, least)
    listed = listing.list(guess.expand(len(x)).contiguous(), partial(encoder.fill, x, weight, bias), least)
    values = torch.where(listed.latents < 0, -torch.inf, listed.values)
    return (listed.rows, listed.latents, values), listed


def _packed(entries: Entries, kept: Tensor, room: int, n_rows: int, dict_size: int) -> SparseCode:
    """A code of the entries that are `kept` [c], `room` of them at most, in their order; what is empty comes last."""
    # The last place takes what is not kept, and is not returned.
    places = torch.where(kept, kept.cumsum(0) - 1, room)
    empty = (n_rows, -1, 0)
    rows, latents, values = (
        each.new_full((room + 1,), fill).scatter_(0, places, each)[:room]
        for each, fill in zip(entries, empty, strict=True)
    )
    offsets = torch.searchsorted(rows, torch.arange(n_rows + 1, device=rows.device))
    return SparseCode(offsets, latents, values, dict_size, True, rows.clamp_max_(n_rows - 1))
