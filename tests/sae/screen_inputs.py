"""Inputs and encoders that are hard to screen."""

from __future__ import annotations

import torch
from torch import Tensor


def encoder_inputs(shape: tuple[int, int, int, int], kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, D], weight [D, F] in the memory order [F, D], bias [F]."""
    rows, width, dim, seed = shape
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(rows, dim, generator=generator), torch.randn(width, dim, generator=generator)
    bias = torch.randn(width, generator=generator)
    if kind == "worst":
        # Just below the middle of two bfloat16 numbers, all of one sign: every rounding errs most, and the same way.
        x, weight = (torch.full_like(tensor, 1 + 2.0**-8 - 2.0**-20) for tensor in (x, weight))
        bias = -0.999 * dim * (1 + torch.rand(width, generator=generator) * 0.01)
    elif kind == "scaled":
        x *= 10 ** torch.empty(rows, 1).uniform_(-4, 4, generator=generator)
        weight *= 10 ** torch.empty(width, 1).uniform_(-4, 4, generator=generator)
    elif kind == "ties":
        x, weight, bias = x.round(), weight.round(), bias.round()
    elif kind == "carried by the bias":
        x, weight, bias = -x.abs(), weight.abs(), 100 * bias.abs()
    elif kind.startswith("cancelling"):
        # The products cancel, the errors of one factor do not: the other has none and takes the sign of each error.
        sign = torch.ones(dim)
        sign[: dim // 2] = -1
        exact, rounded = sign, 1 + 2.0**-8 - sign * 2.0**-20
        factors = (rounded, exact) if kind == "cancelling inputs" else (exact, rounded)
        x, weight = (factor.expand_as(tensor).clone() for factor, tensor in zip(factors, (x, weight), strict=True))
        bias = bias.abs() * 0.003 * dim
    return x, weight.T, bias


KINDS = ["random", "worst", "scaled", "ties", "carried by the bias", "cancelling inputs", "cancelling weights"]
