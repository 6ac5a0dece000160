"""Float32 selections at the speed of a bfloat16 product: screen every pre-activation, refine the few that matter.

The product of an input x and a latent's weights w, rounded to x' and w', differs from the true one by

    |x·w − x'·w'| = |x·(w − w') + (x − x')·w'| ≤ ‖x‖ ‖w − w'‖ + ‖x − x'‖ ‖w'‖        (Cauchy-Schwarz),

the margin: of norms and rounding errors of rows and latents, which cost no product. Whatever may exceed the guess within
its margin, a candidate, is computed again in float32; what is then not above the guess is dropped. So no entry above the
guess is missed, no rounded value is kept, and the entries are those of a float32 product.

An example. x = (3.010, −1.003) becomes x' = (3.015625, −1): norm 3.177, error 0.0064. The guess is 5.05.

    w                w'               x'·w'     margin    candidate?           x·w in float32
    (2.005, 1.001)   (2, 1)           5.0313    0.0305    5.0618 > 5.05: yes   5.0310: dropped
    (1.993, 0.400)   (1.9922, 0.4004) 5.6073    0.0158    5.6231 > 5.05: yes   5.5977: kept
    (0.700, 1.200)   (0.6992, 1.2031) 0.9055    0.0191    0.9246 < 5.05: no    not computed

A step of 2048 pairs with F 16384 and k 20 screens 67 million pre-activations and refines a few more than the 82
thousand that it keeps.

Shapes: N rows, D activation_dim, F dict_size, S segments of latents, n candidates.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tsae.runtime.phases import phase
from tsae.sae.sparse import from_entries, kernels_for, kernels_that_run, sampled_products

SEGMENT = 64
"""Latents that are judged together, by their largest entry, before any single one is."""
CHUNK_BYTES = 256 * 2**20
"""Bytes of a matrix of which products at entries are made at a time."""
CACHE_BYTES = 512 * 2**10
"""Of a matrix that is rounded: they stay in the cache."""
BLOCK_BYTES, BLOCK_ROWS = 32 * 2**20, 512
"""Size of a block of screened products on a CPU, and the fewest rows that it has."""
CUDA_BLOCK_BYTES, CUDA_BLOCK_ROWS = 256 * 2**20, 256
"""The same on a GPU, where a product is a bit for each pre-activation: 8,192 rows with F 262,144 are one block."""
HALF_UNIT = 2.0**-8 * 1.01
"""How far, relative to itself, a number in bfloat16 can be from what was rounded to it."""
FEWEST_WEIGHTS, FEWEST_ROWS = 2**20, 512
"""On a CPU smaller encoders, and fewer inputs for one rounding of the weights, are not worth a screen."""
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

    def block(self, start: int, stop: int) -> Rounded:
        """Some of the rows."""
        return Rounded(*(each[start:stop] for each in self))


def round_rows(matrix: Tensor, out: Tensor | None = None) -> Rounded:
    """Round a float32 matrix [n, D], into `out` if given, a few rows at a time where no kernel does it."""
    kernels = kernels_for(matrix)
    if kernels is not None:
        return Rounded(*kernels.round_rows(matrix))
    low = torch.empty_like(matrix, dtype=torch.bfloat16) if out is None else out
    norms, errors = matrix.new_empty(len(matrix)), matrix.new_empty(len(matrix))
    size = max(1, CACHE_BYTES // (4 * matrix.shape[1]))
    scratch = torch.empty_like(matrix[:size])
    parts = (tensor.split(size) for tensor in (matrix, low, norms, errors))
    for rows, low_rows, norm, error in zip(*parts, strict=True):
        near = scratch[: len(rows)].copy_(low_rows.copy_(rows))
        torch.maximum(rows.norm(dim=1), near.norm(dim=1), out=norm)
        torch.linalg.vector_norm(near.sub_(rows), dim=1, out=error)
    return Rounded(low, norms, errors)


class Screen:
    """The encoder's weight [D, F] and bias [F], ready to screen any number of inputs."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.latents, self.bias = weight.T.contiguous(), bias
        # Both products add up D terms, in the worst order losing 2^-23 (tensor cores, screen) and 2^-24 (refinement)
        # of the norms' product at each; together less than this.
        accumulation = len(weight) * 2.0**-22
        self._low = Rounded(*kernels_that_run(self.latents).round_rows(self.latents, 1 + SLACK, accumulation))

    def entries_above(self, x: Tensor, guess: float, listing: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Row, latent and float32 value of every pre-activation of x [N, D] above `guess` ≥ 0, ascending.

        `listing` is the `Candidates` of the kernels.
        """
        return self._refined(x, guess, None, listing)

    def largest_of_rows(self, x: Tensor, k: int, listing: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The same for the k largest positive pre-activations of each row."""
        return keep_largest(*self._refined(x, 0.0, k, listing), k)

    def candidates(self, x: Tensor, guess: float, k: int | None, listing: Any) -> tuple[Tensor, Tensor]:
        """Row and latent of all pre-activations that may exceed `guess` and, if given, be among their row's k largest.

        Ascending by row and latent.
        """
        guesses = x.new_full((len(x),), guess * (1 - SLACK))
        listed = listing.all(guesses, len(self.bias), functools.partial(self._fill, round_rows(x), k))
        return listed.rows, listed.latents

    def listed(
        self, x: Tensor, guesses: Tensor, budgets: Sequence[slice], k: int | None, listing: Any, least: int
    ) -> tuple[Any, Tensor]:
        """The same candidates in a list with room for `least` at least, which knows how many there are, and their values [c].

        Those are float32 pre-activations where they are above the guess of their budget and half [G, H], −inf elsewhere.
        """
        of_rows = guess_of_rows(guesses * (1 - SLACK), len(x))
        listed = listing.list(of_rows, budgets, functools.partial(self._fill, round_rows(x), k), least)
        return listed, kernels_that_run(x).refined(listed, x, self.latents, self.bias, guesses)

    @phase("encoder product")
    def _fill(self, low: Rounded, k: int | None, listed: Any) -> None:
        """List the candidates by kernels; with `k` each row's guess, of one budget, is set just before."""
        kernels = kernels_that_run(self.latents)
        block_rows = max(CUDA_BLOCK_ROWS, 8 * CUDA_BLOCK_BYTES // len(self.bias))
        for start in range(0, len(low.rows), block_rows):
            block, guesses = low.block(start, start + block_rows), listed.guesses[start : start + block_rows]
            if k is not None:
                guesses[:, 0].copy_(_kth(kernels.least_of_segments(block, self._low, self.bias), k))
            listed.add(kernels.maybe_above(block, self._low, self.bias, guesses, listed.starts), len(self.bias))

    def _refined(self, x: Tensor, guess: float, k: int | None, listing: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The candidates whose float32 value exceeds the guess."""
        rows, latents = self.candidates(x, guess, k, listing)
        values = products_at(rows, latents, x, self.latents) + self.bias[latents]
        above = (values > guess).nonzero()[:, 0]
        return rows[above], latents[above], values[above]


def guess_of_rows(guesses: Tensor, rows: int) -> Tensor:
    """For so many rows, of all halves, what is guessed for their half [G, H] → [N, G]."""
    n_budgets, n_halves = guesses.shape
    return guesses.T[:, None].expand(n_halves, rows // n_halves, n_budgets).reshape(rows, n_budgets).contiguous()


def _kth(least: Tensor, k: int) -> Tensor:
    """What each row's k-th largest pre-activation is at least, or 0 [n]; from what segments' largest are at least [n, W].

    As many entries as segments reach the k-th largest of those; where there are fewer segments nothing is known.
    """
    if least.shape[1] < k:
        return least.new_zeros(len(least))
    return least.topk(k, dim=1).values[:, -1].clamp_min(0) * (1 - SLACK)


def largest_of_segments(of_latents: Tensor) -> Tensor:
    """The largest of each segment of a vector [F] → [S]; the last segment may be short."""
    padded = of_latents.new_full((-(-len(of_latents) // SEGMENT) * SEGMENT,), -torch.inf)
    padded[: len(of_latents)] = of_latents
    return padded.view(-1, SEGMENT).amax(dim=1)


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
    """The same on processors with matrix units (AMX), by torch's operations.

    There a bfloat16 product takes a seventh of a float32 one, and reading its result becomes the larger part. So the
    result stays in bfloat16, which rounds it once more, by 2^-8 of itself at most (`HALF_UNIT`); and segments of 64
    latents are judged by their largest entry before any single entry is.

    With F 16384 a row has 256 segments. A block of rows, whose products are in memory at a time, has 1024: 32 MB. For a
    guess of 5.05, a segment whose largest bias is 0.1, and whose largest norm and largest error make a margin of 0.04
    with those of the row, needs a product above (5.05 − 0.1 − 0.04) / (1 + 2^-8) = 4.89. If its largest is not above
    that, as in most segments of a row that keeps 20 of 16384, none of its 64 entries is looked at. In the others those
    above 4.89 are judged once more, each by its own bias and margin: what is left are the candidates.
    """

    def __init__(self, weight: Tensor, bias: Tensor, memory: Memory) -> None:
        self._latents, self._bias, self._memory = weight.T.contiguous(), bias, memory
        rounded = round_rows(self._latents, memory.take("weight", *self._latents.shape))
        self._low = rounded.rows.T
        # Sums of D terms lose at most 2^-23 of the norms' product at each, here and in the refinement.
        accumulation = len(weight) * 2.0**-22
        self._norms = rounded.norms * (1 + SLACK)
        self._errors = (rounded.errors + accumulation * rounded.norms) * (1 + SLACK)
        self._largest_bias, self._largest_norm, self._largest_error = (
            largest_of_segments(of_latents) for of_latents in (bias, self._norms, self._errors)
        )
        self._segments = len(self._largest_bias)

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
        size = max(BLOCK_ROWS, BLOCK_BYTES // (2 * SEGMENT * self._segments))
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
        """The candidates of a block of rows: what may be above the guess, of segments first, then of their entries."""
        norms, errors = low.norms[block], low.errors[block]
        products = self._products(low.rows[block])
        # Read as integers, numbers that are not negative keep their order, and their maxima take half the time.
        largest = products.view(torch.int16).amax(dim=2).view(torch.bfloat16)
        guesses = norms.new_full((len(products), 1), guess)
        if k is not None and k <= self._segments:
            guesses = self._least_of_largest(products, largest, norms, errors, k).clamp_min_(guess)
        guesses *= 1 - SLACK
        # What the margins and biases of a segment leave for a product to reach, and the least that rounds to it.
        wanted = guesses - self._largest_bias
        wanted.addr_(norms, self._largest_error, alpha=-1).addr_(errors, self._largest_norm, alpha=-1)
        wanted = torch.minimum(wanted / (1 + HALF_UNIT), wanted / (1 - HALF_UNIT))
        if bool((wanted < 0).any()):
            largest = products.amax(dim=2)
        row, segment = (largest > wanted).nonzero(as_tuple=True)
        of_segments = products[row, segment]
        which, column = (of_segments > wanted[row, segment][:, None]).nonzero(as_tuple=True)
        rows, latents = row[which], segment[which] * SEGMENT + column
        # Now with the entry's own bias and margin, rather than the largest of its segment.
        product = of_segments[which, column].float()
        upper = product + product.abs() * HALF_UNIT + self._bias[latents]
        upper += norms[rows] * self._errors[latents] + errors[rows] * self._norms[latents]
        kept = (upper > guesses[rows, 0]).nonzero()[:, 0]
        return rows[kept] + block.start, latents[kept]

    def _least_of_largest(self, products: Tensor, largest: Tensor, norms: Tensor, errors: Tensor, k: int) -> Tensor:
        """What each row's k-th largest pre-activation is at least [n, 1]: k segments have an entry of that size each."""
        segments = (largest + self._largest_bias).topk(k, dim=1, sorted=False).indices
        latents = segments[:, :, None] * SEGMENT + torch.arange(SEGMENT)
        latents.clamp_max_(len(self._bias) - 1)
        product = products[torch.arange(len(products))[:, None], segments].float()
        least = product - product.abs() * HALF_UNIT + self._bias[latents]
        least -= norms[:, None, None] * self._errors[latents] + errors[:, None, None] * self._norms[latents]
        return least.amax(dim=2).amin(dim=1, keepdim=True)

    @phase("encoder product")
    def _products(self, x: Tensor) -> Tensor:
        """x [n, D] @ weight as [n, S, 64] bfloat16; the padding past F holds −inf."""
        products = self._memory.take("products", len(x), self._segments * SEGMENT)
        width = len(self._bias)
        if products.shape[1] != width:
            products[:, width:] = -torch.inf
        torch.mm(x, self._low, out=products[:, :width])
        return products.view(len(x), self._segments, SEGMENT)


def screens(weight: Tensor) -> bool:
    """Whether an encoder product with such a weight is worth screening in bfloat16 first, by `Screen`."""
    if weight.dtype != torch.float32 or (weight.requires_grad and torch.is_grad_enabled()):
        return False
    return kernels_for(weight) is not None and (not weight.is_cuda or _fast_bfloat16())


@functools.cache
def _fast_bfloat16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)


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
