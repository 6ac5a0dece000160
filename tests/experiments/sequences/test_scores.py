"""The scores of spliced contexts on codes made by hand, whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest

from tsae.experiments.sequences.scores import (
    SmoothnessCounts,
    boundary_lags,
    change_point_f1,
    leakage,
    persistence,
    phase_auc,
    phase_information,
    score,
    top_latents,
)

PASSAGE = np.repeat([0, 1, 2], [20, 30, 25])


def phases() -> np.ndarray:
    """Three latents, each on in exactly one passage."""
    return np.eye(3)[PASSAGE]


def noise(latents: int = 6, seed: int = 0) -> np.ndarray:
    """Latents that know nothing of the passages."""
    random = np.random.default_rng(seed)
    return random.random((len(PASSAGE), latents)) * (random.random((len(PASSAGE), latents)) < 0.3)


def test_latents_of_single_passages_are_told_from_noise() -> None:
    assert phase_auc(phases(), PASSAGE) == pytest.approx(1.0)
    assert phase_information(phases(), PASSAGE) == pytest.approx(1.0)
    assert phase_auc(noise(), PASSAGE).max() < 0.75
    assert phase_information(noise(), PASSAGE).max() < 0.2


def test_a_latent_that_is_always_on_carries_no_phase() -> None:
    always = np.ones((len(PASSAGE), 1))
    assert phase_auc(always, PASSAGE) == pytest.approx(0.5)
    assert np.isnan(phase_information(always, PASSAGE)).all()


def test_persistence_counts_neighbours_inside_passages_only() -> None:
    assert persistence(phases(), PASSAGE) == 1.0
    blinking = (np.arange(len(PASSAGE)) % 2 == 0).astype(float)[:, None]
    assert persistence(blinking, PASSAGE) == 0.0
    assert np.isnan(persistence(np.zeros((len(PASSAGE), 1)), PASSAGE))


def test_the_boundary_lag_is_the_number_of_tokens_the_old_topic_holds_on() -> None:
    late = np.repeat([0, 1, 2], [20 + 4, 30 - 4 + 7, 25 - 7])
    assert boundary_lags(phases(), PASSAGE).tolist() == [0.0, 0.0]
    assert boundary_lags(np.eye(3)[late], PASSAGE).tolist() == [4.0, 7.0]


def test_a_code_that_never_turns_to_the_new_passage_lags_by_all_of_it() -> None:
    assert boundary_lags(np.ones((len(PASSAGE), 1)), PASSAGE).tolist() == [30.0, 25.0]


def test_leakage_is_the_mass_after_the_best_passage() -> None:
    z = phases()
    z[25:35, 0] = 1.0  # ten of thirty
    z[:10, 1] = 0.5  # before its passage
    z[:5, 2] = 0.5  # before its passage, and it has none after it
    found = leakage(z, PASSAGE)
    assert found[:2] == pytest.approx([1 / 3, 0.0])
    assert np.isnan(found[2])


def test_change_points_are_found_at_borders_and_not_elsewhere() -> None:
    assert change_point_f1(phases(), PASSAGE, window=8, tolerance=2) == 1.0
    far = np.eye(3)[np.repeat([0, 1, 2], [35, 25, 15])]
    assert change_point_f1(far, PASSAGE, window=8, tolerance=5) == 0.0
    assert np.isnan(change_point_f1(phases(), np.zeros(len(PASSAGE), int), window=8, tolerance=2))


def test_one_guess_serves_one_border() -> None:
    near = np.repeat([0, 1, 2], [30, 4, 30])
    step = np.eye(2)[np.repeat([0, 1], [32, 32])]
    assert change_point_f1(step, near, window=8, tolerance=10) <= 0.5


@pytest.mark.parametrize(("rank", "expected"), [("total", 0), ("variance", 1), ("mean_active", 1)])
def test_each_rank_finds_its_latent(rank: str, expected: int) -> None:
    z = np.zeros((10, 2))
    z[:, 0], z[0, 1] = 1.0, 5.0
    assert top_latents(z, 1, rank).tolist() == [expected]


def test_all_scores_of_perfect_phases() -> None:
    found = score(phases(), PASSAGE, top=3, window=8, tolerance=2)
    assert found.phase_auc == found.persistence == found.change_point_f1 == 1.0
    assert found.boundary_lag == found.leakage == 0.0


def test_smooth_latents_are_told_from_blinking_and_silent_ones() -> None:
    counts = SmoothnessCounts(10)
    random = np.random.default_rng(0)
    for _ in range(20):
        z = np.column_stack([np.eye(3)[PASSAGE], random.random((len(PASSAGE), 3)) < 0.3]).astype(float)
        counts.add(z, np.array([1, 4, 6, 7, 8, 9]), PASSAGE)
    found = counts.autocorrelation()
    assert np.isnan(found[[0, 2, 3, 5]]).all()
    assert found[[1, 4, 6]].min() > 0.9 > 0.2 > found[[7, 8, 9]].max()
    assert counts.smoothest(0.5).tolist() == [1, 4, 6]
