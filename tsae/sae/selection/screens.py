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

from tsae.runtime.phases import phase
from tsae.sae.kernels import kernels_for
from tsae.sae.kernels.margin import Margin

SEGMENT = 64
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
        return self._refined(x, *self.candidates(x, guess, None, block_rows, listing), guess)

    def largest_of_rows(self, x: Tensor, k: int, block_rows: int, listing: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The same for the k largest positive pre-activations of each row."""
        return keep_largest(*self._refined(x, *self.candidates(x, 0.0, k, block_rows, listing), 0.0), k)

    def candidates(
        self, x: Tensor, guess: float, k: int | None, block_rows: int, listing: Any
    ) -> tuple[Tensor, Tensor]:
        """Row and latent of all pre-activations that may exceed `guess` and, if given, be among their row's k largest.

        Ascending by row and latent.
        """
        low = round_rows(x)
        guesses = x.new_full((len(x),), guess * (1 - SLACK))

        def products() -> Iterator[Tensor]:
            for start in range(0, len(x), block_rows):
                rows = slice(start, start + block_rows)
                product = _product(low.rows[rows], self._low)
                if k is not None:
                    guesses[rows] = self._least_of_largest(product, low.norms[rows], low.errors[rows], k)
                yield product

        if listing is not None:
            margin = Margin(self.bias, low.norms, low.errors, self._norms, self._errors)
            rows, latents, _ = listing.above(guesses, products, len(self.bias), margin)
            return rows, latents
        found, start = [], 0
        for upper in products():
            rows = slice(start, start + len(upper))
            upper.add_(self.bias)
            upper.addcmul_(low.norms[rows, None], self._errors).addcmul_(low.errors[rows, None], self._norms)
            row, latent = (upper > guesses[rows, None]).nonzero(as_tuple=True)
            found.append((row + start, latent))
            start += len(upper)
        rows, latents = (torch.cat(parts) for parts in zip(*found, strict=True))
        return rows, latents

    def _least_of_largest(self, product: Tensor, norms: Tensor, errors: Tensor, k: int) -> Tensor:
        """What each row's k-th largest pre-activation is at least, or 0 [n]; from a screened product [n, F]."""
        screened = product + self.bias
        whole = screened.shape[1] // SEGMENT * SEGMENT
        if whole >= k * SEGMENT:
            # As many entries as segments reach the k-th largest of the segments' maxima.
            screened = screened[:, :whole].unflatten(1, (-1, SEGMENT)).amax(dim=2)
        kth = screened.topk(min(k, screened.shape[1]), dim=1).values[:, -1]
        margin = norms * self._errors.max() + errors * self._norms.max()
        return (kth - margin).clamp_min_(0).mul_(1 - SLACK)

    def _refined(self, x: Tensor, rows: Tensor, latents: Tensor, guess: float) -> tuple[Tensor, Tensor, Tensor]:
        """The candidates whose float32 value exceeds the guess."""
        values = products_at(rows, latents, x, self.latents) + self.bias[latents]
        above = (values > guess).nonzero()[:, 0]
        return rows[above], latents[above], values[above]


def keep_largest(rows: Tensor, latents: Tensor, values: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of entries that ascend by row and latent, the k largest of each row, in the same order."""
    # By row and then by value; ties stay in the order of latents.
    falling = values.argsort(descending=True, stable=True)
    order = falling[rows[falling].argsort(stable=True)]
    first = torch.searchsorted(rows, rows)
    kept = order[torch.arange(len(rows), device=rows.device) - first < k].sort().values
    return rows[kept], latents[kept], values[kept]


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
