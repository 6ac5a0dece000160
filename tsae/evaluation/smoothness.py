"""How smoothly feature activations move along a context: all measures in one pass over the active latents.

Per latent, then over each range of latents. The first five are those of the reference implementation:

    total variation   sum over steps and latents of |f_t - f_{t-1}|; grows with the length and the scale of f
    lipschitz         max over steps of |f_t - f_{t-1}| / |x_t - x_{t-1}|, mean over latents (the paper's smoothness)
    fft               spectral power in the upper half of the frequencies over the lower half, mean over latents
    wavelet           energy of three levels of Haar details over the energy of the rest, both summed over latents
    multiscale        variance of differences over 1 step against those over 8 steps, means over latents
    relative variation   total variation over twice the summed activation: 0 for a constant code, 1 for isolated spikes

Smaller is smoother. A measure that is not defined (a range of latents that stays silent, too few positions, a ratio
whose denominator vanishes) is NaN, never an exception; total variation of silence is 0. What the reference makes of the
same latents is `in_reference`.

Lipschitz and total variation are in the units of f, and sums over latents weigh them by their units: callers give
feature activations times the norms of the decoder rows (`Dictionary.row_norms`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from tsae.sae.sparse import SparseCode

Ranges = Sequence[tuple[int, int]]
"""R pairs (first, end) of latent indices."""


class ActiveCode(NamedTuple):
    """The feature activations of one context of T positions.

    latents: [A] ascending indices of the latents that are active somewhere; values: [A, T] their activations.
    """

    latents: Tensor
    values: Tensor

    def slices(self, ranges: Ranges) -> list[slice]:
        """Where the latents of each range lie among the A; a range is contiguous and `latents` ascends."""
        edges = torch.tensor(ranges, device=self.latents.device)
        return [slice(first, end) for first, end in torch.searchsorted(self.latents, edges).tolist()]


def active_code(f: Tensor) -> ActiveCode:
    """The active part of dense codes f [T, F], none of them negative."""
    latents = f.amax(0).nonzero()[:, 0]
    return ActiveCode(latents, f.index_select(1, latents).T.contiguous().float())


def context_code(code: SparseCode, rows: slice) -> ActiveCode:
    """The code of one context, the tokens `rows` of a batch's sparse code."""
    first, end = (int(code.offsets[edge]) for edge in (rows.start, rows.stop))
    latents, place = torch.unique(code.latents[first:end], return_inverse=True)
    values = code.values.new_zeros(len(latents), rows.stop - rows.start, dtype=torch.float32)
    counts = code.offsets[rows.start : rows.stop + 1].diff()
    position = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    values[place, position] = code.values[first:end].float()
    return ActiveCode(latents, values)


