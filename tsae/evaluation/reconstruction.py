"""How well a dictionary reconstructs the activations of one context: pure functions of tensors.

Shapes: T positions, D activation_dim, A active latents, R ranges of latents (all, high, low, each group).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tsae.evaluation.codes import ActiveCode, Ranges, reduce_ranges
from tsae.sae.dictionary import Dictionary
from tsae.sae.inference import decode_latents
from tsae.sae.sparse import SparseCode


def decode_ranges(dictionary: Dictionary, code: SparseCode) -> list[Tensor]:
    """R reconstructions [N, D] of the codes of N tokens: whole, high-level only, low-level only, each group alone.

    The whole one holds the decoder's bias, the others do not.
    """
    alone = [decode_latents(dictionary, code, group) for group in dictionary.group_slices]
    rest = sum(alone[2:], start=alone[1]) if len(alone) > 1 else torch.zeros_like(alone[0])
    return [sum(alone[1:], start=alone[0]) + dictionary.b_dec, alone[0], rest, *alone]


def variance_explained(x: Tensor, reconstructions: Sequence[Tensor]) -> Tensor:
    """1 - Var(x - x̂) / Var(x) within one context for each reconstruction [T, D], float64 [R]; NaN for T < 2.

    Variances are over positions, summed over D; a constant shift of x̂ has no effect. The reference's definition.
    """
    if len(x) < 2:
        return torch.full((len(reconstructions),), torch.nan, dtype=torch.float64)
    # The reference's own reduction: where the value is near 0, another order of summation changes its last digits.
    total = x.var(0).sum()
    return torch.stack([1 - (x - x_hat).var(0).sum() / total for x_hat in reconstructions]).double().cpu()


def squared_errors(x: Tensor, reconstructions: Sequence[Tensor], bias: Tensor) -> Tensor:
    """Sum of ‖x - x̂‖² over the context for each reconstruction, float64 [R]; `bias` is added to all but the first."""
    errors = [x - reconstructions[0], *(x - bias - part for part in reconstructions[1:])]
    return torch.stack([error.square().sum(1).double().sum().cpu() for error in errors])


def token_means(x: Tensor, x_hat: Tensor) -> dict[str, Tensor]:
    """Means over the T tokens of one context, as the reference defines them; scalars.

    l2_loss: distance, not squared; cossim, l2_ratio: cosine of x and x̂ and ‖x̂‖ / ‖x‖;
    relative_reconstruction_bias: E‖x̂‖² / E[x·x̂], 1 where norms are neither shrunk nor stretched.
    """
    norm, norm_hat = x.norm(dim=1), x_hat.norm(dim=1)
    dot = (x * x_hat).sum(1)
    return {
        "l2_loss": (x - x_hat).norm(dim=1).mean(),
        "cossim": (dot / (norm * norm_hat)).mean(),
        "l2_ratio": (norm_hat / norm).mean(),
        "relative_reconstruction_bias": norm_hat.square().mean() / dot.mean(),
    }


def sparsity(code: ActiveCode, ranges: Ranges) -> dict[str, Tensor]:
    """Active latents per token (l0), summed activation per token (l1_loss), distinct latents (sequence_l0); each [R]."""
    slices, positions = code.slices(ranges), code.values.shape[1]
    return {
        "l0": reduce_ranges((code.values > 0).sum(1), slices) / positions,
        "l1_loss": reduce_ranges(code.values.sum(1), slices) / positions,
        "sequence_l0": torch.tensor([float(part.stop - part.start) for part in slices], dtype=torch.float64),
    }
