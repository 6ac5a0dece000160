"""Batch-top-k, the dense definition."""

from __future__ import annotations

import torch
from torch import Tensor


def batch_top_k(activations: Tensor, k: int) -> Tensor:
    """Keep the k·N largest of non-negative activations [..., F] over all N leading rows; zeros elsewhere.

    With fewer than k·N positive entries all positive ones are kept. Ties at the cut keep any of the tied.
    """
    flat = activations.flatten()
    count = min(k * (flat.numel() // activations.shape[-1]), flat.numel())
    top = flat.topk(count, sorted=False)
    return torch.zeros_like(flat).scatter(0, top.indices, top.values).reshape(activations.shape)
