"""Triton kernels, and what launches them; each function returns the same as its torch counterpart.

Sums over the entries of sparse codes (decode, sampled products, weight gradients), rounding to bfloat16, the list of
pre-activations above guesses, and the update of a matrix. Imported by `tsae.sae.sparse.kernels_for` alone, and only where they run.

An entry whose column, or target, is −1 is empty: nothing is read for it, and what is computed for it is 0.

Every sum but `add_rows` has a fixed order, so results are the same bits in every run. Tile sizes are fixed as well:
tuning them at run time would change the order.
Shapes: N rows, D activation_dim, F dict_size, n entries or candidates, R rows or segments of entries.
"""

# Triton gives kernels their own types of arguments.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ENTRIES = 8
"""Entries whose rows a program loads at a time."""
WIDTH = 256
"""Columns of those rows."""
SCALARS = 256
"""Single values that a program sums at a time."""
ROUNDED = 1024
"""Columns that a program rounds at a time."""
LATENTS = 1024
"""Pre-activations that a program looks at, at a time."""
FIRST_ROOM = 64
"""Entries per row that the first list has room for."""

Margin = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float]
"""What makes a screened product an upper bound of the true one: bias [F], added to every row; norms and errors of rows
[N] and of latents [F]; how far a product in bfloat16 can be from what was rounded to it, relative to itself. Before that
it differs by row_norm · latent_error + row_error · latent_norm at most."""


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one: Triton launches there, wherever the arguments are."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@triton.jit
def _weighted_rows(
    offsets,
    columns,
    values,
    matrix,
    out,
    first_column,
    n_columns,
    width,
    matrix_stride,
    out_stride,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.load(offsets + row)
    stop = tl.load(offsets + row + 1)
    total = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    for first in range(start, stop, BLOCK_E):
        entry = first + tl.arange(0, BLOCK_E)
        live = entry < stop
        column = tl.load(columns + entry, mask=live, other=-1) - first_column
        live &= (column >= 0) & (column < n_columns)
        value = tl.load(values + entry, mask=live, other=0.0)
        tile = tl.load(
            matrix + column[:, None] * matrix_stride + d[None, :], mask=live[:, None] & (d < width)[None, :], other=0.0
        )
        total += value[:, None] * tile
    tl.store(out + row * out_stride + d, tl.sum(total, axis=0), mask=d < width)


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
    live = column >= 0
    x_row = x + tl.load(rows + entry, mask=live, other=0) * x_stride
    matrix_row = matrix + column * matrix_stride
    total = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    for first in range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        inside = live[:, None] & (d < width)[None, :]
        one = tl.load(x_row[:, None] + d[None, :], mask=inside, other=0.0)
        other = tl.load(matrix_row[:, None] + d[None, :], mask=inside, other=0.0)
        total += one * other
    tl.store(out + entry, tl.sum(total, axis=1), mask=entry < count)


@triton.jit
def _segment_sums(offsets, values, out, BLOCK: tl.constexpr):
    segment = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets + segment)
    stop = tl.load(offsets + segment + 1)
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
    tl.atomic_add(out + target[:, None] * out_stride + d[None, :], value[:, None] * tile, mask=inside)


def weighted_rows(
    offsets: Tensor, columns: Tensor, values: Tensor, matrix: Tensor, out: Tensor | None = None, first: int = 0
) -> Tensor:
    """Row r is the sum of values[e] · matrix[columns[e] − first] over e in offsets[r] … offsets[r + 1] → [R, D].

    Of the entries whose column the matrix has, that is. `columns` and `values` [n], `offsets` [R + 1]; the rows of `matrix` and of `out` are contiguous.
    """
    n_rows, width = len(offsets) - 1, matrix.shape[1]
    matrix = _row_major(matrix)
    out = matrix.new_empty(n_rows, width) if out is None else out
    assert out.stride(1) == 1
    if out.numel():
        block = _width(width)
        with on_device_of(out):
            _weighted_rows[(n_rows, triton.cdiv(width, block))](
                offsets, columns, values, matrix, out, first, len(matrix), width, matrix.stride(0), out.stride(0),
                ENTRIES, block,
            )  # fmt: skip
    return out


