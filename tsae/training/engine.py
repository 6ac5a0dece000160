"""What computes codes and gradients for a step: the dense definition, or the sparse path with the same numbers."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from tsae.runtime.phases import phase
from tsae.sae.dictionary import Dictionary, ThresholdDictionary
from tsae.training.gradients import Gradients, whole_gradients
from tsae.training.objective import Losses, Weights, encode_batch, objective
from tsae.training.sharding import EVERYTHING

D_contra = TypeVar("D_contra", bound=Dictionary, contravariant=True)


class Encoded(NamedTuple):
    """Codes of one step, in the engine's own form, and what the bookkeeping needs of them."""

    codes: Any
    fired: Tensor
    """Latents that fired on a current token [F], bool."""
    n_active: Tensor
    """Nonzero entries of the current tokens' codes."""
    cut: Tensor
    """What the inference threshold follows: about the smallest activation kept; infinite if there is none."""
    mass: Tensor
    """Sum of the current tokens' feature activations in each group [G]."""


class Engine(Protocol[D_contra]):
    """Encodes a batch, then differentiates the objective."""

    def encode(self, dictionary: D_contra, current: Tensor, partner: Tensor | None) -> Encoded:
        """Batch-top-k codes of current tokens [B, D] and their partners [B, D]."""

    def backward(
        self,
        dictionary: D_contra,
        weights: Weights,
        encoded: Encoded,
        current: Tensor,
        partner: Tensor | None,
        dead: Tensor,
        document: Tensor | None = None,
    ) -> tuple[Losses, Gradients]:
        """The terms, detached, and the gradients of all parameters. `dead` [F] marks what aux-k revives.

        `document` [B] of each pair is needed where those of one document are no negatives.
        """

    def state(self) -> dict[str, Any]:
        """What a bit-exact continuation needs of the engine."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state()` returned."""
        del state  # most engines need nothing


class DenseEngine(Engine[ThresholdDictionary]):
    """Autograd through the readable definition."""

    def encode(self, dictionary: ThresholdDictionary, current: Tensor, partner: Tensor | None) -> Encoded:
        codes = encode_batch(dictionary, current, partner)
        code = codes.current.detach()
        positive = code > 0
        smallest = torch.where(positive, code, torch.inf).amin(dim=1)
        mass = torch.stack([code[:, group].sum() for group in dictionary.group_slices])
        return Encoded(codes, positive.any(dim=0), positive.sum(), dictionary.cut_of(smallest), mass)

    def backward(
        self,
        dictionary: ThresholdDictionary,
        weights: Weights,
        encoded: Encoded,
        current: Tensor,
        partner: Tensor | None,
        dead: Tensor,
        document: Tensor | None = None,
    ) -> tuple[Losses, Gradients]:
        losses = objective(dictionary, weights, encoded.codes, current, partner, dead, document)
        dictionary.zero_grad(set_to_none=True)
        if losses.temp_loss.requires_grad:
            # Asked for by the trainer's check that the temporal term really acts.
            (gradient,) = torch.autograd.grad(losses.temp_loss, encoded.codes.current, retain_graph=True)
            losses = losses._replace(temp_gradient=(gradient * (encoded.codes.current > 0)).abs().max())
        with phase("weight gradients"):
            losses.loss.backward()
        return Losses(*(term.detach() for term in losses)), whole_gradients(dictionary, EVERYTHING.own)
