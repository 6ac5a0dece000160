"""InfoNCE of sparse codes, without its logits: each is made on the chip, used there, and made again when it is needed again.

The logits of a row are its few entries' values times as many rows of the other codes, dense by latent:

    S_ij = Σ over the entries e of row i of values[e] · columns[latents[e], j] / temperature.

One program has one row. It goes through the row's logits a tile at a time, which costs as many reads as the row has
entries (what they are is read once, if they are not more than a program has at a time), and keeps two numbers: the largest so far, and the sum of exponentials relative to it. What a [B, B] array would
hold, 256 MB for a batch of 8,192, never leaves the chip. The other direction is the same with the codes exchanged.

Shapes: n entries, R rows of the codes, h latents, C columns: rows of the other codes.
"""

# Triton gives kernels their own types of arguments.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tsae.sae.kernels.launch import on_device_of

ENTRIES = 8
"""Entries of a row whose numbers a program has at a time; of most rows all."""
COLUMNS = 128
"""Logits of a row that a program makes at a time."""
OPTIONS = {"num_warps": 1}
"""A warp has a row for itself, so that sums over its entries need no other's."""

Documents = tuple[Tensor, Tensor]
"""Document of each row [R] and each column [C], if those of one document are no negatives."""


@triton.jit
def _last(latents, start, stop, BLOCK_E: tl.constexpr):
    """Where a row's entries end, but for empty ones at its end: among high-level latents, most of them."""
    last = start
    for first in range(start, stop, BLOCK_E):
        entry = first + tl.arange(0, BLOCK_E)
        latent = tl.load(latents + entry, mask=entry < stop, other=-1)
        last = tl.maximum(last, tl.max(tl.where(latent >= 0, entry + 1, start), axis=0))
    return last


