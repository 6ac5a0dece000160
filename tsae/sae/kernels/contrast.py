"""InfoNCE of sparse codes, by the few places where two codes have a latent in common.

The logits of a row are sums over its entries, of values times those of the other codes at the same latent:

    S_ij = Σ over the entries e of row i of values[e] · others[j, latents[e]] / temperature.

Of 8,192 rows with four high-level latents each, of 3,277, a latent is on ten: so a row meets 40 of the 8,192 others, and all
rows together a hundredth of the pairs, or a tenth where some latents are on often. What is multiplied are those; the
other logits are 0. One program has one row: it adds up its logits entry by entry, in the order of its latents, then goes
once through all of them for the sum of their exponentials. For the gradient only logits at common latents are asked for.

Logits are in memory, once for each pair and for so many rows at a time that they are not too many (`tsae.training.temporal.LOGITS_BYTES`).

Shapes: n entries, R rows of a block, C columns: rows of the other codes.
"""

# Triton gives kernels their own types of arguments.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tsae.sae.kernels.launch import on_device_of
from tsae.sae.kernels.sums import ANY_BOUNDS, Bounds, stride_of

MATCHES = 128
"""Rows of the other codes with a latent that a program has at a time: one for each thread, so that none is added twice."""
COLUMNS = 1024
"""Logits of a row that a program looks at, at a time."""
TALL, WIDE = 8, 128
"""Rows and columns of logits that a program has at a time for the sums of columns."""
STRIP = 512
"""Rows of which a program sums the columns."""
LOWEST = tl.constexpr(-3e38)
EXCLUDED = tl.constexpr(-1e30)
"""As of all codes: the logit of a pair that is not to count."""

Documents = tuple[Tensor, Tensor]
"""Document of each row [R] and each column [C], if those of one document are no negatives."""


Listed = tuple[Bounds, Tensor, Tensor]
"""A code's entries by latent: where each latent's begin and end, two of [F], their rows and values [n]."""


@triton.jit(**ANY_BOUNDS)
def _logits_of_rows(
    offsets, latents, values, starts, stops, columns, column_values, row_documents, documents, out, lse, true, bound_stride,
    first_row, first_own, n_columns, per_temperature, MASKED: tl.constexpr, MATCHES: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = out + row * n_columns
    for first in range(0, n_columns, BLOCK_C):
        column = first + tl.arange(0, BLOCK_C)
        tl.store(place + column, tl.zeros((BLOCK_C,), tl.float32), mask=column < n_columns)
    # Other threads of the program add to what this one has written.
    tl.debug_barrier()
    for entry in range(tl.load(offsets + first_row + row), tl.load(offsets + first_row + row + 1)):
        latent = tl.load(latents + entry)
        if latent >= 0:
            value = tl.load(values + entry) * per_temperature
            stop = tl.load(stops + latent * bound_stride)
            for begin in range(tl.load(starts + latent * bound_stride), stop, MATCHES):
                match = begin + tl.arange(0, MATCHES)
                at = place + tl.load(columns + match, mask=match < stop, other=0)
                product = value * tl.load(column_values + match, mask=match < stop, other=0.0)
                tl.store(at, tl.load(at, mask=match < stop, other=0.0) + product, mask=match < stop)
            tl.debug_barrier()
    own = first_own + row
    row_document = tl.load(row_documents + first_row + row) if MASKED else 0
    # Of each place in a tile by itself, until the end.
    top = tl.full((BLOCK_C,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_C,), tl.float32)
    true_logit = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, n_columns, BLOCK_C):
        column = first + tl.arange(0, BLOCK_C)
        logits = tl.load(place + column, mask=column < n_columns, other=LOWEST)
        if MASKED:
            document = tl.load(documents + column, mask=column < n_columns, other=0)
            logits = tl.where((document == row_document) & (column != own) & (column < n_columns), EXCLUDED, logits)
            tl.store(place + column, logits, mask=column < n_columns)
        higher = tl.maximum(top, logits)
        total = total * tl.exp(top - higher) + tl.exp(logits - higher)
        top = higher
        true_logit += tl.where(column == own, logits, 0.0)
    highest = tl.max(top, axis=0)
    tl.store(lse + first_row + row, highest + tl.log(tl.sum(total * tl.exp(top - highest), axis=0)))
    tl.store(true + first_row + row, tl.sum(true_logit, axis=0))


@triton.jit
def _sums_of_columns(
    logits, tops, sums, n_rows, n_columns, STRIP: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr
):
    strip = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    top = tl.full((TALL, WIDE), LOWEST, tl.float32)
    total = tl.zeros((TALL, WIDE), tl.float32)
    for first in range(0, STRIP, TALL):
        row = strip * STRIP + first + tl.arange(0, TALL)
        inside = (row < n_rows)[:, None] & (column < n_columns)[None, :]
        tile = tl.load(logits + row[:, None] * n_columns + column[None, :], mask=inside, other=LOWEST)
        higher = tl.maximum(top, tile)
        total = total * tl.exp(top - higher) + tl.exp(tile - higher)
        top = higher
    highest = tl.max(top, axis=0)
    place = strip * n_columns + column
    tl.store(tops + place, highest, mask=column < n_columns)
    tl.store(sums + place, tl.sum(total * tl.exp(top - highest[None, :]), axis=0), mask=column < n_columns)


