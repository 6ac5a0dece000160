"""Batch-top-k codes without a dense [N, F] tensor and without sorting N·F numbers.

The encoder product runs in blocks of rows. Within a block only entries above a guess of the cut are kept: 64-wide
segments whose maximum is too small are skipped. The k·N largest are then chosen exactly among the few candidates. A
guess that turns out too high costs another pass with a lower one; a good guess is a little under the last step's cut.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tsae.phases import phase
from tsae.sae.sparse import SparseCode, from_entries

SEGMENT = 64
GUESS_MARGIN = 0.97
SAMPLE_ROWS = 32
BLOCK_BYTES = 64 * 2**20


class Selection(NamedTuple):
    """Result of batch-top-k."""

    code: SparseCode
    cut: float
    """Smallest selected activation; 0 if fewer than k·N were positive."""
    passes: int
    """Encoder passes it took."""


class Encoder:
    """Pre-activations of rows [N, D] in blocks, into one scratch buffer that is kept between calls."""

    def __init__(self) -> None:
        self._scratch = torch.empty(0)

    def block_rows(self, dict_size: int) -> int:
        """Rows per block: about 64 MB of activations, at least 64 rows, so that the product runs at full speed."""
        return max(64, BLOCK_BYTES // (4 * dict_size))

    @phase("encoder product")
    def block(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """x [n, D] @ weight [D, F] + bias as [n, segments·64]; the padding past F holds −inf."""
        rows, width = len(x), weight.shape[1]
        padded = -(-width // SEGMENT) * SEGMENT
        if self._scratch.numel() < rows * padded or self._scratch.dtype != x.dtype or self._scratch.device != x.device:
            self._scratch = x.new_empty(rows * padded)
        buffer = self._scratch[: rows * padded].view(rows, padded)
        if padded != width:
            buffer[:, width:] = -torch.inf
        torch.addmm(bias, x, weight, out=buffer[:, :width])
        return buffer


@phase("selection")
def batch_top_k_codes(
    encoder: Encoder, halves: list[Tensor], weight: Tensor, bias: Tensor, k: int, guesses: list[float | None]
) -> list[Selection]:
    """Batch-top-k over each half [N, D] by itself. Pre-activations are x @ weight [D, F] + bias [F].

    `guesses` are estimates of each half's cut (none: estimated from a few rows).
    """
    return [_select_half(encoder, x, weight, bias, k, guess) for x, guess in zip(halves, guesses, strict=True)]


def _select_half(encoder: Encoder, x: Tensor, weight: Tensor, bias: Tensor, k: int, guess: float | None) -> Selection:
    wanted = k * len(x)
    if guess is None:
        guess = _first_guess(x, weight, bias, k)
    passes = 1
    rows, latents, values = entries_above(encoder, x, weight, bias, guess)
    while len(values) < wanted and guess > 0:
        # Nearly enough: a small step down; far too few: a large one; and soon all positive ones.
        guess = guess * (0.8 if len(values) > wanted // 2 else 0.5) if passes < 4 else 0.0
        rows, latents, values = entries_above(encoder, x, weight, bias, guess)
        passes += 1
    cut = 0.0
    if len(values) > wanted:
        chosen = _largest(values, wanted)
        rows, latents, values = rows[chosen], latents[chosen], values[chosen]
    if len(values) == wanted:
        cut = float(values.min())
    return Selection(from_entries(rows, latents, values, len(x), weight.shape[1]), cut, passes)


def _largest(values: Tensor, count: int) -> Tensor:
    """Places of the `count` largest values, ascending; among ties at the cut the first ones.

    So the choice depends on the activations alone, not on which candidates a guess let through.
    """
    cut = values.topk(count, sorted=False).values.min()
    keep = values > cut
    ties = (values == cut).nonzero()[:, 0]
    keep[ties[: count - int(keep.sum())]] = True
    return keep.nonzero()[:, 0]


def _first_guess(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> float:
    sample = x[:: max(1, len(x) // SAMPLE_ROWS)][:SAMPLE_ROWS]
    activations = torch.relu(sample @ weight + bias).flatten()
    top = activations.topk(min(k * len(sample), activations.numel()), sorted=False).values
    return GUESS_MARGIN * float(top.min())


def entries_above(
    encoder: Encoder, x: Tensor, weight: Tensor, bias: Tensor, guess: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Row, latent and value of every pre-activation above max(guess, 0), ascending by row and latent."""
    found = []
    block_rows = encoder.block_rows(weight.shape[1])
    for start in range(0, len(x), block_rows):
        buffer = encoder.block(x[start : start + block_rows], weight, bias)
        segments = buffer.view(-1, SEGMENT)
        hit = (segments.amax(dim=1) > guess).nonzero()[:, 0]
        entries = segments[hit]
        which, column = (entries > guess).nonzero(as_tuple=True)
        place = hit[which] * SEGMENT + column
        rows = place // buffer.shape[1]
        found.append((rows + start, place - rows * buffer.shape[1], entries[which, column]))
    rows, latents, values = (torch.cat(parts) for parts in zip(*found, strict=True))
    return rows, latents, values