def sampled_products(rows: Tensor, columns: Tensor, x: Tensor, matrix: Tensor) -> Tensor:
    """x[rows[e]] · matrix[columns[e]] for every entry e → [n]; both matrices have D columns."""
    x, matrix = _row_major(x), _row_major(matrix)
    out = x.new_empty(len(rows))
    if len(rows):
        width = x.shape[1]
        shape = (len(rows), width, x.stride(0), matrix.stride(0), ENTRIES, _width(width))
        with on_device_of(out):
            _sampled_products[(triton.cdiv(len(rows), ENTRIES),)](rows, columns, x, matrix, out, *shape)
    return out


def segment_sums(values: Tensor, offsets: Tensor) -> Tensor:
    """Sum of values[offsets[r]] … values[offsets[r + 1] − 1] for every segment r → [R]."""
    out = values.new_empty(len(offsets) - 1)
    if len(out):
        with on_device_of(out):
            _segment_sums[(len(out),)](offsets, values, out, SCALARS)
    return out


def add_rows(rows: Tensor, targets: Tensor, values: Tensor, matrix: Tensor, out: Tensor) -> None:
    """Add values[e] · matrix[rows[e]] to out[targets[e]], entries in any order.

    Atomic: the order of additions, hence the last bits, may differ from run to run.
    """
    assert out.stride(1) == 1
    if len(rows) and out.numel():
        matrix, width = _row_major(matrix), matrix.shape[1]
        block = _width(width)
        shape = (len(rows), width, matrix.stride(0), out.stride(0), ENTRIES, block)
        with on_device_of(out):
            _add_rows[(triton.cdiv(len(rows), ENTRIES), triton.cdiv(width, block))](
                rows, targets, values, matrix, out, *shape
            )