@triton.jit
def _products(
    latents, values, columns, start, stop, but, column, n_columns, stride, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Products of a row and the other codes [C], without its entries of one block."""
    total = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(start, stop, BLOCK_E):
        if first != but:
            entry = first + tl.arange(0, BLOCK_E)
            latent = tl.load(latents + entry, mask=entry < stop, other=-1)
            value = tl.load(values + entry, mask=latent >= 0, other=0.0)
            total += tl.sum(value[:, None] * _tile(columns, latent, column, n_columns, stride), axis=0)
    return total


@triton.jit
def _tile(columns, latent, column, n_columns, stride):
    """The other codes at some latents and columns; 0 for empty entries."""
    inside = (latent >= 0)[:, None] & (column < n_columns)[None, :]
    return tl.load(columns + latent[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def _logits(products, row_document, documents, column, own, n_columns, per_temperature, MASKED: tl.constexpr):
    logits = products * per_temperature
    if MASKED:
        document = tl.load(documents + column, mask=column < n_columns, other=0)
        # As of all codes: a pair that is not to count.
        logits = tl.where((document == row_document) & (column != own), -1e30, logits)
    return tl.where(column < n_columns, logits, -3e38)


@triton.jit
def _log_sums(
    offsets, latents, values, columns, row_documents, documents, tops, sums, true, first_own, n_columns, stride,
    per_temperature, MASKED: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    own = first_own + row
    start = tl.load(offsets + row)
    stop = _last(latents, start, tl.load(offsets + row + 1), BLOCK_E)
    row_document = tl.load(row_documents + row) if MASKED else 0
    entry = start + tl.arange(0, BLOCK_E)
    latent = tl.load(latents + entry, mask=entry < stop, other=-1)
    value = tl.load(values + entry, mask=latent >= 0, other=0.0)
    # Of each place in a tile by itself, until the end.
    top = tl.full((BLOCK_C,), -3e38, tl.float32)
    total = tl.zeros((BLOCK_C,), tl.float32)
    true_logit = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, n_columns, BLOCK_C):
        column = first + tl.arange(0, BLOCK_C)
        products = tl.sum(value[:, None] * _tile(columns, latent, column, n_columns, stride), axis=0)
        if start + BLOCK_E < stop:  # of few rows: those that have more live entries
            products += _products(
                latents, values, columns, start, stop, start, column, n_columns, stride, BLOCK_E, BLOCK_C
            )
        logits = _logits(products, row_document, documents, column, own, n_columns, per_temperature, MASKED)
        higher = tl.maximum(top, logits)
        total = total * tl.exp(top - higher) + tl.exp(logits - higher)
        top = higher
        true_logit += tl.where(column == own, logits, 0.0)
    highest = tl.max(top, axis=0)
    tl.store(tops + row, highest)
    tl.store(sums + row, tl.sum(total * tl.exp(top - highest), axis=0))
    tl.store(true + row, tl.sum(true_logit, axis=0))


@triton.jit
def _through_logits(
    offsets, latents, values, columns, row_documents, documents, row_lse, column_lse, out, first_own, n_columns, stride,
    per_temperature, MASKED: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    own = first_own + row
    start = tl.load(offsets + row)
    stop = _last(latents, start, tl.load(offsets + row + 1), BLOCK_E)
    row_document = tl.load(row_documents + row) if MASKED else 0
    of_row = tl.load(row_lse + row)
    for first_entry in range(start, stop, BLOCK_E):
        entry = first_entry + tl.arange(0, BLOCK_E)
        latent = tl.load(latents + entry, mask=entry < stop, other=-1)
        value = tl.load(values + entry, mask=latent >= 0, other=0.0)
        total = tl.zeros((BLOCK_E, BLOCK_C), tl.float32)
        for first in range(0, n_columns, BLOCK_C):
            column = first + tl.arange(0, BLOCK_C)
            tile = _tile(columns, latent, column, n_columns, stride)
            products = tl.sum(value[:, None] * tile, axis=0)
            if start + BLOCK_E < stop:
                products += _products(
                    latents, values, columns, start, stop, first_entry, column, n_columns, stride, BLOCK_E, BLOCK_C
                )
            logits = _logits(products, row_document, documents, column, own, n_columns, per_temperature, MASKED)
            of_column = tl.load(column_lse + column, mask=column < n_columns, other=0.0)
            gradient = tl.exp(logits - of_row) + tl.exp(logits - of_column) - tl.where(column == own, 2.0, 0.0)
            total += gradient[None, :] * tile
        tl.store(out + entry, tl.sum(total, axis=1), mask=latent >= 0)


def log_sums(
    offsets: Tensor, latents: Tensor, values: Tensor, columns: Tensor, first: int, temperature: float, documents: Documents | None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Largest logit of each row, sum of exponentials relative to it, and its true pair's logit, which row r has at first + r.

    Three of [R], the last 0 where there is no such column. `columns` [h, C]; codes as in `weighted_rows`.
    """
    n_rows = len(offsets) - 1
    tops, sums, true = (values.new_empty(n_rows) for _ in range(3))
    given = (offsets, latents, values, columns, *(documents or (latents, latents)))
    with on_device_of(values):
        _log_sums[(n_rows,)](
            *given, tops, sums, true, first, columns.shape[1], columns.stride(0), 1 / temperature,
            documents is not None, ENTRIES, COLUMNS, **OPTIONS,
        )  # fmt: skip
    return tops, sums, true


def through_logits(
    offsets: Tensor, latents: Tensor, values: Tensor, columns: Tensor, first: int, temperature: float, documents: Documents | None,
    row_lse: Tensor, column_lse: Tensor,
) -> Tensor:  # fmt: skip
    """Σ_j G_ij · columns[latent, j] for each entry of each row i → [n], 0 for empty ones; G is what `_contrastive_dots` says.

    `row_lse` [R] and `column_lse` [C] are the logarithms of the sums of exponentials of the logits' rows and columns.
    """
    n_rows, out = len(offsets) - 1, values.new_zeros(len(values))
    given = (offsets, latents, values, columns, *(documents or (latents, latents)))
    with on_device_of(values):
        _through_logits[(n_rows,)](
            *given, row_lse, column_lse, out, first, columns.shape[1], columns.stride(0), 1 / temperature,
            documents is not None, ENTRIES, COLUMNS, **OPTIONS,
        )  # fmt: skip
    return out
