"""The engine of SAEs that are sparse because of a penalty: its weight grows at first, then holds or seeks a target L0."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tsae.config.run import RunConfig
from tsae.parallel.group import ALONE, Group
from tsae.runtime.late import Late
from tsae.sae.dictionary import Dictionary
from tsae.sae.kinds import KINDS, Penalised, PenaltySettings
from tsae.training.objective import Encoded, Engine, Losses, Weights
from tsae.training.update import DECODER, OTHERS, Gradients, Shard, by_latent, whole_gradients

ADJUSTMENT = 0.02
"""Largest change of the logarithm of an adjusted weight in one step."""
FIRST_WEIGHT = 0.05
"""Where an adjusted L1 weight begins, for activations whose distance from b_dec is 1 (root mean square)."""


class PenaltyEngine(Engine[Dictionary]):
    """Reconstruction error plus weight · penalty. Keeps the weight, and the number of steps that it has seen.

    An L1 weight that no one chose is multiplied in every step by (L0 / target) to a small power, so that SAEs of
    different kinds can be compared at the same sparsity. With several processes losses and gradients are means of
    theirs, and L0 is that of the whole batch.
    """

    def __init__(self, config: RunConfig, group: Group = ALONE, shard: Shard | None = None) -> None:
        objective, self._group, self._shard = config.objective, group, shard or Shard(group)
        kind = KINDS[config.sae.kind]
        assert kind.penalty is not None
        self._penalise = kind.penalty
        self._settings = PenaltySettings(float(objective.target_l0 or config.sae.k), objective.bandwidth, group.mean)
        warmup = objective.sparsity_warmup_steps
        self._warmup = config.training.warmup if warmup is None else warmup
        chosen = objective.sparsity_penalty
        self._weight = kind.penalty_weight if chosen is None else chosen
        self._adjusted = self._weight is None
        self._active: Late | None = None
        self.steps = 0
        self._watched: Dictionary | None = None

    def encode(self, dictionary: Dictionary, current: Tensor, partner: Tensor | None) -> Encoded:
        del partner  # no penalty looks at pairs
        penalised = self._penalise(dictionary, current, self._settings)
        active = penalised.f.detach() > 0
        fired, cuts = self._group.any(active.any(dim=0)), current.new_full((1,), torch.inf)
        return Encoded(penalised, fired, active.sum()[None], cuts, penalised.f.detach().sum()[None])

    def backward(
        self,
        dictionary: Dictionary,
        weights: Weights,
        encoded: Encoded,
        current: Tensor,
        partner: Tensor | None,
        dead: Tensor,
        document: Tensor | None = None,
    ) -> tuple[Losses, Gradients]:
        del weights, partner, dead, document
        penalised: Penalised = encoded.codes
        squares = (current - dictionary.decode(penalised.f)).pow(2)
        l2_loss = squares.sum(dim=-1).mean()
        weight = l2_loss.new_full((), self._current_weight(dictionary, current))
        sparsity = weight * penalised.penalty
        loss = loss_here = l2_loss + sparsity + penalised.auxiliary
        summed = self._group.sums(encoded.n_active[0], loss, l2_loss, penalised.auxiliary, sparsity)
        n_active, loss, l2_loss, auxiliary, sparsity = (value / self._group.world for value in summed)
        # The next step asks for it, when this one is done.
        self._active, self._rows = Late(n_active), len(current)
        dictionary.zero_grad(set_to_none=True)
        self._sum_what_is_made(dictionary)
        (loss_here / self._group.world).backward()
        zero = l2_loss.new_zeros(())
        error = squares.detach().sum()
        terms = loss, l2_loss, l2_loss[None], auxiliary, zero, error, error[None], zero, sparsity, weight
        return Losses(*(term.detach() for term in terms)), whole_gradients(dictionary, self._shard.part)

    def _sum_what_is_made(self, dictionary: Dictionary) -> None:
        """Let every gradient's sum over processes begin as soon as the backward pass has made it."""
        if self._watched is dictionary:
            return
        self._watched = dictionary
        for parameter in dictionary.parameters():
            key = DECODER if parameter is dictionary.W_dec else OTHERS

            def begin_sum(made: Tensor, key: str = key) -> None:
                if made.grad is not None:
                    self._shard.start_sum(key, by_latent(made.grad))

            parameter.register_post_accumulate_grad_hook(begin_sum)

    @property
    def weight(self) -> float | None:
        """The weight after the last step; none before the first, where it depends on the activations."""
        if self._active is not None:
            self._advance(self._active.read() / self._rows)
            self._active = None
        return self._weight

    def _current_weight(self, dictionary: Dictionary, current: Tensor) -> float:
        weight = self.weight
        if weight is None:
            distance = (current - dictionary.b_dec.detach()).pow(2).sum(dim=-1).mean()
            weight = self._weight = FIRST_WEIGHT * float(self._group.mean(distance).sqrt())
        return weight * min(1.0, self.steps / self._warmup if self._warmup else 1.0)

    def _advance(self, l0: float) -> None:
        """Count a step; after the warm-up, move an adjusted weight up where too many latents are active, else down."""
        self.steps += 1
        if self._adjusted and self._weight is not None and self.steps > self._warmup:
            excess = math.log(max(l0, 1e-3) / self._settings.target_l0)
            self._weight *= math.exp(ADJUSTMENT * min(1.0, max(-1.0, excess)))

    def state(self) -> dict[str, Any]:
        """The weight and the number of steps."""
        return {"weight": self.weight, "steps": self.steps}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state()` returned."""
        self._weight, self.steps, self._active = state["weight"], state["steps"], None
