"""What of the language model's next-token prediction survives when its activations are replaced.

`results.loss_results` makes the measures of it. frac_recovered = (CE with reconstructions - CE ablated) / (CE original - CE ablated), the reference's ratio: 1 if nothing
is lost, 0 if reconstructions are as bad as none. Here cross-entropies are pooled over the tokens of held-out contexts
(the reference averages ratios of texts), in nats; only valid positions are replaced (the reference replaces BOS as well)
and only targets whose token and predecessor are valid positions of one document count.

Shapes: S sequences, L positions, V vocabulary, D activation_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from tsae.lm.model import LanguageModel


class SequenceLosses(NamedTuple):
    """Cross-entropy in nats summed over the targets of each sequence, float64 [S], and the number of targets [S]."""

    original: np.ndarray
    reconstructed: np.ndarray
    ablated: np.ndarray
    targets: np.ndarray


@torch.no_grad()
def sequence_losses(
    model: LanguageModel,
    reconstruct: Callable[[Tensor], Tensor],
    tokens: Tensor,
    lengths: Tensor,
    document: Tensor,
    valid: Tensor,
    ablation: Tensor,
) -> SequenceLosses:
    """The three losses of sequences `tokens` [S, L]; `document` and `valid` are [S, L], `ablation` is [D].

    `reconstruct` maps float32 activations [N, D] on the model's device to the like: a dictionary.
    """
    targets = valid[:, :-1] & valid[:, 1:] & (document[:, :-1] == document[:, 1:])

    def spliced(patch: Callable[[Tensor], Tensor]) -> np.ndarray:
        return _summed(model.splice(tokens, lengths, lambda hidden: replaced(hidden, valid, patch)), tokens, targets)

    return SequenceLosses(
        original=_summed(model.logits(tokens, lengths), tokens, targets),
        reconstructed=spliced(reconstruct),
        ablated=spliced(lambda x: ablation.to(x).expand_as(x)),
        targets=targets.sum(1).double().cpu().numpy(),
    )


def replaced(hidden: Tensor, valid: Tensor, patch: Callable[[Tensor], Tensor]) -> Tensor:
    """`hidden` [S, L, D] with `patch` ([N, D] → [N, D], float32) applied at the valid positions, others untouched."""
    valid = valid.to(hidden.device)
    result = hidden.clone()
    result[valid] = patch(hidden[valid].float()).to(hidden.dtype)
    return result


def _summed(logits: Tensor, tokens: Tensor, targets: Tensor) -> np.ndarray:
    """Cross-entropy summed over the targets of each sequence; logits [S, L, V], targets [S, L-1]. One row at a time,
    because logits in float32 are the largest array of all."""
    tokens, targets = tokens.to(logits.device).long(), targets.to(logits.device)
    sums = [
        torch.nn.functional.cross_entropy(row[:-1][wanted].float(), token[1:][wanted], reduction="none").double().sum()
        for row, token, wanted in zip(logits, tokens, targets, strict=True)
    ]
    return torch.stack(sums).cpu().numpy()
