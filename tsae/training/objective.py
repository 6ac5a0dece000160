"""The training objective, dense: the readable definition that every faster path is tested against.

Shapes: B pairs (or single tokens), D activation_dim, F dict_size, G groups. Sources: T-SAE paper (arXiv 2511.05541)
eqs. 3-5 for the temporal term, Bussmann et al. 2025 for the nested reconstruction, Gao et al. 2024 for aux-k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from tsae.config.run import RunConfig, group_weights
from tsae.parallel.group import ALONE, Group
from tsae.runtime.phases import phase
from tsae.sae.dictionary import ThresholdDictionary

EXCLUDED = -1e30
"""The logit of a pair that is not to count."""


@dataclass(frozen=True)
class Weights:
    """The numbers that define the objective, resolved from a RunConfig for one dictionary."""

    groups: tuple[float, ...]
    """Weight of each nested reconstruction, its reduction over groups included."""
    group_weights: tuple[float, ...]
    """The same before the reduction; the L1 temporal term carries the first one."""
    reduction: float
    """What makes one of the other."""
    relative: bool
    """Whether reconstruction losses are divided by the batch's variance."""
    temporal: str | None
    temporal_alpha: float
    similarity: str
    temperature: float
    same_document: bool
    """Whether partners of the same document are negatives."""
    direction_scale: float
    auxk_alpha: float
    aux_k: int

    @classmethod
    def of(cls, config: RunConfig, activation_dim: int) -> Weights:
        """Resolve the `objective` section for the groups of the `sae` section."""
        objective, weights = config.objective, group_weights(config)
        reduction = 1 / len(weights) if objective.group_reduction == "mean" else 1.0
        return cls(
            groups=tuple(weight * reduction for weight in weights),
            group_weights=weights,
            reduction=reduction,
            relative=objective.reconstruction == "variance",
            temporal=objective.temporal if config.sae.kind == "temporal" else None,
            temporal_alpha=objective.temporal_alpha,
            similarity=objective.similarity,
            temperature=objective.temperature,
            same_document=objective.same_document,
            direction_scale=0.5 if objective.directions == "mean" else 1.0,
            auxk_alpha=objective.auxk_alpha,
            aux_k=activation_dim // 2,
        )


class Codes(NamedTuple):
    """Encoder outputs of one step."""

    pre: Tensor
    """Rectified pre-activations of the current tokens [B, F]."""
    current: Tensor
    """Their code after selection [B, F]."""
    partner: Tensor | None
    """The partners' code after selection [B, F]; none without a temporal term."""


class Losses(NamedTuple):
    """Terms of the objective, each a scalar that carries its gradient."""

    loss: Tensor
    l2_loss: Tensor
    """Nested reconstruction loss, combined over groups."""
    group_losses: Tensor
    """Weighted mean squared error of each nested reconstruction [G]."""
    auxk_loss: Tensor
    temp_loss: Tensor
    """Temporal term before its weight; 0 without one."""
    error: Tensor
    """Residual of the full reconstruction [B, D], detached."""
    temp_gradient: Tensor
    """Largest absolute gradient of the temporal term with respect to the current tokens' codes."""
    sparsity_loss: Tensor = torch.zeros(())
    """Penalty for dense codes, its weight included; 0 where selection makes them sparse."""
    sparsity_weight: Tensor = torch.zeros(())
    """That weight, which may be adjusted during training."""


@phase("encoder product")
def encode_batch(dictionary: ThresholdDictionary, current: Tensor, partner: Tensor | None) -> Codes:
    """Codes of the current tokens [B, D] and of their partners; selection is taken over each half by itself."""
    pre = torch.relu(dictionary.pre_activations(current))
    other = None
    if partner is not None:
        other = dictionary.keep_largest(torch.relu(dictionary.pre_activations(partner)))
    return Codes(pre, dictionary.keep_largest(pre), other)


