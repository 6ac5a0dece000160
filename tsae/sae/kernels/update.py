"""Adam's update of a matrix, row by row, or of a vector.

A program has one row of the matrix, all of it: what is of no use to another row never leaves the chip. A gradient is read
twice, once for its norm and once for Adam, weights and moments are read and written once.
Shapes: D activation_dim, F dict_size.
"""

# Triton gives kernels their own types of arguments.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from tsae.sae.kernels.launch import on_device_of

FLAT = 1024
"""Numbers of a vector that a program updates."""


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
def _below_one(y):
    """1 − e^y for y ≤ 0; of 1 − 0.999^step the difference would have four digits, so near 0 it is −y (1 + y/2 (1 + y/3 …))."""
    series = 1.0 + y / 10
    for n in tl.static_range(9, 1, -1):
        series = 1.0 + y / n * series
    return tl.where(y > -0.5, -y * series, 1.0 - tl.exp(y))


@triton.jit
def _adam(
    weights, gradient, along, firsts, seconds, norm, steps, clip_norm, lr, log_first, log_second, towards_first,
    towards_second, epsilon, tiny, count, width, PROJECTED: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK)
    place = tl.program_id(0).to(tl.int64) * width + d
    inside = (d < width) & (place < count)
    g = tl.load(gradient + place, mask=inside, other=0.0)
    w = tl.load(weights + place, mask=inside, other=0.0)
    first = tl.load(firsts + place, mask=inside, other=0.0)
    second = tl.load(seconds + place, mask=inside, other=0.0)
    if PROJECTED:
        g -= tl.load(along + tl.program_id(0)) * w
    g *= tl.minimum(clip_norm / (tl.load(norm) + 1e-6), 1.0, propagate_nan=tl.PropagateNan.ALL)
    first += (g - first) * towards_first
    second += (g * g - second) * towards_second
    step = tl.load(steps) + 1
    spread = tl.sqrt(second) / tl.sqrt(_below_one(step * log_second)) + epsilon
    w -= lr / _below_one(step * log_first) * first / spread
    if UNIT:
        w = tl.where(inside, w, 0.0)
        w /= tl.sqrt(tl.sum(w * w, axis=0)) + tiny
    tl.store(weights + place, w, mask=inside)
    tl.store(firsts + place, first, mask=inside)
    tl.store(seconds + place, second, mask=inside)


def along_and_norm(gradient: Tensor, weights: Tensor, tiny: float) -> tuple[Tensor, Tensor]:
    """How much of each row of the weights [F, D] there is in the gradient's [F], and the norm of what else there is [F]."""
    n_rows, width = weights.shape
    along, norms = weights.new_empty(n_rows), weights.new_empty(n_rows)
    if n_rows:
        shape = _row_tile(width)
        with on_device_of(weights):
            _along_and_norm[(n_rows,)](gradient, weights, along, norms, width, tiny, **shape)
    return along, norms


def adam(
    weights: Tensor,
    gradient: Tensor,
    along: Tensor | None,
    moments: tuple[Tensor, Tensor],
    norm: Tensor,
    clip_norm: float,
    steps: Tensor,
    lr: float,
    betas: tuple[float, float],
    epsilon: float,
    unit: float | None,
) -> None:
    """One step of Adam on weights [F, D] or [F], contiguous as all that is like them, in place; the gradient stays.

    Of the gradient `along` [F] times the weights is subtracted, then it is clipped as the whole gradient, whose norm is given
    (a scalar), is to `clip_norm`. After so many `steps` (a scalar) moments are divided by 1 − beta^(steps + 1). With `unit`
    rows are divided by their norm plus that.
    """
    width = weights.shape[1] if weights.ndim > 1 else FLAT
    n_rows = triton.cdiv(weights.numel(), width)
    if n_rows:
        logarithms = (math.log(beta) if beta else -math.inf for beta in betas)
        rest = (1 - beta for beta in betas)
        numbers = (clip_norm, lr, *logarithms, *rest, epsilon, 0.0 if unit is None else unit, weights.numel(), width)
        tensors = (weights, gradient, weights if along is None else along, *moments, norm, steps)
        with on_device_of(weights):
            _adam[(n_rows,)](*tensors, *numbers, along is not None, unit is not None, **_row_tile(width))


def _row_tile(width: int) -> dict[str, int]:
    """A tile that holds a row, and warps enough that a thread has few numbers of it."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 256))}
