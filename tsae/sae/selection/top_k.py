"""Top-k codes, of a batch or of every token, without a dense [N, F] tensor and without sorting N·F numbers.

The encoder product runs in blocks of rows. Within a block only entries above a guess of the cut are kept: segments of 64
latents whose maximum is too small are skipped. The k·N largest are then chosen exactly among the few candidates. A
guess that turns out too high costs another pass with a lower one; a good guess is a little under the last step's cut.

The k largest entries of a single row lie in the k segments with the largest maxima, so only those are searched.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tsae.runtime.phases import phase
from tsae.sae.selection.screens import (
    SEGMENT,
    CpuScreen,
    Memory,
    Screen,
    largest_of_segments,
    screens,
    screens_on_cpu,
)
from tsae.sae.sparse import SparseCode, from_entries, kernels_for

GUESS_MARGIN = 0.97
SAMPLE_ROWS = 32
BLOCK_BYTES = 64 * 2**20
BLOCK_ROWS, CUDA_BLOCK_ROWS = 64, 1024
INTEGERS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
"""The integers as wide as numbers of a type."""


Entries = tuple[Tensor, Tensor, Tensor]
"""Row, latent and value of some entries, ascending by row and latent."""


class Selection(NamedTuple):
    """Result of batch-top-k."""

    code: SparseCode
    cut: float
    """Smallest selected activation; 0 if fewer than k·N were positive."""
    passes: int
    """Encoder passes it took."""


class Prepared(NamedTuple):
    """Weights [D, F] and bias [F] of an encoder, in the form that its precision wants."""

    weight: Tensor
    bias: Tensor
    screen: Screen | CpuScreen | None


class Encoder:
    """Pre-activations of rows [N, D] in blocks, into one scratch buffer that is kept between calls.

    `precision`: `exact` and `float32` give float32 numbers, `exact` by way of a bfloat16 screen where that is faster;
    `bf16` rounds inputs, weights and products to bfloat16.
    """

    def __init__(self, precision: str = "exact") -> None:
        self.precision = precision
        self._scratch, self._outgrown, self._memory = torch.empty(0), list[Tensor](), Memory()
        self._listing: Any = None

    def block_rows(self, x: Tensor, dict_size: int) -> int:
        """Rows of x per block: about 64 MB of activations, but enough rows for the product to run at full speed."""
        return max(CUDA_BLOCK_ROWS if x.is_cuda else BLOCK_ROWS, BLOCK_BYTES // (4 * dict_size))

    def prepare(self, weight: Tensor, bias: Tensor, rows: int) -> Prepared:
        """What depends on weight [D, F] and bias [F] alone: made once for the products of one step.

        `rows` is how many inputs there will be.
        """
        screen: Screen | CpuScreen | None = None
        if self.precision == "exact" and screens(weight):
            screen = Screen(weight, bias)
        elif self.precision == "exact" and screens_on_cpu(weight, rows):
            screen = CpuScreen(weight, bias, self._memory)
        return Prepared(weight.bfloat16() if self.precision == "bf16" else weight, bias, screen)

    def listing(self, x: Tensor) -> Any:
        """The kernels' list of entries above a guess; None where torch's operations make it."""
        kernels = kernels_for(x)
        if kernels is not None and self._listing is None:
            self._listing = kernels.Candidates()
        return self._listing if kernels is not None else None

    def block(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """x [n, D] @ weight [D, F] + bias [F] as [n, segments·64]; the padding past F holds −inf."""
        buffer = self.product(x, weight)
        buffer[:, : len(bias)] += bias
        return buffer

    def fill(self, x: Tensor, weight: Tensor, bias: Tensor, listed: Any) -> None:
        """List the pre-activations above their guesses, by kernels."""
        for rows in x.split(self.block_rows(x, len(bias))):
            listed.add(self.block(rows, weight, bias), len(bias))

    @phase("encoder product")
    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [n, D] @ weight [D, F] as [n, segments·64]; the padding past F holds −inf."""
        rows, width = len(x), weight.shape[1]
        padded = -(-width // SEGMENT) * SEGMENT
        if self._scratch.numel() < rows * padded or self._scratch.dtype != x.dtype or self._scratch.device != x.device:
            if self._scratch.is_cuda:
                self._outgrown.append(self._scratch)  # where a recorded step may write, nothing else may be
            self._scratch = x.new_empty(rows * padded)
        buffer = self._scratch[: rows * padded].view(rows, padded)
        if padded != width:
            buffer[:, width:] = -torch.inf
        if weight.dtype == x.dtype:
            torch.mm(x, weight, out=buffer[:, :width])
        else:
            buffer[:, :width] = torch.mm(x.to(weight.dtype), weight)
        return buffer


@phase("selection")
def batch_top_k_codes(
    encoder: Encoder, halves: list[Tensor], weight: Tensor, bias: Tensor, k: float, guesses: list[float | None]
) -> list[Selection]:
    """Batch-top-k over each half [N, D] by itself. Pre-activations are x @ weight [D, F] + bias [F].

    `guesses` are estimates of each half's cut (none: estimated from a few rows).
    """
    prepared = encoder.prepare(weight, bias, sum(map(len, halves)))
    return [_largest_of_half(encoder, x, prepared, k, guess) for x, guess in zip(halves, guesses, strict=True)]


def _largest_of_half(encoder: Encoder, x: Tensor, prepared: Prepared, k: float, guess: float | None) -> Selection:
    wanted = round(k * len(x))
    if guess is None:
        guess = GUESS_MARGIN * float(first_guess(x, prepared, k))
    passes = 1
    rows, latents, values = candidates(encoder, x, prepared, guess)
    while len(values) < wanted and guess > 0:
        guess = lowered(guess, passes, len(values), wanted)
        rows, latents, values = candidates(encoder, x, prepared, guess)
        passes += 1
    cut = 0.0
    if len(values) > wanted:
        chosen = _largest(values, wanted)
        rows, latents, values = rows[chosen], latents[chosen], values[chosen]
    if len(values) == wanted:
        cut = float(values.min())
    return Selection(from_entries(rows, latents, values, len(x), len(prepared.bias)), cut, passes)


def lowered(guess: float, passes: int, found: int, wanted: int) -> float:
    """The next guess, after one that let too few entries through.

    Nearly enough: a small step down; far too few: a large one; and soon all positive ones.
    """
    return guess * (0.8 if found > wanted // 2 else 0.5) if passes < 4 else 0.0


def _largest(values: Tensor, count: int) -> Tensor:
    """Places of the `count` largest values, ascending; among ties at the cut the first ones.

    So the choice depends on the activations alone, not on which candidates a guess let through.
    """
    cut = values.topk(count, sorted=False).values.min()
    keep = values > cut
    ties = (values == cut).nonzero()[:, 0]
    keep[ties[: count - int(keep.sum())]] = True
    return keep.nonzero()[:, 0]


def first_guess(x: Tensor, prepared: Prepared, k: float) -> Tensor:
    """An estimate of the cut, a scalar, from a few rows of x [N, D], a little too low rather than too high."""
    sample = x[:: max(1, len(x) // SAMPLE_ROWS)][:SAMPLE_ROWS]
    product = (sample.to(prepared.weight.dtype) @ prepared.weight).to(x.dtype)
    activations = torch.relu(product + prepared.bias).flatten()
    return activations.topk(min(max(1, round(k * len(sample))), activations.numel()), sorted=False).values.min()


def entries_above(encoder: Encoder, x: Tensor, weight: Tensor, bias: Tensor, guess: float) -> Entries:
    """Row, latent and value of every pre-activation above `guess` ≥ 0, ascending by row and latent."""
    return candidates(encoder, x, encoder.prepare(weight, bias, len(x)), guess)


def candidates(encoder: Encoder, x: Tensor, prepared: Prepared, guess: float) -> Entries:
    """As `entries_above`, with what was made for all products of a step."""
    weight, bias, screen = prepared
    if isinstance(screen, CpuScreen):
        return screen.entries_above(x, guess)
    listing = encoder.listing(x)
    block_rows = encoder.block_rows(x, len(bias))
    if screen is not None:
        return screen.entries_above(x, guess, listing)
    if listing is not None:
        listed = listing.all(x.new_full((len(x),), guess), len(bias), partial(encoder.fill, x, weight, bias))
        return listed.rows, listed.latents, listed.values
    found, least = [], _least_products(bias, guess)
    for start in range(0, len(x), block_rows):
        rows, latents, products = _entries_of_segments(encoder.product(x[start : start + block_rows], weight), least)
        values = products + bias[latents]
        above = (values > guess).nonzero()[:, 0]
        found.append((rows[above] + start, latents[above], values[above]))
    rows, latents, values = (torch.cat(parts) for parts in zip(*found, strict=True))
    return rows, latents, values


def _least_products(bias: Tensor, guess: float) -> Tensor:
    """What a product must exceed in each segment for it and any bias of the segment to exceed `guess` [segments].

    Going through all products once more to add the biases would take some per cent of what making them takes.
    """
    largest = largest_of_segments(bias)
    slack = 4 * torch.finfo(bias.dtype).eps * (guess + largest.abs())
    return guess - largest - slack


def _entries_of_segments(products: Tensor, least: Tensor) -> Entries:
    """Entries of products [n, segments·64] above what is the least in their segment, ascending."""
    segments = products.view(-1, SEGMENT)
    # Read as integers, numbers that are not negative keep their order, and their maxima take half the time.
    if bool((least >= 0).all()):
        highest = segments.view(INTEGERS[products.dtype]).amax(dim=1).view(products.dtype)
    else:
        highest = segments.amax(dim=1)
    hit = (highest.view(-1, len(least)) > least).flatten().nonzero()[:, 0]
    entries = segments[hit]
    chosen = (entries > least[hit % len(least), None]).flatten().nonzero()[:, 0]
    place = hit[chosen // SEGMENT] * SEGMENT + chosen % SEGMENT
    rows = place // products.shape[1]
    return rows, place - rows * products.shape[1], entries.flatten()[chosen]


@phase("selection")
def top_k_codes(
    encoder: Encoder, halves: list[Tensor], weight: Tensor, bias: Tensor, k: float, guesses: list[float | None]
) -> list[Selection]:
    """The k largest positive pre-activations x @ weight [D, F] + bias [F] of each row of each half [N, D].

    Takes and returns what `batch_top_k_codes` does; there is no cut to guess, `guesses` only counts the halves.
    """
    prepared = encoder.prepare(weight, bias, sum(map(len, halves)))
    return [_largest_of_tokens(encoder, x, prepared, int(k)) for x, _ in zip(halves, guesses, strict=True)]


def _largest_of_tokens(encoder: Encoder, x: Tensor, prepared: Prepared, k: int) -> Selection:
    weight, bias, screen = prepared
    block_rows = encoder.block_rows(x, len(bias))
    if screen is not None:
        if isinstance(screen, Screen):
            entries = screen.largest_of_rows(x, k, encoder.listing(x))
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
