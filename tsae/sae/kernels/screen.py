"""The product in bfloat16 that tells which pre-activations are worth computing in float32; it never leaves the chip.

A program multiplies a tile of rows with a tile of latents, as every matrix product does, and looks at the result where it
is, in registers. What is written is a bit for each pre-activation, whether it may be above its row's guess: of a batch of
8,192 with F 16,384 that is 16 MB, where the product in float32 would be 512. For top-k, which has no guess, it is what the
largest of every 32 latents is at least.

Shapes: N rows, D activation_dim, F dict_size, W = F / 32 words, rounded up.
"""

# Triton gives kernels their own types of arguments.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from tsae.sae.kernels.launch import on_device_of

ROUNDED = 1024
"""Columns that a program rounds at a time."""
WORD = 32
"""Latents to a word of bits."""
TILE: dict[str, int] = {"BLOCK_N": 256, "BLOCK_F": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": 4}
TILE_BYTES = 200 * 1024
"""A product's tiles, and the shared memory that they want: Hopper has it. Tiles of 128 rows and 256 latents would spill registers."""
SMALL_TILE: dict[str, int] = {"BLOCK_N": 128, "BLOCK_F": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3}
"""For others."""
BAND = 8
"""Tiles of rows that are gone through together, so that what they share is in the cache."""

Rounded = tuple[Tensor, Tensor, Tensor]
"""Rows in bfloat16 [n, D], their norms and the norms of what rounding took away [n]."""


@triton.jit
def _round_rows(matrix, rounded, norms, errors, width, stride, factor, of_norm, BLOCK_D: tl.constexpr):
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
    norm = tl.sqrt(tl.maximum(tl.sum(square, axis=0), tl.sum(rounded_square, axis=0)))
    tl.store(norms + row, norm * factor)
    tl.store(errors + row, (tl.sqrt(tl.sum(error, axis=0)) + of_norm * norm) * factor)


def round_rows(matrix: Tensor, factor: float = 1.0, of_norm: float = 0.0) -> Rounded:
    """Rows [n, D] in bfloat16; the larger norm of each row before and after [n]; the norm of the difference [n].

    To the latter so much of the norm is added, then both are multiplied by `factor`.
    """
    assert matrix.stride(1) == 1
    n_rows, width = matrix.shape
    rounded = torch.empty(n_rows, width, dtype=torch.bfloat16, device=matrix.device)
    norms, errors = matrix.new_empty(n_rows), matrix.new_empty(n_rows)
    if n_rows:
        block = min(ROUNDED, triton.next_power_of_2(width))
        with on_device_of(matrix):
            _round_rows[(n_rows,)](matrix, rounded, norms, errors, width, matrix.stride(0), factor, of_norm, block)
    return rounded, norms, errors


@triton.jit
def _screen(
    x, row_norms, row_errors, weights, latent_norms, latent_errors, bias, guesses, starts, out, n_budgets, n_rows,
    n_latents, width,
    LARGEST: tl.constexpr, EVEN: tl.constexpr, LOW: tl.constexpr, WORD: tl.constexpr, BAND: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(n_latents, BLOCK_F)
    band = tl.program_id(0) // (BAND * tiles)
    rows_of_band = tl.minimum(tl.cdiv(n_rows, BLOCK_N) - band * BAND, BAND)
    within = tl.program_id(0) % (BAND * tiles)
    row = (band * BAND + within % rows_of_band) * BLOCK_N + tl.arange(0, BLOCK_N)
    latent = within // rows_of_band * BLOCK_F + tl.arange(0, BLOCK_F)
    real_row, real = row < n_rows, latent < n_latents

    d = tl.arange(0, BLOCK_D)
    # What is past the last row and latent is theirs once more.
    x_tile = x + tl.minimum(row, n_rows - 1).to(tl.int64)[:, None] * width + d[None, :]
    weight_tile = weights + tl.minimum(latent, n_latents - 1).to(tl.int64)[None, :] * width + d[:, None]
    product = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
    for first in range(0, width, BLOCK_D):
        if EVEN:
            left, right = tl.load(x_tile + first), tl.load(weight_tile + first)
        else:
            left = tl.load(x_tile + first, mask=(first + d < width)[None, :], other=0.0)
            right = tl.load(weight_tile + first, mask=(first + d < width)[:, None], other=0.0)
        product = tl.dot(left.to(LOW), right.to(LOW), product)

    row_norm, row_error = (
        tl.load(row_norms + row, mask=real_row, other=0.0),
        tl.load(row_errors + row, mask=real_row, other=0.0),
    )
    norm, error = (
        tl.load(latent_norms + latent, mask=real, other=0.0),
        tl.load(latent_errors + latent, mask=real, other=0.0),
    )
    margin = row_norm[:, None] * error[None, :] + row_error[:, None] * norm[None, :]
    # What is none is far below everything.
    value = product + tl.load(bias + latent, mask=real, other=-3e38)[None, :]
    word = within // rows_of_band * (BLOCK_F // WORD) + tl.arange(0, BLOCK_F // WORD)
    n_words = tl.cdiv(n_latents, WORD)
    place = out + row.to(tl.int64)[:, None] * n_words + word[None, :]
    written = real_row[:, None] & (word < n_words)[None, :]
    if LARGEST:
        least = tl.reshape(value - margin, (BLOCK_N, BLOCK_F // WORD, WORD))
        tl.store(place, tl.max(least, axis=2), mask=written)
    else:
        # Of the budgets that have latents in this tile, the lowest: what is listed for it in vain is dropped later.
        guess = tl.full((BLOCK_N,), float("inf"), tl.float32)
        first_latent = within // rows_of_band * BLOCK_F
        for budget in range(0, n_budgets):
            if (tl.load(starts + budget) < first_latent + BLOCK_F) & (tl.load(starts + budget + 1) > first_latent):
                of_budget = tl.load(guesses + row * n_budgets + budget, mask=real_row, other=0.0)
                guess = tl.minimum(guess, of_budget)
        above = ((value + margin > guess[:, None]) & real[None, :]).to(tl.int32)
        bits = tl.reshape(above, (BLOCK_N, BLOCK_F // WORD, WORD)) << tl.arange(0, WORD)[None, None, :]
        tl.store(place, tl.sum(bits, axis=2), mask=written)


def maybe_above(x: Rounded, latents: Rounded, bias: Tensor, guesses: Tensor, starts: Tensor) -> Tensor:
    """A bit for each pre-activation that may be above its guess [N, G] → [N, W] int32, latent l in bit l % 32 of word l // 32.

    The guess is that of its row and of the budget of its latent; budgets begin, and the last one ends, at `starts` [G + 1].
    Norms and errors are those of `x` [N, D] and of the latents [F, D], with what room sums need; `bias` [F].
    """
    out = torch.empty(len(guesses), triton.cdiv(len(bias), WORD), dtype=torch.int32, device=bias.device)
    return _screened(x, latents, bias, (guesses, starts), out)


def least_of_segments(x: Rounded, latents: Rounded, bias: Tensor) -> Tensor:
    """What the largest pre-activation of every 32 latents is at least → [N, W]; of latents and rows as above."""
    out = bias.new_empty(len(x[0]), triton.cdiv(len(bias), WORD))
    return _screened(x, latents, bias, None, out)


def _screened(x: Rounded, latents: Rounded, bias: Tensor, budgets: tuple[Tensor, Tensor] | None, out: Tensor) -> Tensor:
    (low, *_), (n_latents, width) = x, latents[0].shape
    assert low.is_contiguous()
    assert latents[0].is_contiguous()
    tile = _tile(low.device)
    # The interpreter has no product in bfloat16; in float32 it is the same.
    precision = tl.bfloat16 if low.is_cuda else tl.float32
    grid = (triton.cdiv(len(low), tile["BLOCK_N"]) * triton.cdiv(n_latents, tile["BLOCK_F"]),)
    guesses, starts = budgets or (bias, bias)  # who wants the largest has none
    if len(low):
        with on_device_of(low):
            _screen[grid](
                *x,
                *latents,
                bias,
                guesses,
                starts,
                out,
                0 if budgets is None else guesses.shape[1],
                len(low),
                n_latents,
                width,
                budgets is None,
                width % tile["BLOCK_D"] == 0,
                precision,
                WORD,
                BAND,
                **tile,
            )
    return out


@functools.cache
def _tile(device: torch.device) -> dict[str, int]:
    """What is listed does not depend on it: bits are bounds, and what is kept is computed in float32."""
    if device.type != "cuda" or torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= TILE_BYTES:  # type: ignore[attr-defined]
        return TILE
    return SMALL_TILE
