"""Initial weights: unit-norm random decoder rows, the encoder tied to them at the start."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tsae.config import SaeConfig
from tsae.sae.architectures import BatchTopKSAE, MatryoshkaBatchTopKSAE, TemporalMatryoshkaBatchTopKSAE
from tsae.sae.dictionary import ThresholdDictionary

EPSILON = float(torch.finfo(torch.float32).eps)


def new_dictionary(sae: SaeConfig, activation_dim: int, seed: int) -> ThresholdDictionary:
    """A fresh dictionary on the CPU, a function of its arguments alone."""
    dictionary: ThresholdDictionary
    if sae.kind == "batch_topk":
        dictionary = BatchTopKSAE(activation_dim, sae.dict_size, sae.k)
    else:
        cls = TemporalMatryoshkaBatchTopKSAE if sae.kind == "temporal" else MatryoshkaBatchTopKSAE
        dictionary = cls(activation_dim, sae.dict_size, sae.k, sae.group_sizes)
    bound = math.sqrt(6 / activation_dim)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.empty(sae.dict_size, activation_dim).uniform_(-bound, bound, generator=generator)
    normalise_rows(rows)
    dictionary.W_dec.data = rows
    dictionary.W_enc.data = rows.clone().T
    return dictionary


def normalise_rows(rows: Tensor) -> None:
    """Scale each row of [F, D] to norm 1, in place; the tiny summand keeps a zero row finite, as in the reference."""
    rows /= rows.norm(dim=1, keepdim=True) + EPSILON


def geometric_median(points: Tensor, iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """The point [D] with the least summed distance to `points` [B, D] (Weiszfeld's iteration, from the mean).

    Distances are floored, so a guess that meets a point does not divide by zero.
    """
    guess = points.mean(dim=0)
    for _ in range(iterations):
        weights = 1 / (points - guess).norm(dim=1).clamp_min(1e-12)
        new = (weights[:, None] * points).sum(dim=0) / weights.sum()
        converged = (new - guess).norm() < tolerance
        guess = new
        if converged:
            break
    return guess
