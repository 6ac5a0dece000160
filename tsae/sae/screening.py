"""Float32 selections at the speed of a bfloat16 product: screen every pre-activation, refine the few that matter.

The product of inputs and weights rounded to bfloat16 differs from the true one by no more than a margin that follows
from Cauchy-Schwarz and the norms of what the rounding took away. Whatever may exceed the guess within its margin is
computed again in float32, so no entry above the guess is missed and no rounded value is kept.

Shapes: N rows, D activation_dim, F dict_size, n candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tsae.phases import phase
from tsae.sae.kernels import kernels_for
from tsae.sae.kernels.margin import Margin

CHUNK_BYTES = 256 * 2**20
"""Bytes of a matrix that torch's operations round at a time."""
SLACK = 1e-5
"""Relative room for rounding in the margin's own arithmetic."""


class Rounded(NamedTuple):
    """Rows of a matrix in bfloat16 and the size of what rounding took away."""

    rows: Tensor
    """[n, D] bfloat16."""
    norms: Tensor
    """Norm of each row, before or after, whichever is larger [n]."""
    errors: Tensor
    """Norm of each row's difference [n]."""


def round_rows(matrix: Tensor) -> Rounded:
    """Round a float32 matrix [n, D]."""
    kernels = kernels_for(matrix)
    if kernels is not None:
        return Rounded(*kernels.round_rows(matrix))
    chunk = max(1, CHUNK_BYTES // (4 * matrix.shape[1]))
    parts = []
    for rows in matrix.split(chunk):
        low = rows.bfloat16()
        near = low.float()
        norms = torch.maximum(rows.norm(dim=1), near.norm(dim=1))
        parts.append((low, norms, near.sub_(rows).norm(dim=1)))
    return Rounded(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


class Screen:
    """The encoder's weight [D, F] and bias [F], ready to screen any number of inputs."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.latents, self.bias = weight.T.contiguous(), bias
        rounded = round_rows(self.latents)
        self._low = rounded.rows.T
        # Both products add up D terms, in the worst order losing 2^-23 (tensor cores, screen) and 2^-24 (refinement)
        # of the norms' product at each; together less than this.
        accumulation = len(weight) * 2.0**-22
        self._norms = rounded.norms * (1 + SLACK)
        self._errors = (rounded.errors + accumulation * rounded.norms) * (1 + SLACK)

    def entries_above(self, x: Tensor, guess: float, block_rows: int, listing: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Row, latent and float32 value of every pre-activation of x [N, D] above `guess` ≥ 0, ascending.

        `listing` is the `Candidates` of the kernels, None where torch's operations list them.
        """
        rows, latents = self._may_exceed(x, guess * (1 - SLACK), block_rows, listing)
        values = products_at(rows, latents, x, self.latents) + self.bias[latents]
        above = (values > guess).nonzero()[:, 0]
        return rows[above], latents[above], values[above]

    def _may_exceed(self, x: Tensor, guess: float, block_rows: int, listing: Any) -> tuple[Tensor, Tensor]:
        low = round_rows(x)
        if listing is not None:
            margin = Margin(self.bias, low.norms, low.errors, self._norms, self._errors)

            def products() -> Iterator[Tensor]:
                return (_product(rows, self._low) for rows in low.rows.split(block_rows))

            rows, latents, _ = listing.above(guess, products, len(x), len(self.bias), x.device, margin)
            return rows, latents
        found = []
        for start in range(0, len(x), block_rows):
            rows = slice(start, start + block_rows)
            upper = _product(low.rows[rows], self._low).add_(self.bias)
            upper.addcmul_(low.norms[rows, None], self._errors).addcmul_(low.errors[rows, None], self._norms)
            row, latent = (upper > guess).nonzero(as_tuple=True)
            found.append((row + start, latent))
        rows, latents = (torch.cat(parts) for parts in zip(*found, strict=True))
        return rows, latents


def products_at(rows: Tensor, latents: Tensor, x: Tensor, matrix: Tensor) -> Tensor:
    """x[rows] · matrix[latents] for each entry, in float32 → [n]."""
    kernels = kernels_for(x)
    if kernels is not None:
        return kernels.sampled_products(rows, latents, x, matrix)
    chunk = max(1, CHUNK_BYTES // (4 * x.shape[1]))
    pairs = zip(rows.split(chunk), latents.split(chunk), strict=True)
    return torch.cat([torch.linalg.vecdot(x[row], matrix[latent]) for row, latent in pairs])


@phase("encoder product")
def _product(x: Tensor, weight: Tensor) -> Tensor:
    """bfloat16 x [n, D] @ weight [D, F], accumulated and kept in float32."""
    if x.is_cuda:
        return torch.mm(x, weight, out_dtype=torch.float32)
    # The same numbers up to the order of sums: products of bfloat16 numbers are exact in float32.
    return x.float() @ weight.float()
