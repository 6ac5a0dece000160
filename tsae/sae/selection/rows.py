"""Top-k of every token without a dense [N, F] tensor and without sorting rows of F numbers.

The k largest entries of a row lie in the k segments with the largest maxima, so only those are searched.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsae.runtime.phases import phase
from tsae.sae.selection.batch import SEGMENT, Encoder, Prepared, Selection
from tsae.sae.selection.screens import Screen
from tsae.sae.sparse import from_entries


@phase("selection")
def top_k_codes(
    encoder: Encoder, halves: list[Tensor], weight: Tensor, bias: Tensor, k: int, guesses: list[float | None]
) -> list[Selection]:
    """The k largest positive pre-activations x @ weight [D, F] + bias [F] of each row of each half [N, D].

    Takes and returns what `batch_top_k_codes` does; there is no cut to guess, `guesses` only counts the halves.
    """
    prepared = encoder.prepare(weight, bias, sum(map(len, halves)))
    return [_select_half(encoder, x, prepared, k) for x, _ in zip(halves, guesses, strict=True)]


def _select_half(encoder: Encoder, x: Tensor, prepared: Prepared, k: int) -> Selection:
    weight, bias, screen = prepared
    block_rows = encoder.block_rows(x, len(bias))
    if screen is not None:
        if isinstance(screen, Screen):
            entries = screen.largest_of_rows(x, k, block_rows, encoder.listing(x))
        else:
            entries = screen.largest_of_rows(x, k)
        return Selection(from_entries(*entries, len(x), len(bias)), 0.0, 1)
    found = []
    for start in range(0, len(x), block_rows):
        buffer = encoder.block(x[start : start + block_rows], weight, bias)
        values, latents = _largest_of_rows(buffer, min(k, weight.shape[1]))
        # Latents ascend within a row, as in every sparse code.
        latents, order = latents.sort(dim=1)
        values = values.gather(1, order)
        row, place = (values > 0).nonzero(as_tuple=True)
        found.append((row + start, latents[row, place], values[row, place]))
    rows, latents, values = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Selection(from_entries(rows, latents, values, len(x), weight.shape[1]), 0.0, 1)


def _largest_of_rows(buffer: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and columns [n, k] of the k largest entries of each row of [n, segments·64]."""
    rows, width = buffer.shape
    segments = buffer.view(rows, width // SEGMENT, SEGMENT)
    if k >= segments.shape[1]:
        top = buffer.topk(k, dim=1, sorted=False)
        return top.values, top.indices
    chosen = segments.amax(dim=2).topk(k, dim=1, sorted=False).indices
    entries = segments.gather(1, chosen[:, :, None].expand(-1, -1, SEGMENT)).flatten(1)
    top = entries.topk(k, dim=1, sorted=False)
    return top.values, chosen.gather(1, top.indices // SEGMENT) * SEGMENT + top.indices % SEGMENT