@triton.jit
def _sums_of_strips(tops, sums, top, total, n_strips, n_columns, WIDE: tl.constexpr):
    column = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    highest = tl.full((WIDE,), LOWEST, tl.float32)
    together = tl.zeros((WIDE,), tl.float32)
    for strip in range(0, n_strips):
        place = strip * n_columns + column
        of_strip = tl.load(tops + place, mask=column < n_columns, other=LOWEST)
        higher = tl.maximum(highest, of_strip)
        added = tl.load(sums + place, mask=column < n_columns, other=0.0) * tl.exp(of_strip - higher)
        together = together * tl.exp(highest - higher) + added
        highest = higher
    tl.store(top + column, highest, mask=column < n_columns)
    tl.store(total + column, together, mask=column < n_columns)


@triton.jit(**ANY_BOUNDS)
def _through_logits(
    offsets, latents, starts, stops, columns, column_values, logits, row_lse, column_lse, out, bound_stride, first_row,
    first_own, first_column, n_columns, row_stride, column_stride, factor, MATCHES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    own = first_own + row
    place = logits + row * row_stride
    of_row = tl.load(row_lse + first_row + row)
    for entry in range(tl.load(offsets + first_row + row), tl.load(offsets + first_row + row + 1)):
        latent = tl.load(latents + entry)
        if latent >= 0:
            stop = tl.load(stops + latent * bound_stride)
            total = tl.zeros((MATCHES,), tl.float32)
            for begin in range(tl.load(starts + latent * bound_stride), stop, MATCHES):
                match = begin + tl.arange(0, MATCHES)
                # Counted among those whose logits are here.
                column = tl.load(columns + match, mask=match < stop, other=-1) - first_column
                here = (column >= 0) & (column < n_columns)
                logit = tl.load(place + column * column_stride, mask=here, other=LOWEST)
                of_column = tl.load(column_lse + first_column + column, mask=here, other=0.0)
                gradient = tl.exp(logit - of_row) + tl.exp(logit - of_column) - tl.where(column == own, 2.0, 0.0)
                total += gradient * tl.load(column_values + match, mask=here, other=0.0)
            tl.store(out + entry, tl.load(out + entry) + factor * tl.sum(total, axis=0))


def logits_of_rows(
    code: tuple[Tensor, Tensor, Tensor], rows: slice, others: Listed, n_columns: int, first_own: int, temperature: float,
    documents: Documents | None, lse: Tensor, true: Tensor,
) -> Tensor:  # fmt: skip
    """Logits of some rows of a code [R, C].

    At their places among all rows are set: in `lse` the logarithm of the sum of a row's exponentials, in `true` the logit of
    its true pair, which is column first_own + r for the r-th of these rows, 0 where there is no such column. `code` has
    offsets, latents and values as in `weighted_rows`.
    """
    offsets, latents, values = code
    n_rows = rows.stop - rows.start
    out = values.new_empty(n_rows, n_columns)
    with on_device_of(values):
        _logits_of_rows[(n_rows,)](
            offsets, latents, values, *others[0], *others[1:], *(documents or (latents, latents)), out, lse, true,
            stride_of(others[0]), rows.start, first_own, n_columns, 1 / temperature, documents is not None, MATCHES,
            COLUMNS,
        )  # fmt: skip
    return out


def sums_of_columns(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Largest of each column of logits [R, C], and the sum of exponentials relative to it; two of [C]."""
    n_rows, n_columns = logits.shape
    tops, sums = logits.new_empty(2, triton.cdiv(n_rows, STRIP), n_columns)
    with on_device_of(logits):
        _sums_of_columns[(len(tops), triton.cdiv(n_columns, WIDE))](
            logits, tops, sums, n_rows, n_columns, STRIP, TALL, WIDE
        )
        if len(tops) == 1:
            return tops[0], sums[0]
        top, total = logits.new_empty(2, n_columns)
        _sums_of_strips[(triton.cdiv(n_columns, WIDE),)](tops, sums, top, total, len(tops), n_columns, WIDE)
    return top, total


def through_logits(
    code: tuple[Tensor, Tensor], rows: slice, others: Listed, first_column: int, logits: Tensor, lse: tuple[Tensor, Tensor],
    first_own: int, factor: float, out: Tensor,
) -> None:  # fmt: skip
    """Add factor · Σ_j G_ij · others[j, latent] for each entry of some rows i of a code to `out` [n]; G is what `_contrastive_dots` says.

    The sum is over the columns j from `first_column` on whose `logits` [R, C] are given; of their transpose, the tensor's own
    strides tell. `lse` are those of all rows and of all columns, `first_own` is the true pair's column, counted among these.
    """
    offsets, latents = code
    with on_device_of(out):
        _through_logits[(len(logits),)](
            offsets, latents, *others[0], *others[1:], logits, *lse, out, stride_of(others[0]), rows.start, first_own,
            first_column, logits.shape[1], *logits.stride(), factor, MATCHES,
        )  # fmt: skip
