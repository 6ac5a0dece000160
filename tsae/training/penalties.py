"""Objectives of SAEs whose codes are sparse because of a penalty; dense, differentiated by autograd.

Shapes: B tokens, D activation_dim, F dict_size. Each function takes the dictionary, tokens x [B, D] and its settings,
and returns the code, the penalty before its weight, and what the objective adds besides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tsae.sae.architectures import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder


class PenaltySettings(NamedTuple):
    """What the penalties need of a configuration."""

    target_l0: float
    bandwidth: float
    mean: Callable[[Tensor], Tensor]
    """Over the processes that share the batch."""


class Penalised(NamedTuple):
    """A code [B, F] and the terms that come with it, scalars that carry their gradients."""

    f: Tensor
    penalty: Tensor
    auxiliary: Tensor


def standard(dictionary: AutoEncoder, x: Tensor, _: PenaltySettings) -> Penalised:
    """L1 of the code; decoder rows have norm 1, so that it cannot be evaded by scaling (Bricken et al. 2023)."""
    f = dictionary.encode(x)
    return Penalised(f, f.sum(dim=-1).mean(), f.new_zeros(()))


def standard_april(dictionary: AutoEncoderNew, x: Tensor, _: PenaltySettings) -> Penalised:
    """L1 of the code weighted by decoder norms, which are free (Anthropic's April 2024 update)."""
    f = dictionary.encode(x)
    return Penalised(f, (f * dictionary.W_dec.norm(dim=1)).sum(dim=-1).mean(), f.new_zeros(()))


def gated(dictionary: GatedAutoEncoder, x: Tensor, _: PenaltySettings) -> Penalised:
    """L1 of the rectified gates, which must also reconstruct through a frozen decoder (arXiv 2404.16014, eq. 8)."""
    gates, magnitudes = dictionary.gates_and_magnitudes(x)
    opened = torch.relu(gates)
    through_gates = opened @ dictionary.W_dec.detach() + dictionary.b_dec.detach()
    auxiliary = (x - through_gates).pow(2).sum(dim=-1).mean()
    return Penalised(magnitudes * (gates > 0), opened.sum(dim=-1).mean(), auxiliary)


def jump_relu(dictionary: JumpReluAutoEncoder, x: Tensor, settings: PenaltySettings) -> Penalised:
    """Squared relative distance of L0 from its target, through a kernel (arXiv 2407.14435, eqs. 10-12 and appendix)."""
    pre = torch.relu(dictionary.pre_activations(x))
    f = _JumpRelu.apply(pre, dictionary.threshold, settings.bandwidth)
    l0 = _Step.apply(pre, dictionary.threshold, settings.bandwidth).sum(dim=-1).mean()
    # The penalty is not linear in L0, so its slope is that at the whole batch's; the gradient is this process's own.
    l0 = l0 + (settings.mean(l0.detach()) - l0.detach())
    return Penalised(f, (l0 / settings.target_l0 - 1).square(), f.new_zeros(()))


def _near(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """The rectangular kernel: 1 where a pre-activation is within half a bandwidth of its threshold."""
    return ((pre - threshold).abs() < bandwidth / 2).to(pre.dtype)


class _JumpRelu(torch.autograd.Function):
    """pre · [pre > threshold], with the threshold's expected gradient estimated near it."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        near = gradients[0] * _near(pre, threshold, ctx.bandwidth)
        return gradients[0] * (pre > threshold), -threshold / ctx.bandwidth * near.sum(dim=0), None


class _Step(torch.autograd.Function):
    """[pre > threshold], with the threshold's expected gradient estimated near it; none for the pre-activation."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        return None, -(gradients[0] * _near(pre, threshold, ctx.bandwidth)).sum(dim=0) / ctx.bandwidth, None
