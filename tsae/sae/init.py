"""Initial weights: unit-norm random decoder rows, the encoder tied to them at the start."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tsae.config.sections import SaeConfig
from tsae.sae import architectures
from tsae.sae.dictionary import Dictionary

EPSILON = float(torch.finfo(torch.float32).eps)
JUMP_RELU_THRESHOLD = 0.001
"""Of arXiv 2407.14435, for activations of mean squared norm 1."""
APRIL_DECODER_NORM = 0.1
"""Of Anthropic's April 2024 update, which leaves decoder norms free."""


def new_dictionary(sae: SaeConfig, activation_dim: int, seed: int) -> Dictionary:
    """A fresh dictionary on the CPU, a function of its arguments alone."""
    dictionary = _empty_dictionary(sae, activation_dim)
    bound = math.sqrt(6 / activation_dim)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.empty(sae.dict_size, activation_dim).uniform_(-bound, bound, generator=generator)
    normalise_rows(rows)
    if sae.kind == "standard_april":
        rows *= APRIL_DECODER_NORM
    dictionary.W_dec.data = rows
    dictionary.W_enc.data = rows.clone().T
    if isinstance(dictionary, architectures.JumpReluAutoEncoder):
        dictionary.threshold.data.fill_(JUMP_RELU_THRESHOLD)
    return dictionary


def _empty_dictionary(sae: SaeConfig, activation_dim: int) -> Dictionary:
    size = activation_dim, sae.dict_size
    match sae.kind:
        case "temporal":
            return architectures.TemporalMatryoshkaBatchTopKSAE(*size, sae.k, sae.group_sizes)
        case "matryoshka":
            return architectures.MatryoshkaBatchTopKSAE(*size, sae.k, sae.group_sizes)
        case "batch_topk":
            return architectures.BatchTopKSAE(*size, sae.k)
        case "topk":
            return architectures.AutoEncoderTopK(*size, sae.k)
        case "jump_relu":
            return architectures.JumpReluAutoEncoder(*size)
        case "gated":
            return architectures.GatedAutoEncoder(*size)
        case "standard":
            return architectures.AutoEncoder(*size)
        case "standard_april":
            return architectures.AutoEncoderNew(*size)


def centre(dictionary: Dictionary, point: Tensor) -> None:
    """Put `b_dec` at `point` [D]; where the input is not centred by it, `b_enc` makes up for that at the start."""
    dictionary.b_dec.data.copy_(point)
    if not dictionary.centre_input:
        dictionary.b_enc.data.copy_(-point @ dictionary.W_enc.data)


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
