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
from tsae.sae.selection.top_k import GUESS_MARGIN, Encoder, Prepared, first_guess, lowered
from tsae.sae.sparse import SparseCode, kernels_that_run


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
    smallest: Tensor
    """That of each row [N]; infinite where none was."""
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
    listed, values = _candidates(encoder, x, prepared, guess, None, wanted)
    cut = values.topk(wanted, sorted=False).values.min()
    return _listed(encoder, x, prepared, listed, values, cut, wanted, guess, wanted)


def _largest_of_tokens(encoder: Encoder, x: Tensor, prepared: Prepared, k: int) -> Listed:
    guess, room = x.new_zeros(()), len(x) * min(k, len(prepared.bias))
    listed, values = _candidates(encoder, x, prepared, guess, k, room)
    kernels = kernels_that_run(x)
    values, cut = kernels.largest_of_rows(listed, values, k), x.new_full((), -torch.inf)
    return _listed(encoder, x, prepared, listed, values, cut, room, guess, 0)


def _listed(
    encoder: Encoder, x: Tensor, prepared: Prepared, listed: Any, values: Tensor, cut: Tensor, room: int, guess: Tensor, wanted: int
) -> Listed:  # fmt: skip
    """The candidates above the cut, and of those that are equal to it the first ones, `room` in all."""
    kernels = kernels_that_run(x)
    (offsets, latents, chosen, rows), smallest, above = kernels.kept(listed, values, cut, room)
    code = SparseCode(offsets, latents, chosen, len(prepared.bias), True, rows)
    counts = torch.cat([listed.found, above, (guess > 0)[None]])
    check = Check(counts, guess, wanted, listed.capacity, encoder.listing(x))
    return Listed(code, cut.clamp_min(0), smallest, check)


def _candidates(
    encoder: Encoder, x: Tensor, prepared: Prepared, guess: Tensor, k: int | None, least: int
) -> tuple[Any, Tensor]:
    """A list of what may be above the guess, and the float32 values [c] of what is; others are −inf.

    With `k` only what may be among its row's k largest.
    """
    weight, bias, screen = prepared
    listing = encoder.listing(x)
    if isinstance(screen, Screen):
        return screen.listed(x, guess, k, listing, least)
    listed = listing.list(guess.expand(len(x)).contiguous(), partial(encoder.fill, x, weight, bias), least)
    return listed, torch.where(listed.latents < 0, -torch.inf, listed.values)
