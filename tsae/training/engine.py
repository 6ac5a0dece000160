"""What computes codes and gradients for a step: the dense definition, or the sparse path with the same numbers."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tsae.phases import phase
from tsae.sae.dictionary import ThresholdDictionary
from tsae.training.objective import Losses, Weights, encode_batch, objective


class Encoded(NamedTuple):
    """Codes of one step, in the engine's own form, and what the bookkeeping needs of them."""

    codes: Any
    fired: Tensor
    """Latents that fired on a current token [F], bool."""
    n_active: Tensor
    """Nonzero entries of the current tokens' codes."""
    smallest: Tensor
    """Smallest positive feature activation; infinite if there is none."""


class Engine(Protocol):
    """Encodes a batch, then leaves the objective's gradients in the dictionary's parameters."""

    def encode(self, dictionary: ThresholdDictionary, current: Tensor, partner: Tensor | None) -> Encoded:
        """Batch-top-k codes of current tokens [B, D] and their partners [B, D]."""

    def backward(
        self,
        dictionary: ThresholdDictionary,
        weights: Weights,
        encoded: Encoded,
        current: Tensor,
        partner: Tensor | None,
        dead: Tensor,
    ) -> Losses:
        """Set `.grad` of all four parameters; returns the terms, detached. `dead` [F] marks what aux-k revives."""


class DenseEngine:
    """Autograd through the readable definition."""

    def encode(self, dictionary: ThresholdDictionary, current: Tensor, partner: Tensor | None) -> Encoded:
        codes = encode_batch(dictionary, current, partner)
        code = codes.current.detach()
        positive = code > 0
        smallest = torch.where(positive, code, torch.inf).min()
        return Encoded(codes, positive.any(dim=0), positive.sum(), smallest)

    def backward(
        self,
        dictionary: ThresholdDictionary,
        weights: Weights,
        encoded: Encoded,
        current: Tensor,
        partner: Tensor | None,
        dead: Tensor,
    ) -> Losses:
        losses = objective(dictionary, weights, encoded.codes, current, partner, dead)
        dictionary.zero_grad(set_to_none=True)
        if losses.temp_loss.requires_grad:
            # Asked for by the trainer's check that the temporal term really acts.
            (gradient,) = torch.autograd.grad(losses.temp_loss, encoded.codes.current, retain_graph=True)
            losses = losses._replace(temp_gradient=(gradient * (encoded.codes.current > 0)).abs().max())
        with phase("weight gradients"):
            losses.loss.backward()
        return Losses(*(term.detach() for term in losses))
