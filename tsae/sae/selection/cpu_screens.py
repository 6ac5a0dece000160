"""The bfloat16 screen of `tsae.sae.selection.screens` on processors with matrix units (AMX): same bound, torch's operations.

There a bfloat16 product takes a seventh of a float32 one, and reading its result becomes the larger part. So the result
stays in bfloat16, and runs of 64 latents are judged by their largest entry before any single entry is.

Shapes: N rows, D activation_dim, F dict_size, S runs of latents, n candidates.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tsae.runtime.phases import phase
from tsae.sae.selection.screens import SLACK, Rounded, keep_largest
from tsae.sae.sparse import from_entries, sampled_products

RUN = 64
CHUNK_BYTES = 512 * 2**10
"""Bytes of a matrix that are rounded at a time, so that they stay in the cache."""
BLOCK_BYTES, BLOCK_ROWS = 32 * 2**20, 512
HALF_UNIT = 2.0**-8 * 1.01
"""How far, relative to itself, a number in bfloat16 can be from what was rounded to it."""
FEWEST_WEIGHTS, FEWEST_ROWS = 2**20, 512
"""Smaller encoders, and fewer inputs for one rounding of the weights, are not worth a screen."""


class Memory:
    """Scratch tensors that are kept between steps: fresh pages cost as much as filling them."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """An uninitialised bfloat16 tensor; what was taken under the same name before is overwritten."""
        size = 1
        for length in shape:
            size *= length
        kept = self._kept.get(name)
        if kept is None or kept.numel() < size:
            kept = self._kept[name] = torch.empty(size, dtype=torch.bfloat16)
        return kept[:size].view(shape)


class CpuScreen:
    """The encoder's weight [D, F] and bias [F], ready to screen any number of inputs."""

    def __init__(self, weight: Tensor, bias: Tensor, memory: Memory) -> None:
        self._latents, self._bias, self._memory = weight.T.contiguous(), bias, memory
        rounded = round_rows(self._latents, memory.take("weight", *self._latents.shape))
        self._low = rounded.rows.T
        # Sums of D terms lose at most 2^-23 of the norms' product at each, here and in the refinement.
        accumulation = len(weight) * 2.0**-22
        self._norms = rounded.norms * (1 + SLACK)
        self._errors = (rounded.errors + accumulation * rounded.norms) * (1 + SLACK)
        self._runs = -(-len(bias) // RUN)
        self._largest_bias = self._largest_of_runs(bias)
        self._largest_norm = self._largest_of_runs(self._norms)
        self._largest_error = self._largest_of_runs(self._errors)

    def entries_above(self, x: Tensor, guess: float) -> tuple[Tensor, Tensor, Tensor]:
        """Row, latent and float32 value of every pre-activation of x [N, D] above `guess` ≥ 0, ascending."""
        return self._refined(x, *self.candidates(x, guess), guess)

    def largest_of_rows(self, x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same for the k largest positive pre-activations of each row."""
        return keep_largest(*self._refined(x, *self.candidates(x, 0.0, k), 0.0), k)

    def candidates(self, x: Tensor, guess: float, k: int | None = None) -> tuple[Tensor, Tensor]:
        """Row and latent of all pre-activations that may exceed `guess` and, if given, be among their row's k largest.

        Ascending by row and latent.
        """
        low = round_rows(x, self._memory.take("input", *x.shape))
        # Every block packs the weights anew, so a block has many rows; then it may as well stay in the cache.
        size = max(BLOCK_ROWS, BLOCK_BYTES // (2 * RUN * self._runs))
        found = [self._may_exceed(low, slice(start, start + size), guess, k) for start in range(0, len(x), size)]
        rows, latents = (torch.cat(parts) for parts in zip(*found, strict=True))
        return rows, latents

    def _refined(self, x: Tensor, rows: Tensor, latents: Tensor, guess: float) -> tuple[Tensor, Tensor, Tensor]:
        """The candidates whose float32 value is above the guess, with it."""
        candidates = from_entries(rows, latents, x.new_empty(len(rows)), len(x), len(self._bias))
        values = sampled_products(candidates, x, self._latents) + self._bias[latents]
        above = (values > guess).nonzero()[:, 0]
        return rows[above], latents[above], values[above]

    def _may_exceed(self, low: Rounded, block: slice, guess: float, k: int | None) -> tuple[Tensor, Tensor]:
        """The candidates of a block of rows: what may be above the guess, of runs first, then of their entries."""
        norms, errors = low.norms[block], low.errors[block]
        products = self._products(low.rows[block])
        # Read as integers, numbers that are not negative keep their order, and their maxima take half the time.
        largest = products.view(torch.int16).amax(dim=2).view(torch.bfloat16)
        guesses = norms.new_full((len(products), 1), guess)
        if k is not None and k <= self._runs:
            guesses = self._least_of_largest(products, largest, norms, errors, k).clamp_min_(guess)
        guesses *= 1 - SLACK
        # What the margins and biases of a run leave for a product to reach, and the least that rounds to it.
        wanted = guesses - self._largest_bias
        wanted.addr_(norms, self._largest_error, alpha=-1).addr_(errors, self._largest_norm, alpha=-1)
        wanted = torch.minimum(wanted / (1 + HALF_UNIT), wanted / (1 - HALF_UNIT))
        if bool((wanted < 0).any()):
            largest = products.amax(dim=2)
        row, run = (largest > wanted).nonzero(as_tuple=True)
        of_runs = products[row, run]
        which, column = (of_runs > wanted[row, run][:, None]).nonzero(as_tuple=True)
        rows, latents = row[which], run[which] * RUN + column
        # Now with the entry's own bias and margin, rather than the largest of its run.
        product = of_runs[which, column].float()
        upper = product + product.abs() * HALF_UNIT + self._bias[latents]
        upper += norms[rows] * self._errors[latents] + errors[rows] * self._norms[latents]
        kept = (upper > guesses[rows, 0]).nonzero()[:, 0]
        return rows[kept] + block.start, latents[kept]

    def _least_of_largest(self, products: Tensor, largest: Tensor, norms: Tensor, errors: Tensor, k: int) -> Tensor:
        """What each row's k-th largest pre-activation is at least [n, 1]: k runs have an entry of that size each."""
        runs = (largest + self._largest_bias).topk(k, dim=1, sorted=False).indices
        latents = runs[:, :, None] * RUN + torch.arange(RUN)
        latents.clamp_max_(len(self._bias) - 1)
        product = products[torch.arange(len(products))[:, None], runs].float()
        least = product - product.abs() * HALF_UNIT + self._bias[latents]
        least -= norms[:, None, None] * self._errors[latents] + errors[:, None, None] * self._norms[latents]
        return least.amax(dim=2).amin(dim=1, keepdim=True)

    @phase("encoder product")
    def _products(self, x: Tensor) -> Tensor:
        """x [n, D] @ weight as [n, S, 64] bfloat16; the padding past F holds −inf."""
        products = self._memory.take("products", len(x), self._runs * RUN)
        width = len(self._bias)
        if products.shape[1] != width:
            products[:, width:] = -torch.inf
        torch.mm(x, self._low, out=products[:, :width])
        return products.view(len(x), self._runs, RUN)

    def _largest_of_runs(self, of_latents: Tensor) -> Tensor:
        padded = of_latents.new_full((self._runs * RUN,), -torch.inf)
        padded[: len(of_latents)] = of_latents
        return padded.view(self._runs, RUN).amax(dim=1)


def round_rows(matrix: Tensor, out: Tensor) -> Rounded:
    """Round a float32 matrix [n, D] into `out`, a few rows at a time."""
    norms, errors = matrix.new_empty(len(matrix)), matrix.new_empty(len(matrix))
    size = max(1, CHUNK_BYTES // (4 * matrix.shape[1]))
    scratch = torch.empty_like(matrix[:size])
    for rows, low, norm, error in zip(
        matrix.split(size), out.split(size), norms.split(size), errors.split(size), strict=True
    ):
        near = scratch[: len(rows)].copy_(low.copy_(rows))
        torch.maximum(rows.norm(dim=1), near.norm(dim=1), out=norm)
        torch.linalg.vector_norm(near.sub_(rows), dim=1, out=error)
    return Rounded(out, norms, errors)


def screens_on_cpu(weight: Tensor, rows: int) -> bool:
    """Whether to screen an encoder with this weight [D, F]: float32, enough work, and a processor that is good at it."""
    if weight.is_cuda or weight.dtype != torch.float32 or (weight.requires_grad and torch.is_grad_enabled()):
        return False
    return weight.numel() >= FEWEST_WEIGHTS and rows >= FEWEST_ROWS and has_matrix_units()


@functools.cache
def has_matrix_units() -> bool:
    """Whether this processor multiplies bfloat16 matrices in hardware (AMX) and torch uses that."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16"))
