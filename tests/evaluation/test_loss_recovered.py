"""Losses with replaced activations, on a real language model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tsae.config.run import RunConfig
from tsae.evaluation.loss_recovered import replaced, sequence_losses
from tsae.evaluation.results import loss_results
from tsae.lm.model import LanguageModel, load_language_model

LENGTHS = torch.tensor([12, 7, 12])
DOCUMENT = torch.tensor([[-1] + [0] * 11, [-1] + [1] * 6 + [-1] * 5, [-1] + [2] * 5 + [3] * 6], dtype=torch.int32)
VALID = DOCUMENT >= 0
TOKENS = torch.randint(2, 30, (3, 12), generator=torch.Generator().manual_seed(3), dtype=torch.int32)


@pytest.fixture
def model(config: RunConfig) -> LanguageModel:
    return load_language_model(config.model)


def losses_with(model: LanguageModel, reconstruct: object, ablation: Tensor | None = None) -> dict:
    ablation = torch.zeros(32) if ablation is None else ablation
    losses = sequence_losses(model, reconstruct, TOKENS, LENGTHS, DOCUMENT, VALID, ablation)  # type: ignore[arg-type]
    return {"losses": losses, **loss_results(losses, np.arange(3), "zero")[0]}


@torch.no_grad()
def test_original_loss_is_the_models_own_over_targets_inside_documents(model: LanguageModel) -> None:
    found = losses_with(model, torch.zeros_like)
    expected, count = 0.0, 0
    for row in range(3):
        length = int(LENGTHS[row])
        scores = model.module(input_ids=TOKENS[row : row + 1, :length].long()).logits[0].log_softmax(-1)
        for position in range(1, length):
            target = position + 1
            if target < length and DOCUMENT[row, position] == DOCUMENT[row, target]:
                expected -= float(scores[position, TOKENS[row, target].long()])
                count += 1
    assert found["losses"].targets.sum() == count == 10 + 5 + 4 + 5
    assert found["loss_original"][0] == pytest.approx(expected / count, rel=1e-5)


def test_perfect_reconstruction_recovers_all_and_ablation_nothing(model: LanguageModel) -> None:
    perfect = losses_with(model, lambda x: x)
    assert perfect["loss_reconstructed"] == perfect["loss_original"]
    assert perfect["frac_recovered"] == pytest.approx((1, 0))
    assert perfect["loss_increase"] == (0, 0)
    assert perfect["loss_zero"][0] != pytest.approx(perfect["loss_original"][0], rel=1e-3)

    nothing = losses_with(model, torch.zeros_like)
    assert nothing["loss_reconstructed"] == nothing["loss_zero"]
    assert nothing["frac_recovered"] == pytest.approx((0, 0))


def test_ablation_by_a_vector_is_what_the_reconstruction_by_that_vector_gives(model: LanguageModel) -> None:
    vector = torch.linspace(-1, 1, 32)
    found = losses_with(model, lambda x: vector.expand_as(x), ablation=vector)
    assert found["frac_recovered"][0] == pytest.approx(0)


def test_only_valid_positions_are_replaced() -> None:
    hidden = torch.randn(3, 12, 32, dtype=torch.float64).bfloat16()
    result = replaced(hidden, VALID, lambda x: x + 100)
    assert result.dtype == hidden.dtype
    assert torch.equal(result[~VALID], hidden[~VALID])
    assert (result[VALID].float() - hidden[VALID].float() > 90).all()
