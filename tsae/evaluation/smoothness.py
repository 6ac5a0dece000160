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
from typing import NamedTuple

import torch
from torch import Tensor

from tsae.evaluation.codes import ActiveCode, Ranges, reduce_ranges

EPSILON = 1e-10  # the reference's guard of denominators
WAVELET_LEVELS = 3
SCALES = (8, 4, 2, 1)


class Smoothness(NamedTuple):
    """The measures, each float64 [R]: one value per range of latents."""

    total_variation: Tensor
    lipschitz: Tensor
    fft: Tensor
    wavelet: Tensor
    multiscale: Tensor
    relative_variation: Tensor


def smoothness(code: ActiveCode, x: Tensor, ranges: Ranges) -> Smoothness:
    """The measures of one context from its codes and its activations x [T, D]."""
    series, slices = code.values, code.slices(ranges)
    silent = torch.tensor([part.start == part.stop for part in slices])
    steps = series.diff(dim=1).abs_()
    variation = reduce_ranges(steps.sum(1), slices)
    detail, rest = _wavelet_energies(series)
    short, long = _difference_variances(series)
    return Smoothness(
        total_variation=variation,
        lipschitz=reduce_ranges(_steepest(steps, x), slices, mean=True),
        fft=reduce_ranges(_high_over_low_power(series), slices, mean=True),
        wavelet=(reduce_ranges(detail, slices) / (reduce_ranges(rest, slices) + EPSILON)).masked_fill(
            silent, torch.nan
        ),
        multiscale=_ratio_of_means(short, long, slices),
        relative_variation=variation / (2 * reduce_ranges(series.sum(1), slices)),
    )


def _ratio_of_means(above: Tensor, below: Tensor, slices: Sequence[slice]) -> Tensor:
    return reduce_ranges(above, slices, mean=True) / (reduce_ranges(below, slices, mean=True) + EPSILON)


def _steepest(steps: Tensor, x: Tensor) -> Tensor:
    """Largest |step of f| per |step of x| of each latent [A]; steps is [A, T-1], x is [T, D]."""
    distances = torch.linalg.vector_norm(x.float().diff(dim=0), dim=1)
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
    cut = spectrum.shape[1] // 2
    low = spectrum[:, :cut].square().sum((1, 2))
    high = spectrum[:, cut:].square().sum((1, 2))
    return high / (low + EPSILON)


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


def _difference_variances(series: Tensor) -> tuple[Tensor, Tensor]:
    """Unbiased variance over time of each latent's differences over 1 step and over the largest scale, two [A]."""
    positions = series.shape[1]
    scale = next((scale for scale in SCALES if scale < positions), None)
    if len(series) == 0 or scale is None or positions - scale < 2:
        undefined = series.new_full((len(series),), torch.nan)
        return undefined, undefined
    long = series[:, scale:] - series[:, :-scale]
    return series.diff(dim=1).var(1), long.var(1)
