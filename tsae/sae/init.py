"""Initial weights: unit-norm random decoder rows, the encoder tied to them at the start."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tsae.config.sections import SaeConfig
from tsae.sae.dictionary import Dictionary, normalise_rows
from tsae.sae.kinds import KINDS, kind_of_class


def new_dictionary(sae: SaeConfig, activation_dim: int, seed: int) -> Dictionary:
    """A fresh dictionary on the CPU, a function of its arguments alone."""
    kind = KINDS[sae.kind]
    dictionary = kind.dictionary.sized(activation_dim, sae.dict_size, sae.k, sae.group_sizes)
    bound = math.sqrt(6 / activation_dim)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.empty(sae.dict_size, activation_dim).uniform_(-bound, bound, generator=generator)
    normalise_rows(rows)
    rows *= kind.first_norm
    dictionary.W_dec.data = rows
    dictionary.W_enc.data = rows.clone().T
    return dictionary


def random_dictionary(name: str, activation_dim: int, dict_size: int, seed: int = 0) -> Dictionary:
    """A dictionary of class `name` with random weights, biases and thresholds; for tests of files and formats."""
    k, high = max(1, dict_size // 16), max(1, dict_size // 5)
    cls = kind_of_class(name, "random_dictionary").dictionary
    dictionary = cls.sized(activation_dim, dict_size, k, (high, dict_size - high))
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(dict_size, activation_dim, generator=generator)
    rows /= rows.norm(dim=1, keepdim=True)
    dictionary.W_dec.data = rows
    mixed = rows + 0.1 * torch.randn(dict_size, activation_dim, generator=generator) / activation_dim**0.5
    dictionary.W_enc.data = mixed.T
    for parameter in dictionary.parameters():
        if parameter.ndim == 1:
            parameter.data = 0.1 * torch.randn(len(parameter), generator=generator)
    threshold = getattr(dictionary, "threshold", None)
    if threshold is not None:
        threshold.data = 0.2 + 0.3 * torch.rand(threshold.shape, generator=generator)
    return dictionary.eval().requires_grad_(False)


def centre(dictionary: Dictionary, point: Tensor) -> None:
    """Put `b_dec` at `point` [D]; where the input is not centred by it, `b_enc` makes up for that at the start."""
    dictionary.b_dec.data.copy_(point)
    if not dictionary.centre_input:
        dictionary.b_enc.data.copy_(-point @ dictionary.W_enc.data)


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