def objective(
    dictionary: ThresholdDictionary,
    weights: Weights,
    codes: Codes,
    current: Tensor,
    partner: Tensor | None,
    dead: Tensor,
    document: Tensor | None = None,
) -> Losses:
    """All terms for codes of `current` [B, D]; `dead` [F] marks the latents that aux-k revives.

    `document` [B] tells which pairs are of one document; it is needed where those are no negatives.
    """
    group_losses, error = nested_reconstruction(dictionary, codes.current, current, weights.group_weights)
    if weights.relative:
        group_losses = group_losses / variance(current)
    l2_loss = group_losses.sum() * weights.reduction
    auxk = auxiliary(dictionary, codes.pre, error, dead, weights.aux_k)
    temporal = l2_loss.new_zeros(())
    if weights.temporal and codes.partner is not None and partner is not None:
        high = dictionary.group_slices[0]
        pair = (codes.current[:, high], codes.partner[:, high])
        if weights.temporal == "contrastive":
            temporal = contrastive(*pair, weights, None if weights.same_document else document)
        elif weights.temporal == "linear":
            temporal = linear(*pair, weights)
        elif weights.temporal == "l2":
            temporal = squared_distance(*pair)
        else:
            temporal = weighted_l1(*pair, cosine_similarity(current, partner, dim=-1)) * weights.group_weights[0]
    loss = l2_loss + weights.auxk_alpha * auxk + weights.temporal_alpha * temporal
    return Losses(loss, l2_loss, group_losses, auxk, temporal, error, l2_loss.new_zeros(()))


@phase("decode")
def nested_reconstruction(
    dictionary: ThresholdDictionary, f: Tensor, x: Tensor, weights: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """Weighted loss [G] of the reconstructions from groups 0..g of codes [B, F], and the last one's residual [B, D]."""
    reconstruction = dictionary.b_dec.expand_as(x)
    losses = []
    for weight, group in zip(weights, dictionary.group_slices, strict=True):
        reconstruction = reconstruction + f[:, group] @ dictionary.W_dec[group]
        losses.append(weight * (x - reconstruction).pow(2).sum(dim=-1).mean())
    return torch.stack(losses), (x - reconstruction).detach()


def variance(x: Tensor, group: Group = ALONE) -> Tensor:
    """Mean squared distance of x [B, D] from its mean, over the batches of all processes."""
    return group.mean((x - group.mean(x.mean(dim=0))).pow(2).sum(dim=-1).mean())


@phase("contrast")
def contrastive(high: Tensor, other: Tensor, weights: Weights, document: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE of high-level codes [B, F0]: each token's own partner against all partners of the batch.

    With `document` [B], against those of other documents.
    """
    logits = _similarities(high, other, weights)
    if document is not None:
        own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill((document[:, None] == document) & ~own, EXCLUDED)
    labels = torch.arange(len(logits), device=logits.device)
    return weights.direction_scale * (cross_entropy(logits, labels) + cross_entropy(logits.T, labels))


@phase("contrast")
def linear(high: Tensor, other: Tensor, weights: Weights) -> Tensor:
    """What InfoNCE is to first order: the mean similarity of codes [B, F0] of all pairs minus that of the true ones.

    Both directions are equal. Proposed by a reviewer of the paper (openreview.net, bojVI4l9Kn).
    """
    similarities = _similarities(high, other, weights)
    return 2 * weights.direction_scale * (similarities.mean() - similarities.diagonal().mean())


def _similarities(high: Tensor, other: Tensor, weights: Weights) -> Tensor:
    """[B, B] similarities of high-level codes [B, F0], divided by the temperature."""
    if weights.similarity == "cosine":
        high, other = (f / f.norm(dim=-1, keepdim=True).clamp_min(1e-8) for f in (high, other))
    return high @ other.T / weights.temperature


@phase("contrast")
def squared_distance(high: Tensor, other: Tensor) -> Tensor:
    """Mean squared distance of high-level codes [B, F0]: the paper's ablation without contrast."""
    return (high - other).square().sum(dim=-1).mean()


@phase("contrast")
def weighted_l1(high: Tensor, other: Tensor, cosine: Tensor) -> Tensor:
    """Mean L1 distance of high-level codes [B, F0], each pair weighted by the cosine [B] of its inputs."""
    return ((high - other).abs().sum(dim=-1) * cosine).mean()


@phase("aux-k")
def auxiliary(dictionary: ThresholdDictionary, pre: Tensor, error: Tensor, dead: Tensor, aux_k: int) -> Tensor:
    """How well the strongest dead latents explain the residual [B, D], relative to its variance (Gao et al. 2024, A.2)."""
    n_dead = int(dead.sum())
    if n_dead == 0:
        return error.new_zeros(())
    latents = dead.nonzero()[:, 0]
    strongest = pre[:, latents].topk(min(aux_k, n_dead), dim=-1, sorted=False)
    revived = torch.zeros_like(pre[:, latents]).scatter(1, strongest.indices, strongest.values)
    difference = (error - revived @ dictionary.W_dec[latents]).pow(2).sum(dim=-1).mean()
    return (difference / variance(error)).nan_to_num(0.0)
