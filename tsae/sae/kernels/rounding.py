"""Triton kernel that rounds the rows of a matrix to bfloat16 and measures what that changed."""

# Triton gives kernels their own types of arguments.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tsae.sae.kernels.launch import on_device_of

WIDTH = 1024


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
        block = min(WIDTH, triton.next_power_of_2(width))
        with on_device_of(matrix):
            _round_rows[(n_rows,)](matrix, rounded, norms, errors, width, matrix.stride(0), block)
    return rounded, norms, errors
