"""Sums over the entries of sparse codes: decode, sampled products, weight gradients.

Tile sizes are fixed: tuning them at run time would change the order of sums.
Shapes: N rows, D activation_dim, n entries, R rows or segments of entries.
"""

# Triton gives kernels their own types of arguments.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tsae.sae.kernels.launch import on_device_of

ENTRIES = 8
"""Entries whose rows a program loads at a time."""
WIDTH = 256
"""Columns of those rows."""
SCALARS = 256
"""Single values that a program sums at a time."""
SQUARED = 1024
"""Columns whose squares a program adds at a time."""
ALL = tl.constexpr(2**31 - 1)
"""More than there are columns."""


@triton.jit
def _decoded(
    columns, values, matrix, start, stop, first_column, last_column, d, width, matrix_stride,
    BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What the entries of a row that are of some columns sum of the matrix's rows, at the places d."""
    total = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    for first in range(start, stop, BLOCK_E):
        entry = first + tl.arange(0, BLOCK_E)
        column = tl.load(columns + entry, mask=entry < stop, other=-1)
        live = (column >= first_column) & (column < last_column)
        value = tl.load(values + entry, mask=live, other=0.0)
        inside = live[:, None] & (d < width)[None, :]
        total += value[:, None] * tl.load(matrix + column[:, None] * matrix_stride + d[None, :], mask=inside, other=0.0)
    return tl.sum(total, axis=0)


# Entries of a row, or of a latent, lie from `starts` to `stops`; either may be every second of a list of bounds.
ANY_BOUNDS = {"do_not_specialize": ["bound_stride"], "do_not_specialize_on_alignment": ["starts", "stops"]}


@triton.jit(**ANY_BOUNDS)
def _weighted_rows(
    starts,
    stops,
    columns,
    values,
    matrix,
    out,
    bound_stride,
    width,
    matrix_stride,
    out_stride,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.load(starts + row * bound_stride)
    stop = tl.load(stops + row * bound_stride)
    place = out + row * out_stride + d
    if start == stop:  # of latents, most
        tl.store(place, tl.zeros((BLOCK_D,), tl.float32), mask=d < width)
    else:
        total = _decoded(columns, values, matrix, start, stop, 0, ALL, d, width, matrix_stride, BLOCK_E, BLOCK_D)
        tl.store(place, total, mask=d < width)


@triton.jit
def products(
    rows, entry, column, x, matrix, width, x_stride, matrix_stride, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr
):
    """x[row] · matrix[column] of some entries, 0 of empty ones."""
    live = column >= 0
    x_row = x + tl.load(rows + entry, mask=live, other=0) * x_stride
    matrix_row = matrix + column * matrix_stride
    total = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    # Most of a list's places are empty.
    for first in range(0, tl.where(tl.max(column, axis=0) >= 0, width, 0), BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        inside = live[:, None] & (d < width)[None, :]
        one = tl.load(x_row[:, None] + d[None, :], mask=inside, other=0.0)
        other = tl.load(matrix_row[:, None] + d[None, :], mask=inside, other=0.0)
        total += one * other
    return tl.sum(total, axis=1)


@triton.jit
def _sampled_products(
    rows,
    columns,
    x,
    matrix,
    out,
    count,
    width,
    x_stride,
    matrix_stride,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    column = tl.load(columns + entry, mask=entry < count, other=-1)
    product = products(rows, entry, column, x, matrix, width, x_stride, matrix_stride, BLOCK_E, BLOCK_D)
    tl.store(out + entry, product, mask=entry < count)


@triton.jit(**ANY_BOUNDS)
def _segment_sums(starts, stops, values, out, bound_stride, BLOCK: tl.constexpr):
    segment = tl.program_id(0).to(tl.int64)
    start = tl.load(starts + segment * bound_stride)
    stop = tl.load(stops + segment * bound_stride)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(start, stop, BLOCK):
        entry = first + tl.arange(0, BLOCK)
        total += tl.load(values + entry, mask=entry < stop, other=0.0)
    tl.store(out + segment, tl.sum(total, axis=0))


@triton.jit
def _add_rows(
    rows,
    targets,
    values,
    matrix,
    out,
    count,
    width,
    matrix_stride,
    out_stride,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    target = tl.load(targets + entry, mask=entry < count, other=-1)
    live = target >= 0
    inside = live[:, None] & (d < width)[None, :]
    row = tl.load(rows + entry, mask=live, other=0)
    value = tl.load(values + entry, mask=live, other=0.0)
    tile = tl.load(matrix + row[:, None] * matrix_stride + d[None, :], mask=inside, other=0.0)
    tl.atomic_add(out + target[:, None] * out_stride + d[None, :], value[:, None] * tile, mask=inside, sem="relaxed")


Bounds = tuple[Tensor, Tensor]
"""Where the entries of each row begin, and where they end; two of [R]."""


def weighted_rows(
    entries: Bounds, columns: Tensor, values: Tensor, matrix: Tensor, out: Tensor | None = None
) -> Tensor:
    """Row r is the sum of values[e] · matrix[columns[e]] over its entries e → [R, D].

    `columns` and `values` [n]; the rows of `matrix` and of `out` are contiguous.
    """
    n_rows, width = len(entries[0]), matrix.shape[1]
    matrix = _row_major(matrix)
    out = matrix.new_empty(n_rows, width) if out is None else out
    assert out.stride(1) == 1
    if out.numel():
        block = tile_width(width)
        with on_device_of(out):
            _weighted_rows[(n_rows, triton.cdiv(width, block))](
                *entries, columns, values, matrix, out, stride_of(entries), width, matrix.stride(0), out.stride(0), ENTRIES,
                block,
            )  # fmt: skip
    return out


def sampled_products(rows: Tensor, columns: Tensor, x: Tensor, matrix: Tensor) -> Tensor:
    """x[rows[e]] · matrix[columns[e]] for every entry e → [n]; both matrices have D columns."""
    x, matrix = _row_major(x), _row_major(matrix)
    out = x.new_empty(len(rows))
    if len(rows):
        width = x.shape[1]
        shape = (len(rows), width, x.stride(0), matrix.stride(0), ENTRIES, tile_width(width))
        with on_device_of(out):
            _sampled_products[(triton.cdiv(len(rows), ENTRIES),)](rows, columns, x, matrix, out, *shape)
    return out


def segment_sums(values: Tensor, entries: Bounds, out: Tensor | None = None) -> Tensor:
    """Sum of the values [n] of every row's entries → [R]."""
    out = values.new_empty(len(entries[0])) if out is None else out
    if len(out):
        with on_device_of(out):
            _segment_sums[(len(out),)](*entries, values, out, stride_of(entries), SCALARS)
    return out


def stride_of(entries: Bounds) -> int:
    """How far the bounds of successive rows are apart."""
    start, stop = (bound.stride(0) for bound in entries)
    assert start == stop
    return start


def add_rows(rows: Tensor, targets: Tensor, values: Tensor, matrix: Tensor, out: Tensor) -> None:
    """Add values[e] · matrix[rows[e]] to out[targets[e]], entries in any order.

    Atomic: the order of additions, hence the last bits, may differ from run to run.
    """
    assert out.stride(1) == 1
    if len(rows) and out.numel():
        matrix, width = _row_major(matrix), matrix.shape[1]
        block = tile_width(width)
        shape = (len(rows), width, matrix.stride(0), out.stride(0), ENTRIES, block)
        with on_device_of(out):
            _add_rows[(triton.cdiv(len(rows), ENTRIES), triton.cdiv(width, block))](
                rows, targets, values, matrix, out, *shape
            )


def _row_major(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def tile_width(columns: int) -> int:
    return min(WIDTH, triton.next_power_of_2(columns))


@triton.jit
def _nested_residuals(
    offsets,
    columns,
    values,
    matrix,
    x,
    starts,
    out,
    squares,
    alone,
    n_rows,
    n_parts,
    ends,
    width,
    n_tiles,
    matrix_stride,
    x_stride,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.load(offsets + row)
    stop = tl.load(offsets + row + 1)
    own = tl.load(x + row * x_stride + d, mask=d < width, other=0.0)
    residual = own
    of_group = tl.zeros((BLOCK_D,), tl.float32)
    for part in range(0, n_parts):
        first_column = tl.load(starts + part)
        last_column = tl.load(starts + part + 1)
        decoded = _decoded(
            columns, values, matrix, start, stop, first_column, last_column, d, width, matrix_stride, BLOCK_E, BLOCK_D
        )
        residual -= decoded
        of_group += decoded
        place = part * n_rows + row
        tl.store(out + place * width + d, residual, mask=d < width)
        rest = own - of_group
        tl.store(squares + place * n_tiles + tl.program_id(1), tl.sum(residual * residual, axis=0))
        tl.store(alone + place * n_tiles + tl.program_id(1), tl.sum(rest * rest, axis=0))
        # The next part begins a group.
        of_group = tl.where(((ends >> part) & 1) == 1, 0.0, of_group)


def nested_residuals(
    offsets: Tensor, columns: Tensor, values: Tensor, matrix: Tensor, x: Tensor, parts: Sequence[slice], ends: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What is left of x [R, D] after each part of the columns has been decoded, and those before it → [P, R, D].

    And the sum of its squares [P]; and that of what is left after one group of parts alone, for each of the parts, which
    is the group's at its last, of those in `ends`. The other arguments are those of `weighted_rows`.
    """
    (n_rows, width), matrix = x.shape, _row_major(matrix)
    assert x.stride(1) == 1
    block = tile_width(width)
    tiles = triton.cdiv(width, block)
    out = x.new_empty(len(parts), n_rows, width)
    sums = x.new_empty(2, len(parts), n_rows * tiles)
    if out.numel():
        starts = bounds(parts, x.device)
        last = sum(1 << end for end in ends)
        shape = (n_rows, len(parts), last, width, tiles, matrix.stride(0), x.stride(0), ENTRIES, block)
        with on_device_of(out):
            _nested_residuals[(n_rows, tiles)](offsets, columns, values, matrix, x, starts, out, *sums, *shape)
    squares, alone = sums.sum(dim=2)
    return out, squares, alone


def bounds(groups: Sequence[slice], device: torch.device) -> Tensor:
    """Where groups of latents, which follow each other, begin, and where the last one ends [G + 1]."""
    return brought((*(group.start for group in groups), groups[-1].stop), device)


@functools.cache
def brought(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers on the device, where they are brought once; they are not to be changed."""
    return torch.tensor(numbers, device=device)


@triton.jit
def _row_squares(x, shift, out, width, stride, SHIFTED: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        value = tl.load(x + row * stride + d, mask=d < width, other=0.0)
        if SHIFTED:
            value -= tl.load(shift + d, mask=d < width, other=0.0)
        total += value * value
    tl.store(out + row, tl.sum(total, axis=0))


def row_squares(x: Tensor, shift: Tensor | None) -> Tensor:
    """Sum of the squares of each row of x [R, D], less `shift` [D] → [R]."""
    n_rows, width = x.shape
    assert x.stride(1) == 1
    out = x.new_empty(n_rows)
    if n_rows:
        shape = (width, x.stride(0), shift is not None, min(SQUARED, triton.next_power_of_2(width)))
        with on_device_of(out):
            _row_squares[(n_rows,)](x, x if shift is None else shift, out, *shape)
    return out


@triton.jit
def _nested_gradients(
    residuals,
    factors,
    current,
    partner,
    out,
    squares,
    n_parts,
    n_rows,
    width,
    n_tiles,
    current_stride,
    partner_stride,
    PREDICTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < width
    total = tl.zeros((BLOCK_D,), tl.float32)
    for ended in range(0, n_parts):
        part = n_parts - 1 - ended
        place = (part * n_rows + row) * width + d
        residual = tl.load(residuals + place, mask=inside, other=0.0)
        total += tl.load(factors + part) * residual
        if PREDICTS and part == 0:
            other = tl.load(partner + row * partner_stride + d, mask=inside, other=0.0)
            further = residual + (other - tl.load(current + row * current_stride + d, mask=inside, other=0.0))
            total += tl.load(factors + n_parts) * further
            tl.store(squares + row * n_tiles + tl.program_id(1), tl.sum(further * further, axis=0))
        tl.store(out + place, total, mask=inside)


def nested_gradients(
    residuals: Tensor, factors: Tensor, pairs: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor | None]:
    """Row r of part p is the sum over q ≥ p of factors[q] · residuals[q, r] → [P, R, D].

    With `pairs`, tokens and partners [R, D], the first part's also of factors[P] times its residual of the partners; and
    the sum of the squares of that, a scalar. `factors` [P] or [P + 1].
    """
    n_parts, n_rows, width = residuals.shape
    assert residuals.is_contiguous()
    block = min(SQUARED, triton.next_power_of_2(width))
    tiles = triton.cdiv(width, block)
    out, squares = torch.empty_like(residuals), residuals.new_empty(n_rows * tiles)
    current, partner = pairs or (residuals[0], residuals[0])
    assert current.stride(1) == partner.stride(1) == 1
    if out.numel():
        shape = (n_parts, n_rows, width, tiles, current.stride(0), partner.stride(0), pairs is not None, block)
        with on_device_of(out):
            _nested_gradients[(n_rows, tiles)](residuals, factors, current, partner, out, squares, *shape)
    return out, None if pairs is None else squares.sum()
