"""What another order of sums changes: a step by rounding alone, until rounding turns a choice.

A GPU rounds otherwise than a CPU; here noise of a float32's last bit on the batch stands for that, so that no GPU is needed to
see what it does. Each step begins with the state of the run that it is compared to: 40 steps on end from one state would
tell more of how choices propagate than of whether a step is right (`docs/evidence.md`, "CUDA").
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator

import pytest
import torch

from tsae.config import run as configuration
from tsae.config.sections import KIND_SETTINGS
from tsae.store.moments import Moments
from tsae.training.trainer import Trainer

DIM, BATCH, STEPS, LAST_BIT = 64, 128, 40, 6e-8
CASES = [("temporal", preset) for preset in ("predictive", "reference", "scale_free")]
CASES += [(kind, "predictive") for kind in KIND_SETTINGS if kind != "temporal"]
ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def built(kind: str, preset: str, device: str) -> Trainer:
    objective = {"preset": preset} if kind == "temporal" else {}
    settings = {"batch_size": BATCH, "steps": 400, "dead_after": 5 * BATCH}
    tree = {"sae": {"kind": kind, "dict_size": 1024, "k": 8}, "objective": objective, "training": settings}
    moments = Moments(1, torch.zeros(DIM), torch.full((DIM,), 1 / DIM, dtype=torch.float64), 1.0)
    return Trainer(configuration.from_mapping(tree, "test"), DIM, device=device, moments=moments)


def batches() -> Iterator[torch.Tensor]:
    """Pairs [B, 2, D] with something in common."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        yield torch.randn(BATCH, 1, DIM, generator=generator) + torch.randn(BATCH, 2, DIM, generator=generator)


def flat(trainer: Trainer) -> torch.Tensor:
    """All weights in one row."""
    return torch.cat([weight.detach().double().cpu().flatten() for weight in trainer.dictionary.parameters()])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_A_GPU)])
@pytest.mark.parametrize(("kind", "preset"), CASES)
def test_a_step_from_the_same_state_differs_by_rounding(kind: str, preset: str, device: str) -> None:
    one, other = built(kind, preset, "cpu"), built(kind, preset, device)
    noise, losses, updates = torch.Generator().manual_seed(1), [], []
    for batch in batches():
        if one.steps_done:
            other.load_state(copy.deepcopy(one.state()))
        before = flat(one)
        rounded = batch * (1 + LAST_BIT * torch.randn(batch.shape, generator=noise)) if device == "cpu" else batch
        expected, found = float(one.step(batch).loss), float(other.step(rounded.to(device)).loss)
        losses.append(abs(found - expected) / abs(expected))
        # A GPU brings the decoder's rows back to norm 1 by sums in another order: all weights may differ by their last bits,
        # which is much beside the update while the learning rate still rises.
        weights = 0.0 if device == "cpu" else 4 * LAST_BIT * float(before.norm())
        difference = max(0.0, float((flat(other) - flat(one)).norm()) - weights)
        updates.append(difference / float((flat(one) - before).norm()))
    assert statistics.median(losses) < 1e-6
    assert statistics.median(updates) < 2e-5
    # In a few steps rounding may turn a choice: which of two entries of the same size is selected, which side of an edge
    # an entry is on. More than that it is not.
    assert sum(difference > 2e-6 for difference in losses) <= STEPS / 10
    assert max(updates) < 0.1
