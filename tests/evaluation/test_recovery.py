"""The measures of recovery, on codes whose right answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tsae.evaluation import recovery
from tsae.evaluation.recovery import Split

N_SLOW, N_FAST = 3, 5


@pytest.fixture
def features() -> Tensor:
    """40 sequences of 20 tokens: slow features hold for a whole sequence, fast ones are drawn at every token."""
    generator = torch.Generator().manual_seed(0)
    slow = (torch.rand(40, 1, N_SLOW, generator=generator) < 0.4) * (
        1 + torch.rand(40, 20, N_SLOW, generator=generator)
    )
    fast = (torch.rand(40, 20, N_FAST, generator=generator) < 0.3) * (
        1 + torch.rand(40, 20, N_FAST, generator=generator)
    )
    return torch.cat([slow, fast], dim=2)


def split(high: list[int], low: list[int]) -> Split:
    """These latents against the kinds of `features`."""
    slow = np.arange(N_SLOW + N_FAST) < N_SLOW
    kinds = (np.flatnonzero(slow), np.flatnonzero(~slow))
    return Split((np.array(high, int), np.array(low, int)), kinds, slow, ~slow)


def test_codes_that_are_the_truth_score_perfectly(features: Tensor) -> None:
    similarity = recovery.correlations(features, features)
    right = split(list(range(N_SLOW)), list(range(N_SLOW, 8)))
    found = recovery.placement(similarity, right)
    assert [found[name] for name in ("slow", "slow_high", "fast_low")] == pytest.approx([1, 1, 1], abs=1e-5)
    assert found["disentanglement"] > 0.85
    assert recovery.purity(similarity, right, np.ones(8, bool)) == 1
    table = recovery.recovery_table(similarity, right)
    assert [table[0][0], table[1][1]] == pytest.approx([1, 1], abs=1e-5)


def test_swapped_groups_score_the_opposite(features: Tensor) -> None:
    similarity = recovery.correlations(features, features)
    wrong = split(list(range(N_SLOW, 8)), list(range(N_SLOW)))
    assert recovery.placement(similarity, wrong)["disentanglement"] < -0.85
    assert recovery.purity(similarity, wrong, np.ones(8, bool)) == 0


def test_matching_is_one_to_one_and_optimal() -> None:
    # Taken one after the other, the first feature would take the latent that the second needs.
    similarity = np.array([[0.9, 0.8], [0.7, 0.0], [-0.5, -0.9]])
    assert recovery.matched(similarity) == pytest.approx((0.8 + 0.7) / 3)


def test_one_latent_for_two_features_counts_once(features: Tensor) -> None:
    merged = features[..., :2].sum(-1, keepdim=True)
    similarity = recovery.correlations(features[..., :2], merged)
    assert recovery.matched(similarity) == pytest.approx(similarity.max() / 2)


def test_correlations_are_pearsons_and_zero_for_constants(features: Tensor) -> None:
    codes = torch.cat([features[..., :1] * 3 + 1, torch.full_like(features[..., :1], 7.3)], dim=2)
    similarity = recovery.correlations(features, codes)
    wanted = np.corrcoef(features.flatten(0, 1).T.numpy())[:, 0]
    np.testing.assert_allclose(similarity[:, 0], wanted, atol=1e-5)
    assert (similarity[:, 1] == 0).all()


def test_dead_latents_do_not_dilute_purity(features: Tensor) -> None:
    codes = torch.cat([features, torch.zeros(40, 20, 4)], dim=2)
    similarity = recovery.correlations(features, codes)
    alive = np.asarray((codes > 0).flatten(0, 1).any(0))
    assert recovery.purity(similarity, split([0, 1, 3, 8, 9, 10, 11], []), alive) == pytest.approx(2 / 3)
    assert np.isnan(recovery.purity(similarity, split([8, 9], []), alive))


def test_the_post_hoc_split_finds_the_slow_latents_wherever_they_lie(features: Tensor) -> None:
    order = torch.tensor([5, 0, 3, 1, 7, 2, 4, 6])
    high, low = recovery.split_by_time_scale(features[..., order], N_SLOW)
    assert sorted(order[high].tolist()) == [0, 1, 2]
    assert sorted([*high, *low]) == list(range(8))


def test_autocorrelation_and_persistence_stay_within_sequences() -> None:
    # Constant within each sequence: over their borders it would not look so.
    codes = torch.arange(6.0)[:, None, None].expand(6, 5, 1)
    assert recovery.autocorrelation(codes)[0] == pytest.approx(1)
    blinking = torch.tensor([1.0, 1, 0, 1, 1]).expand(3, 5)[..., None]
    assert recovery.persistence(blinking)[0] == pytest.approx(2 / 3)
    assert np.isnan(recovery.persistence(torch.zeros(2, 3, 1))[0])


def test_the_readout_tells_linear_codes_from_unrelated_ones(features: Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    mixed = features @ torch.randn(8, 8, generator=generator)
    assert recovery.readout(features, mixed) > 0.95
    assert recovery.readout(features, torch.randn(40, 20, 8, generator=generator)) < 0.05
    assert np.isnan(recovery.readout(features, mixed[..., :0]))


def test_the_oracle_beats_random_directions_by_far(features: Tensor) -> None:
    generator = torch.Generator().manual_seed(2)
    x = features @ torch.nn.functional.normalize(torch.randn(8, 16, generator=generator), dim=1)
    active = float((features > 0).sum(-1).float().mean())
    oracle, floor = recovery.oracle_codes(features, x, active), recovery.random_codes(x, 8, active)
    for codes in (oracle, floor):
        assert (codes > 0).sum() / 800 == pytest.approx(active, rel=0.01)
    best, worst = (recovery.matched(recovery.correlations(features, codes)) for codes in (oracle, floor))
    assert best > 0.97
    assert worst < 0.6
    assert torch.equal(floor, recovery.random_codes(x, 8, active))