def _row_major(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _width(columns: int) -> int:
    return min(WIDTH, triton.next_power_of_2(columns))


@triton.jit
def _round_rows(matrix, rounded, norms, errors, width, stride, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    square = tl.zeros((BLOCK_D,), tl.float32)
    rounded_square = tl.zeros((BLOCK_D,), tl.float32)
    error = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        value = tl.load(matrix + row * stride + d, mask=d < width, other=0.0)
        low = value.to(tl.bfloat16)
        tl.store(rounded + row * width + d, low, mask=d < width)
        near = low.to(tl.float32)
        square += value * value
        rounded_square += near * near
        error += (value - near) * (value - near)
    tl.store(norms + row, tl.sqrt(tl.maximum(tl.sum(square, axis=0), tl.sum(rounded_square, axis=0))))
    tl.store(errors + row, tl.sqrt(tl.sum(error, axis=0)))


def round_rows(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [n, D] in bfloat16; the larger norm of each row before and after [n]; the norm of the difference [n]."""
    assert matrix.stride(1) == 1
    n_rows, width = matrix.shape
    rounded = torch.empty(n_rows, width, dtype=torch.bfloat16, device=matrix.device)
    norms, errors = matrix.new_empty(n_rows), matrix.new_empty(n_rows)
    if n_rows:
        block = min(ROUNDED, triton.next_power_of_2(width))
        with on_device_of(matrix):
            _round_rows[(n_rows,)](matrix, rounded, norms, errors, width, matrix.stride(0), block)
    return rounded, norms, errors


# The list of entries above guesses needs no atomics and does not wait for the GPU: one program takes one row; a first
# pass counts its entries, a second writes them from where the rows before it end. So the list ascends by row and latent,
# and is the same in every run. In the kernels below a `row` is counted within its block, and `first_row` is the number
# of the block's first row.


@triton.jit
def _value(block, row, latent, width, stride):
    return tl.load(block + row * stride + latent, mask=latent < width, other=float("-inf")).to(tl.float32)


@triton.jit
def _upper_bound(
    value, row, latent, width, bias, row_norms, row_errors, latent_norms, latent_errors,
    MARGIN: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    if MARGIN:
        norm = tl.load(latent_norms + latent, mask=latent < width, other=0.0)
        error = tl.load(latent_errors + latent, mask=latent < width, other=0.0)
        value += tl.where(latent < width, tl.abs(value) * ROUNDING, 0.0)
        value += tl.load(bias + latent, mask=latent < width, other=0.0)
        value += tl.load(row_norms + row) * error + tl.load(row_errors + row) * norm
    return value


@triton.jit
def _count(
    block, bias, row_norms, row_errors, latent_norms, latent_errors, counts,
    guesses, first_row, width, stride, MARGIN: tl.constexpr, BLOCK: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    guess = tl.load(guesses + first_row + row)
    found = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, width, BLOCK):
        latent = first + tl.arange(0, BLOCK)
        upper = _upper_bound(
            _value(block, row, latent, width, stride), first_row + row, latent, width,
            bias, row_norms, row_errors, latent_norms, latent_errors, MARGIN, ROUNDING,
        )  # fmt: skip
        found += (upper > guess).to(tl.int32)
    tl.store(counts + row, tl.sum(found, axis=0).to(tl.int64))


@triton.jit
def _write(
    block, bias, row_norms, row_errors, latent_norms, latent_errors, starts, rows, latents, values, capacity,
    guesses, first_row, width, stride, MARGIN: tl.constexpr, BLOCK: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    guess = tl.load(guesses + first_row + row)
    place = tl.load(starts + row)
    for first in range(0, width, BLOCK):
        latent = first + tl.arange(0, BLOCK)
        value = _value(block, row, latent, width, stride)
        upper = _upper_bound(
            value, first_row + row, latent, width,
            bias, row_norms, row_errors, latent_norms, latent_errors, MARGIN, ROUNDING,
        )  # fmt: skip
        chosen = (upper > guess).to(tl.int32)
        target = place + tl.cumsum(chosen, axis=0) - 1
        fits = (chosen > 0) & (target < capacity)
        tl.store(rows + target, first_row + row, mask=fits)
        tl.store(latents + target, latent.to(tl.int64), mask=fits)
        tl.store(values + target, value, mask=fits)
        place += tl.sum(chosen, axis=0)


class Candidates:
    """Lists entries above guesses; remembers how long the lists were (`capacity`), since room is made before they are counted."""

    def __init__(self) -> None:
        self.capacity = 0

    def above(
        self,
        guesses: Tensor,
        blocks: Callable[[], Iterable[Tensor]],
        width: int,
        margin: Margin | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Row, latent and value [n] of the pre-activations above their row's guess [N], ascending.

        `blocks` makes pre-activations: [rows, ≥ width] one after the other, once more if there was not enough room; a
        row's guess may still change until its block is there. With a margin the blocks are products in bfloat16,
        without bias; what may be above the guess is listed with its product.
        """
        while True:
            listed = self.list(guesses, blocks(), width, margin)
            # The only place that waits for the GPU.
            count = int(listed.found)
            if count <= listed.capacity:
                return listed.rows[:count], listed.latents[:count], listed.values[:count]
            self.make_room(count)

    def list(
        self, guesses: Tensor, blocks: Iterable[Tensor], width: int, margin: Margin | None = None, least: int = 0
    ) -> List:
        """The same, perhaps not all of them: as many as there was room for, which is `least` at least."""
        self.capacity = max(self.capacity, FIRST_ROOM * len(guesses), least)
        listed = List(self.capacity, guesses)
        for block in blocks:
            listed.add(block, width, margin)
        return listed

    def make_room(self, found: int) -> None:
        """Have room for so many, and some more, from now on."""
        self.capacity = max(self.capacity, found + found // 4)


class List:
    """Room for `capacity` entries, empty at first; what is found beyond that is counted, not kept."""

    def __init__(self, capacity: int, guesses: Tensor) -> None:
        self.capacity, self.guesses, self.next_row = capacity, guesses, 0
        device = guesses.device
        self.found = torch.zeros(1, dtype=torch.int64, device=device)
        self.rows = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.latents = torch.full_like(self.rows, -1)
        self.values = torch.empty(capacity, device=device)

    def add(self, block: Tensor, width: int, margin: Margin | None) -> None:
        """List what is above the guesses in the next rows."""
        if len(block) == 0:
            return
        counts = torch.empty(len(block), dtype=torch.int64, device=block.device)
        # Without a margin these are never read, but kernels want pointers all the same.
        *given, rounding = margin or (*(block,) * 5, 0.0)
        shape = (self.guesses, self.next_row, width, block.stride(0), margin is not None)
        grid, tile = (len(block),), min(LATENTS, triton.next_power_of_2(width))
        # Fused multiply-adds could make the two passes disagree about an entry at the very edge.
        with on_device_of(block):
            _count[grid](block, *given, counts, *shape, tile, rounding, enable_fp_fusion=False)
        ends = counts.cumsum(0) + self.found
        room = (ends - counts, self.rows, self.latents, self.values, self.capacity)
        with on_device_of(block):
            _write[grid](block, *given, *room, *shape, tile, rounding, enable_fp_fusion=False)
        self.found = ends[-1:]
        self.next_row += len(block)


# Of the update, a program has one row of the matrix, all of it: what is of no use to another row never leaves the chip.
# A gradient is read twice, once for its norm and once for Adam, weights and moments are read and written once.


@triton.jit
def _along_and_norm(gradient, weights, along, norms, width, tiny, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    g = tl.load(gradient + row * width + d, mask=d < width, other=0.0)
    w = tl.load(weights + row * width + d, mask=d < width, other=0.0)
    length = tl.sqrt(tl.sum(w * w, axis=0)) + tiny
    share = tl.sum(g * w, axis=0) / (length * length)
    g -= share * w
    tl.store(along + row, share)
    tl.store(norms + row, tl.sqrt(tl.sum(g * g, axis=0)))


@triton.jit
def _adam(
    weights, gradient, along, firsts, seconds, factor, corrections, lr, towards_first, towards_second, epsilon, tiny, width,
    PROJECTED: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK)
    place = tl.program_id(0).to(tl.int64) * width + d
    g = tl.load(gradient + place, mask=d < width, other=0.0)
    w = tl.load(weights + place, mask=d < width, other=0.0)
    first = tl.load(firsts + place, mask=d < width, other=0.0)
    second = tl.load(seconds + place, mask=d < width, other=0.0)
    if PROJECTED:
        g -= tl.load(along + tl.program_id(0)) * w
    g *= tl.load(factor)
    first += (g - first) * towards_first
    second += (g * g - second) * towards_second
    pace = lr / tl.load(corrections).to(tl.float32)
    spread = tl.sqrt(second) / tl.sqrt(tl.load(corrections + 1).to(tl.float32)) + epsilon
    w -= pace * first / spread
    if UNIT:
        w = tl.where(d < width, w, 0.0)
        w /= tl.sqrt(tl.sum(w * w, axis=0)) + tiny
    tl.store(weights + place, w, mask=d < width)
    tl.store(firsts + place, first, mask=d < width)
    tl.store(seconds + place, second, mask=d < width)


def along_and_norm(gradient: Tensor, weights: Tensor, tiny: float) -> tuple[Tensor, Tensor]:
    """How much of each row of the weights [F, D] there is in the gradient's [F], and the norm of what else there is [F]."""
    n_rows, width = weights.shape
    along, norms = weights.new_empty(n_rows), weights.new_empty(n_rows)
    if n_rows:
        shape = _row_tile(width)
        with on_device_of(weights):
            _along_and_norm[(n_rows,)](gradient, weights, along, norms, width, tiny, **shape)
    return along, norms


def adam_rows(
    weights: Tensor,
    gradient: Tensor,
    along: Tensor | None,
    moments: tuple[Tensor, Tensor],
    factor: Tensor,
    corrections: Tensor,
    lr: float,
    betas: tuple[float, float],
    epsilon: float,
    unit: float | None,
) -> None:
    """One step of Adam on weights [F, D], contiguous as all that is like them, in place; the gradient stays.

    Of the gradient `along` [F] times the weights is subtracted, then it is multiplied by `factor`, a scalar. `corrections`
    [2] are what the moments are divided by, 1 − beta^step. With `unit` rows are divided by their norm plus that.
    """
    n_rows, width = weights.shape
    if n_rows:
        rest = tuple(1 - beta for beta in betas)
        numbers = (lr, *rest, epsilon, 0.0 if unit is None else unit, width)
        tensors = (weights, gradient, weights if along is None else along, *moments, factor, corrections)
        with on_device_of(weights):
            _adam[(n_rows,)](*tensors, *numbers, along is not None, unit is not None, **_row_tile(width))


def _row_tile(width: int) -> dict[str, int]:
    """A tile that holds a row, and warps enough that a thread has few numbers of it."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 256))}
