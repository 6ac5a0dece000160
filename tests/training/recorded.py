"""A trainer's gradients, which no one keeps: looked at when the optimizer gets them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tsae.training.trainer import Trainer
from tsae.training.update import Gradients, by_latent


def record_gradients(trainer: Trainer) -> dict[str, Tensor]:
    """Holds, after each step, what that step's update got for each parameter (projected, not clipped), as [F, D] if it
    is a matrix; a process that has its own latents finds those of all only where it updates all.
    """
    update, found = trainer.optimizer.update, dict[str, Tensor]()

    def recording(gradients: Gradients, norm: Tensor, *settings: Any) -> None:
        for name, parameter in trainer.dictionary.named_parameters():
            rows = by_latent(parameter.data)
            found[name] = gradients[parameter].chunk(0, rows, norm.new_ones(())).clone()
        update(gradients, norm, *settings)

    trainer.optimizer.update = recording  # type: ignore[method-assign]
    return found
