"""How well latents recover the true features of a synthetic world: pure functions of codes and truth.

Every true feature is matched with at most one latent and every latent with at most one feature, so that the sum of the
matches' correlations is largest (Hungarian method); a feature without a match, or with a negative one, counts 0.

Shapes: S sequences, L positions, F latents, n true features, G groups of latents, H kinds of true features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange, reduce
from torch import Tensor

RIDGE = 1e-3
"""Penalty of the readout, relative to the mean variance of the latents it reads."""


class Split(NamedTuple):
    """A partition of latents and one of true features."""

    latents: tuple[np.ndarray, ...]
    """Indices of the latents of each group, the high-level one first."""
    features: tuple[np.ndarray, ...]
    """Indices of the true features of each kind."""
    slow: np.ndarray
    """[n] bool: features that persist and should be in the high-level group."""
    fast: np.ndarray
    """[n] bool: features that change at every token and should be in the rest."""

    @property
    def low(self) -> np.ndarray:
        """Indices of the latents outside the high-level group."""
        return np.concatenate([*self.latents[1:], np.empty(0, np.int64)]).astype(np.int64)


def correlations(features: Tensor, codes: Tensor) -> np.ndarray:
    """Pearson correlations [n, F] of true features [..., n] with codes [..., F]; 0 where one of them is constant."""
    return np.asarray((_standardised(features).T @ _standardised(codes)).numpy())


def _standardised(values: Tensor) -> Tensor:
    """[N, n] columns of mean 0 and length 1; constant ones become 0."""
    values = values.flatten(0, -2).float()
    centred = values - values.mean(0)
    length = centred.norm(dim=0)
    # What is left of a constant column is the rounding of its mean.
    constant = length <= 1e-5 * values.norm(dim=0)
    return torch.where(constant, 0.0, centred / length.where(~constant, 1.0))


def matched(similarity: np.ndarray) -> float:
    """Mean over the true features of the similarity [n, F] with their matches; NaN without features."""
    from scipy.optimize import linear_sum_assignment

    if not similarity.shape[0]:
        return float("nan")
    positive = np.maximum(np.nan_to_num(similarity), 0)
    rows, columns = linear_sum_assignment(positive, maximize=True)
    return float(positive[rows, columns].sum() / len(similarity))


def placement(similarity: np.ndarray, split: Split) -> dict[str, float]:
    """Recovery of slow and fast features anywhere, in the high-level group and in the rest, and what follows of it.

    `disentanglement` is the mean of how much better slow features are recovered in the high-level group than in the
    rest, and fast ones the other way round: 1 is perfect, 0 what a random split of a complete dictionary gives.
    """
    high, low = split.latents[0], split.low
    found = {
        f"{kind}{suffix}": matched(similarity[rows][:, columns])
        for kind, rows in (("slow", split.slow), ("fast", split.fast))
        for suffix, columns in (("", slice(None)), ("_high", high), ("_low", low))
    }
    gains = found["slow_high"] - found["slow_low"] + found["fast_low"] - found["fast_high"]
    return {**found, "disentanglement": gains / 2}


def recovery_table(similarity: np.ndarray, split: Split) -> list[list[float]]:
    """[H][G]: recovery of each kind of true features by each group of latents alone."""
    return [[matched(similarity[rows][:, columns]) for columns in split.latents] for rows in split.features]


def purity(similarity: np.ndarray, split: Split, alive: np.ndarray) -> float:
    """Share of the high-level group's alive latents that correlate best with a slow feature; NaN if none is alive."""
    latents = split.latents[0][alive[split.latents[0]]]
    if not len(latents):
        return float("nan")
    return float(split.slow[similarity[:, latents].argmax(0)].mean())


def readout(features: Tensor, codes: Tensor) -> float:
    """R² of a ridge regression from codes [S, L, F] to true features [S, L, n], pooled over features.

    Fitted on the first half of the sequences, measured on the second. NaN without latents or features.
    """
    if not (features.shape[-1] and codes.shape[-1]):
        return float("nan")
    weights, offset = fit_readout(features, codes)
    half = len(features) // 2
    y, x = _by_token(features[half:]), _by_token(codes[half:])
    error = (y - x @ weights - offset).square().sum()
    total = (y - y.mean(0)).square().sum()
    return float(1 - error / total)


def fit_readout(features: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Ridge regression on the first half of the sequences: weights [F, n] and offset [n], float64."""
    half = len(features) // 2
    y, x = _by_token(features[:half]), _by_token(codes[:half])
    x_mean, y_mean = x.mean(0), y.mean(0)
    gram = (x - x_mean).T @ (x - x_mean)
    ridge = RIDGE * gram.diagonal().mean().clamp(min=1e-12)
    weights = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), (x - x_mean).T @ (y - y_mean))
    return weights, y_mean - x_mean @ weights


def _by_token(values: Tensor) -> Tensor:
    """[S, L, n] → [S·L, n], float64."""
    return rearrange(values, "s l n -> (s l) n").double()


def autocorrelation(codes: Tensor) -> np.ndarray:
    """Correlation [F] of each latent of codes [S, L, F] with itself one token later; NaN where it is constant."""
    now, then = _by_token(codes[:, :-1]), _by_token(codes[:, 1:])
    covariance = ((now - now.mean(0)) * (then - then.mean(0))).mean(0)
    spread = now.std(0, unbiased=False) * then.std(0, unbiased=False)
    return np.asarray(torch.where(spread > 0, covariance / spread, torch.nan).numpy())


def persistence(codes: Tensor) -> np.ndarray:
    """Probability [F] that a latent of codes [S, L, F] that is active is so on the next token; NaN if it never is."""
    on = codes > 0
    active = on[:, :-1].sum((0, 1))
    stays = (on[:, :-1] & on[:, 1:]).sum((0, 1))
    return np.asarray(torch.where(active > 0, stays / active, torch.nan).numpy())


def split_by_time_scale(codes: Tensor, high: int) -> tuple[np.ndarray, np.ndarray]:
    """The post-hoc control: indices of the `high` latents of largest autocorrelation, and of the others."""
    order = np.argsort(-np.nan_to_num(autocorrelation(codes), nan=-np.inf), kind="stable")
    return np.sort(order[:high]), np.sort(order[high:])


def keep_most_active(values: Tensor, active: float) -> Tensor:
    """The part of values [..., F] above the threshold, at least 0, that leaves `active` of them per token."""
    positive = values.clamp(min=0)
    count = min(round(active * values[..., 0].numel()), int((positive > 0).sum()))
    if not count:
        return torch.zeros_like(values)
    # The smallest value that is kept.
    threshold = positive.flatten().kthvalue(positive.numel() - count + 1).values
    return torch.where(positive >= threshold, positive, 0)


def oracle_codes(features: Tensor, x: Tensor, active: float) -> Tensor:
    """What a linear encoder with a threshold can reach that is told the truth: codes [S, L, n] from x [S, L, D]."""
    weights, offset = fit_readout(features, x)
    return keep_most_active((x.double() @ weights + offset).float(), active)


def random_codes(x: Tensor, latents: int, active: float, seed: int = 0) -> Tensor:
    """What an untrained dictionary of random directions gives: codes [S, L, latents] from x [S, L, D]."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(latents, x.shape[-1], generator=generator), dim=1)
    return keep_most_active((x - reduce(x, "s l d -> d", "mean")) @ directions.T, active)


def groups_of(sizes: Sequence[int]) -> tuple[np.ndarray, ...]:
    """Indices of consecutive groups of these sizes."""
    ends = np.cumsum(sizes)
    return tuple(np.arange(end - size, end) for end, size in zip(ends, sizes, strict=True))
