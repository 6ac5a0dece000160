"""The training objective, dense: the readable definition that every faster path is tested against, and its engine.

Shapes: B pairs (or single tokens), D activation_dim, F dict_size, G groups. Sources: Bussmann et al. 2025 for the nested
reconstruction, Gao et al. 2024 for aux-k; the temporal terms of codes stand in `tsae.training.temporal`. Prediction, the
one of reconstructions, stands here: with x̂₀(x) what the high-level split makes of a token, and p the activation of its
partner, some tokens back, ‖x − x̂₀(x)‖² gives way to ‖p − x̂₀(x)‖². What a code says of other tokens of the text is
what lasts; what holds of x alone is noise to it, and left to the low-level split. The partner needs no code.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, starmap
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from tsae.config.run import RunConfig, group_weights
from tsae.config.sections import KIND_SETTINGS, TERM_SETTINGS
from tsae.config.splits import coarse_latents
from tsae.runtime.late import Late
from tsae.runtime.phases import phase
from tsae.sae.dictionary import Dictionary, ThresholdDictionary
from tsae.training.temporal import TERMS, Pairs, Term
from tsae.training.update import EVERYTHING, Gradients, whole_gradients

COARSE = 0.1
"""Share of the weight of the second group that goes to its coarse part, where it has one."""

Number = float | Tensor
"""A number that the host knows, or that lies on the device, where it can change under launches that are recorded."""
D_contra = TypeVar("D_contra", bound=Dictionary, contravariant=True)


@dataclass(frozen=True)
class Weights:
    """The numbers that define the objective in one update, resolved from a RunConfig for one dictionary."""

    parts: tuple[slice, ...]
    """Latents that each nested reconstruction adds to those before it: the groups', but where one is cut for `coarse_fraction`."""
    ends: tuple[int, ...]
    """Which of them is the last of each group [G]."""
    part_weights: tuple[float, ...] | Tensor
    """Weight of each of them, the reduction over groups included [P]."""
    group_weights: tuple[float, ...] | Tensor
    """The same before the reduction."""
    reduction: float
    """What makes one of the other."""
    relative: bool
    """Whether reconstruction losses are divided by the batch's variance."""
    temporal: Term | None
    """The temporal term of codes, if there is one."""
    prediction: Number
    """Weight of the high-level reconstruction's error against the partner, in the unit of `part_weights`; 0 without that term."""
    paired: bool
    """Whether a token's partner has a part in the objective."""
    temporal_weight: float
    """The term's own weight."""
    alpha: float
    """`objective.temporal_alpha`."""
    anneal: float
    """What that is multiplied with at first."""
    temporal_alpha: Number
    """The two together in this update: what all of the term is multiplied with in the loss."""
    predicts: bool
    """Whether the term is prediction."""
    first: float
    """Weight of the first part, before the reduction, where prediction takes none of it."""
    similarity: str
    temperature: float
    same_document: bool
    """Whether partners of the same document are negatives."""
    auxk_alpha: float
    aux_k: int

    @classmethod
    def of(cls, config: RunConfig, activation_dim: int) -> Weights:
        """Resolve the `objective` section for the groups of the `sae` section, as in the first update."""
        objective, weights = config.objective, group_weights(config)
        reduction = 1 / len(weights) if objective.group_reduction == "mean" else 1.0
        parts = tuple(starmap(slice, pairwise((0, *accumulate(config.sae.group_sizes)))))
        ends = tuple(range(len(parts)))
        term, predicts = None, False
        if KIND_SETTINGS[config.sae.kind].temporal:
            predicts = TERM_SETTINGS[objective.temporal].predicts
            if not predicts:
                term = TERMS[objective.temporal]
            coarse = coarse_latents(config.sae, config.objective)
            if coarse:
                high, low, *rest = parts
                parts = (high, slice(low.start, low.start + coarse), slice(low.start + coarse, low.stop), *rest)
                weights = (weights[0], COARSE * weights[1], (1 - COARSE) * weights[1], *weights[2:])
                ends = (0, *range(2, len(parts)))
        resolved = cls(
            parts=parts,
            ends=ends,
            part_weights=tuple(weight * reduction for weight in weights),
            group_weights=weights,
            reduction=reduction,
            relative=objective.reconstruction == "variance",
            temporal=term,
            prediction=0.0,
            paired=term is not None or (predicts and objective.temporal_alpha > 0),
            temporal_weight=term.weight(config) if term else 0.0,
            alpha=objective.temporal_alpha,
            anneal=objective.temporal_anneal,
            temporal_alpha=objective.temporal_alpha,
            predicts=predicts,
            first=weights[0],
            similarity=objective.similarity,
            temperature=objective.temperature,
            same_document=objective.same_document,
            auxk_alpha=objective.auxk_alpha,
            aux_k=activation_dim // 2,
        )
        return resolved.at(0.0)

    def at(self, progress: float) -> Weights:
        """The same when this share of the training is done: the temporal term's weight falls over the first half."""
        alpha = self.alpha * (1 + (self.anneal - 1) * max(0.0, 1 - 2 * progress))
        if not self.predicts:
            return replace(self, temporal_alpha=alpha)
        weights = (max(0.0, 1 - alpha) * self.first, *self.group_weights[1:])
        return replace(
            self,
            temporal_alpha=alpha,
            group_weights=weights,
            part_weights=tuple(weight * self.reduction for weight in weights),
            prediction=alpha * self.first * self.reduction,
        )

    def numbers(self) -> list[float]:
        """What `on_device` takes from there, as the host knows it."""
        return [float(each) for each in (self.temporal_alpha, *self.group_weights, *self.part_weights, self.prediction)]

    def on_device(self, numbers: Tensor) -> Weights:
        """The same with its `numbers` [2 + 2P] on the device, where they can change under launches that are recorded."""
        alpha, of_groups, of_parts, prediction = numbers.split([1, len(self.parts), len(self.parts), 1])
        return replace(
            self,
            temporal_alpha=alpha[0],
            group_weights=of_groups,
            part_weights=of_parts,
            prediction=prediction[0],
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
    """Weighted mean squared error of each nested reconstruction, one for each of the weights' parts."""
    auxk_loss: Tensor
    temp_loss: Tensor
    """Temporal term before its weight; 0 without one. Of prediction the error against the partner."""
    squared_error: Tensor
    """Of the full reconstruction, summed over this process's rows."""
    group_errors: Tensor
    """The same of what each group reconstructs with the decoder's bias, without the others [G]."""
    temp_gradient: Tensor
    """Largest absolute gradient of the temporal term with respect to the current tokens' codes; 0 of prediction."""
    sparsity_loss: Tensor = torch.zeros(())
    """Penalty for dense codes, its weight included; 0 where selection makes them sparse."""
    sparsity_weight: Tensor = torch.zeros(())
    """That weight, which may be adjusted during training."""
    variance: Tensor | None = None
    """Mean squared distance of the whole batch's tokens from their mean, where the objective needed it."""


class Encoded(NamedTuple):
    """Codes of one step, in the engine's own form, and what the bookkeeping needs of them."""

    codes: Any
    fired: Tensor
    """Latents that fired on a current token [F], bool."""
    n_active: Tensor
    """Nonzero entries of the current tokens' codes in each group [G]."""
    cuts: Tensor
    """What the inference threshold of each part follows in which latents are selected by themselves: about the smallest
    activation kept; infinite if there is none."""
    mass: Tensor
    """Sum of the current tokens' feature activations in each group [G]."""
    counts: Tensor | None = None
    """What tells whether the codes are right, where that is to be seen; see `Engine.settled`."""


class Engine(Protocol[D_contra]):
    """Encodes a batch, then differentiates the objective."""

    most_dead: int | None = None
    """How many latents may be dead in the next `backward`, where the host knows without asking the device."""

    def encode(self, dictionary: D_contra, current: Tensor, partner: Tensor | None) -> Encoded:
        """Batch-top-k codes of current tokens [B, D], and of their partners [B, D] where the objective needs those."""

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

    def settled(self, encoded: Encoded, counts: Late | None) -> bool:
        """Whether what `encode` and `backward` have made is right, by its counts; if not, both are to be done again."""
        del encoded, counts
        return True

    def keep(self, encoded: Encoded) -> None:
        """Take from right codes what serves the next step."""
        del encoded

    def kind_of_step(self) -> Hashable | None:
        """What, besides shapes, decides what the next step launches; None where the host looks at the data."""
        return None

    def state(self) -> dict[str, Any]:
        """What a bit-exact continuation needs of the engine."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state()` returned."""
        del state  # most engines need nothing


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
    group_losses, error = nested_reconstruction(dictionary, codes.current, current, weights)
    spread = variance(current) if weights.relative else None
    with torch.no_grad():
        by_itself = [codes.current[:, group] @ dictionary.W_dec[group] for group in dictionary.group_slices]
        alone = torch.stack([(current - dictionary.b_dec - part).pow(2).sum() for part in by_itself])
    if spread is not None:
        group_losses = group_losses / spread
    l2_loss = group_losses.sum() * weights.reduction
    auxk = auxiliary(dictionary, codes.pre, error, dead, weights.aux_k)
    temporal = l2_loss.new_zeros(())
    if weights.temporal and codes.partner is not None and partner is not None:
        high = weights.parts[0]
        document = None if weights.same_document else document
        pairs = Pairs(current, partner, document, weights.similarity, weights.temperature)
        with phase("contrast"):
            value = weights.temporal.dense(codes.current[:, high], codes.partner[:, high], pairs)
        temporal = weights.temporal_weight * value
    loss = l2_loss + weights.auxk_alpha * auxk + weights.temporal_alpha * temporal
    if weights.predicts and partner is not None:
        high = weights.parts[0]
        predicted = codes.current[:, high] @ dictionary.W_dec[high] + dictionary.b_dec
        temporal = (partner - predicted).pow(2).sum(dim=-1).mean()
        if spread is not None:
            temporal = temporal / spread
        loss = l2_loss + weights.auxk_alpha * auxk + weights.prediction * temporal
    terms = loss, l2_loss, group_losses, auxk, temporal, error.square().sum(), alone
    return Losses(*terms, temp_gradient=l2_loss.new_zeros(()), variance=spread)


@phase("decode")
def nested_reconstruction(
    dictionary: ThresholdDictionary, f: Tensor, x: Tensor, weights: Weights
) -> tuple[Tensor, Tensor]:
    """Weighted loss of the reconstructions from parts 0..p of codes [B, F], and the last one's residual [B, D]."""
    reconstruction = dictionary.b_dec.expand_as(x)
    losses = []
    for weight, part in zip(weights.group_weights, weights.parts, strict=True):
        reconstruction = reconstruction + f[:, part] @ dictionary.W_dec[part]
        losses.append(weight * (x - reconstruction).pow(2).sum(dim=-1).mean())
    return torch.stack(losses), (x - reconstruction).detach()


def variance(x: Tensor) -> Tensor:
    """Mean squared distance of x [B, D] from its mean."""
    return (x - x.mean(dim=0)).pow(2).sum(dim=-1).mean()


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


def smallest_of(code: Tensor) -> Tensor:
    """The smallest positive entry of each row of a code [B, F] → [B]; infinite where there is none."""
    return torch.where(code > 0, code, torch.inf).amin(dim=1)


class DenseEngine(Engine[ThresholdDictionary]):
    """Autograd through the readable definition."""

    def encode(self, dictionary: ThresholdDictionary, current: Tensor, partner: Tensor | None) -> Encoded:
        # The selection is taken over each half by itself.
        with phase("encoder product"):
            pre = torch.relu(dictionary.pre_activations(current))
            other = None
            if partner is not None:
                other = dictionary.keep_largest(torch.relu(dictionary.pre_activations(partner)))
            codes = Codes(pre, dictionary.keep_largest(pre), other)
        code = codes.current.detach()
        positive = code > 0
        n_active, mass = (
            torch.stack([each[:, group].sum() for group in dictionary.group_slices]) for each in (positive, code)
        )
        cuts = torch.stack([dictionary.cut_of(smallest_of(code[:, part])) for part, _ in dictionary.budgets])
        return Encoded(codes, positive.any(dim=0), n_active, cuts, mass)

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
        if weights.temporal is not None and losses.temp_loss.requires_grad:
            # Asked for by the trainer's check that the temporal term really acts.
            (gradient,) = torch.autograd.grad(losses.temp_loss, encoded.codes.current, retain_graph=True)
            losses = losses._replace(temp_gradient=(gradient * (encoded.codes.current > 0)).abs().max())
        with phase("weight gradients"):
            losses.loss.backward()
        detached = {name: term.detach() for name, term in losses._asdict().items() if term is not None}
        return losses._replace(**detached), whole_gradients(dictionary, EVERYTHING.part)
