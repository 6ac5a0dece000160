"""Top-k over a batch and over each token, the dense definitions."""

from __future__ import annotations

import torch
from torch import Tensor

from tsae.runtime.phases import phase


@phase("selection")
def batch_top_k(activations: Tensor, k: int) -> Tensor:
    """Keep the k·N largest of non-negative activations [..., F] over all N leading rows; zeros elsewhere.

    With fewer than k·N positive entries all positive ones are kept. Ties at the cut keep any of the tied.
    """
    flat = activations.flatten()
    count = min(k * (flat.numel() // activations.shape[-1]), flat.numel())
    top = flat.topk(count, sorted=False)
    return torch.zeros_like(flat).scatter(0, top.indices, top.values).reshape(activations.shape)


def top_k(activations: Tensor, k: int) -> Tensor:
    """Keep the k largest of non-negative activations [..., F] of each token; zeros elsewhere."""
    top = activations.topk(min(k, activations.shape[-1]), dim=-1, sorted=False)
    return torch.zeros_like(activations).scatter(-1, top.indices, top.values)