def split_ranges(group_sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges of latents that are reported: all, high-level (group 0), low-level (the rest), then each group."""
    ends = list(accumulate(group_sizes))
    groups = list(zip([0, *ends], ends, strict=False))
    return [(0, ends[-1]), groups[0], (ends[0], ends[-1]), *groups]


def reduce_ranges(per_latent: Tensor, slices: Sequence[slice], mean: bool = False) -> Tensor:
    """Sum, or mean, of per-latent values [A] over each of R slices, float64 [R] on the CPU."""
    values = per_latent.double().cpu()
    return torch.stack([values[part].mean() if mean else values[part].sum() for part in slices])


EPSILON = 1e-10
"""What the reference adds to denominators."""
VANISHING = 1e-3
"""A denominator below this part of its numerator says which samples an odd length drops, or that a latent has a period
of 8, and nothing of smoothness. With every sample in its Haar pairs, a code that is not negative stays below 21."""
ROUNDING = 1e-12
"""Variance below this part of a mean square is float32's rounding."""
WAVELET_LEVELS = 3
SCALES = (8, 4, 2, 1)
BLOCK_VALUES = 1 << 18


class Smoothness(NamedTuple):
    """The measures, each float64 [R]: one value per range of latents."""

    total_variation: Tensor
    lipschitz: Tensor
    fft: Tensor
    wavelet: Tensor
    multiscale: Tensor
    relative_variation: Tensor


class Latents(NamedTuple):
    """What the measures need to know of each active latent, each [A]; the first four grow with its activations, the others with their squares."""

    variation: Tensor
    mass: Tensor
    steepest: Tensor
    """Over the steps at which x moves."""
    steepest_or_nan: Tensor
    """NaN where x stands still somewhere."""
    low_power: Tensor
    high_power: Tensor
    detail: Tensor
    rest: Tensor
    short_variance: Tensor
    long_variance: Tensor
    mean_square: Tensor

    def times(self, factors: Tensor) -> Latents:
        """Those of the same latents with their activations multiplied by `factors` [A]."""
        return Latents(*(column * factors for column in self[:4]), *(column * factors**2 for column in self[4:]))


def smoothness(code: ActiveCode, x: Tensor, ranges: Ranges) -> Smoothness:
    """The measures of one context from its codes and its activations x [T, D]."""
    return reduced(latents_of(code, x), code.slices(ranges))


def latents_of(code: ActiveCode, x: Tensor) -> Latents:
    """All that the measures need of one context, float64 on the CPU."""
    distances = torch.linalg.vector_norm(x.float().diff(dim=0), dim=1)
    # Blocks of latents that fit in a cache: long contexts have many values per latent.
    blocks = code.values.split(max(1, BLOCK_VALUES // len(x)))
    return Latents(*torch.cat([torch.stack(_per_latent(block, distances)) for block in blocks], dim=1).double().cpu())


def reduced(latents: Latents, slices: Sequence[slice]) -> Smoothness:
    """The measures of each of R runs of latents."""
    sums = _over(latents, slices)
    ratios = latents.high_power / latents.low_power
    return Smoothness(
        total_variation=sums.variation,
        lipschitz=reduce_ranges(latents.steepest, slices, mean=True),
        fft=reduce_ranges(ratios, slices, mean=True),
        wavelet=_defined_ratio(sums.detail, sums.rest, sums.mean_square),
        multiscale=_defined_ratio(sums.short_variance, sums.long_variance, sums.mean_square),
        relative_variation=sums.variation / (2 * sums.mass),
    )


def _over(latents: Latents, slices: Sequence[slice], mean: bool = False) -> Latents:
    """Sums, or means, over each of R runs of latents, each [R]."""
    columns = torch.stack(latents)
    parts = [columns[:, part].mean(1) if mean else columns[:, part].sum(1) for part in slices]
    return Latents(*torch.stack(parts, dim=1))


def _defined_ratio(numerator: Tensor, denominator: Tensor, scale: Tensor) -> Tensor:
    vanishes = denominator <= torch.maximum(VANISHING * numerator, ROUNDING * scale)
    return (numerator / denominator).masked_fill(vanishes, torch.nan)


def in_reference(latents: Latents, slices: Sequence[slice]) -> Smoothness:
    """The measures as the reference computes them: no denominator vanishes beside its summand, however much it matters.

    Its Lipschitz measure is undefined where x stands still; where its FFT measure raises (no active latent), NaN.
    """
    sums, means = _over(latents, slices), _over(latents, slices, mean=True)
    ratios = latents.high_power / (latents.low_power + EPSILON)
    return Smoothness(
        total_variation=sums.variation,
        lipschitz=means.steepest_or_nan,
        fft=reduce_ranges(ratios, slices, mean=True),
        wavelet=sums.detail / (sums.rest + EPSILON),
        multiscale=means.short_variance / (means.long_variance + EPSILON),
        relative_variation=sums.variation / (2 * sums.mass),
    )


def _per_latent(series: Tensor, distances: Tensor) -> Latents:
    """From the activations of some latents [A, T] and how far x moves at each step [T-1]."""
    steps = series.diff(dim=1)
    detail, rest = _wavelet_energies(series)
    short, long = _difference_variances(series, steps)
    low, high = _low_and_high_power(series)
    absolute = steps.abs()
    steepest = _steepest(absolute, distances)
    return Latents(
        variation=absolute.sum(1),
        mass=series.sum(1),
        steepest=steepest,
        steepest_or_nan=steepest if bool((distances > 0).all()) else torch.full_like(steepest, torch.nan),
        low_power=low,
        high_power=high,
        detail=detail,
        rest=rest,
        short_variance=short,
        long_variance=long,
        mean_square=series.square().mean(1),
    )


def _steepest(steps: Tensor, distances: Tensor) -> Tensor:
    """Largest |step of f| over |step of x| of each latent [A]; steps is [A, T-1], distances [T-1]."""
    # Where x does not move, f cannot either, and 0/0 says nothing about the code.
    moving = distances > 0
    if not moving.all():
        steps, distances = steps[:, moving], distances[moving]
    if len(distances) == 0:
        return steps.new_full((len(steps),), torch.nan)
    return (steps / distances).amax(1)


def _low_and_high_power(series: Tensor) -> tuple[Tensor, Tensor]:
    """Power in the lower (mean included) and in the upper half of the real spectrum of each latent, two [A]."""
    if len(series) == 0:
        return series.new_empty(0), series.new_empty(0)
    spectrum = torch.view_as_real(torch.fft.rfft(series))
    power = spectrum.flatten(1).square()
    cut = 2 * (spectrum.shape[1] // 2)
    return power[:, :cut].sum(1), power[:, cut:].sum(1)


def _wavelet_energies(series: Tensor) -> tuple[Tensor, Tensor]:
    """Energy of the Haar details and of the final approximation of each latent, two [A]."""
    energy = series.new_zeros(len(series))
    rest = series
    for _ in range(WAVELET_LEVELS):
        half = rest.shape[1] // 2
        if half == 0:
            break
        even, odd = rest[:, : 2 * half : 2], rest[:, 1 : 2 * half : 2]
        energy = energy + ((even - odd) / 2).square().sum(1)
        rest = (even + odd) / 2
    return energy, rest.square().sum(1)


def _difference_variances(series: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Unbiased variance over time of each latent's differences over 1 step and over the largest scale, two [A]."""
    positions = series.shape[1]
    scale = next((scale for scale in SCALES if scale < positions), positions)
    if positions - scale < 2:
        undefined = series.new_full((len(series),), torch.nan)
        return undefined, undefined
    return _variance(steps), _variance(series[:, scale:] - series[:, :-scale])


def _variance(rows: Tensor) -> Tensor:
    """Unbiased variance of each row; ten times as fast as Tensor.var for short rows."""
    return (rows - rows.mean(1, keepdim=True)).square_().sum(1) / (rows.shape[1] - 1)
