"""How smoothly feature activations move along a context: all measures in one pass over the active latents.

Per latent, then over each range of latents. The first five are those of the reference implementation:

    total variation   sum over steps and latents of |f_t - f_{t-1}|; grows with the length and the scale of f
    lipschitz         max over steps of |f_t - f_{t-1}| / |x_t - x_{t-1}|, mean over latents (the paper's smoothness)
    fft               spectral power in the upper half of the frequencies over the lower half, mean over latents
    wavelet           energy of three levels of Haar details over the energy of the rest, both summed over latents
    multiscale        variance of differences over 1 step against those over 8 steps, means over latents
    relative variation   total variation over twice the summed activation: 0 for a constant code, 1 for isolated spikes

Smaller is smoother. A measure that is not defined (a range of latents that stays silent, too few positions) is NaN,
never an exception; total variation of silence is 0.
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


EPSILON = 1e-10  # the reference's guard of denominators
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


class _PerLatent(NamedTuple):
    """What the measures need to know of each latent, each [A]."""

    variation: Tensor
    mass: Tensor
    steepest: Tensor
    power_ratio: Tensor
    detail: Tensor
    rest: Tensor
    short_variance: Tensor
    long_variance: Tensor


def smoothness(code: ActiveCode, x: Tensor, ranges: Ranges) -> Smoothness:
    """The measures of one context from its codes and its activations x [T, D]."""
    slices = code.slices(ranges)
    distances = torch.linalg.vector_norm(x.float().diff(dim=0), dim=1)
    # Blocks of latents that fit in a cache: long contexts have many values per latent.
    blocks = code.values.split(max(1, BLOCK_VALUES // len(x)))
    latents = torch.cat([torch.stack(_per_latent(block, distances)) for block in blocks], dim=1).double().cpu()
    totals = _PerLatent(*torch.stack([latents[:, part].sum(1) for part in slices], dim=1))
    means = _PerLatent(*torch.stack([latents[:, part].mean(1) for part in slices], dim=1))
    silent = totals.mass == 0
    return Smoothness(
        total_variation=totals.variation,
        lipschitz=means.steepest,
        fft=means.power_ratio,
        wavelet=(totals.detail / (totals.rest + EPSILON)).masked_fill(silent, torch.nan),
        multiscale=means.short_variance / (means.long_variance + EPSILON),
        relative_variation=totals.variation / (2 * totals.mass),
    )


def _per_latent(series: Tensor, distances: Tensor) -> _PerLatent:
    """From the activations of some latents [A, T] and how far x moves at each step [T-1]."""
    steps = series.diff(dim=1)
    detail, rest = _wavelet_energies(series)
    short, long = _difference_variances(series, steps)
    absolute = steps.abs()
    return _PerLatent(
        variation=absolute.sum(1),
        mass=series.sum(1),
        steepest=_steepest(absolute, distances),
        power_ratio=_high_over_low_power(series),
        detail=detail,
        rest=rest,
        short_variance=short,
        long_variance=long,
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


def _high_over_low_power(series: Tensor) -> Tensor:
    """Power in the upper over the lower half of the real spectrum (mean included) of each latent [A]."""
    if len(series) == 0:
        return series.new_empty(0)
    spectrum = torch.view_as_real(torch.fft.rfft(series))
    power = spectrum.flatten(1).square()
    cut = 2 * (spectrum.shape[1] // 2)
    return power[:, cut:].sum(1) / (power[:, :cut].sum(1) + EPSILON)


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
