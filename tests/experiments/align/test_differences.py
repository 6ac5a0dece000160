"""The alignment study on planted differences: a concept shift is found, a length-only shift is put down to length."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats
from scipy.sparse import csr_array

from tsae.config.experiments import AlignConfig
from tsae.evaluation.statistics import bootstrap_means
from tsae.experiments.align.differences import Differences, false_discovery, length_test, paired_test
from tsae.experiments.align.experiment import CONCEPT, LENGTH, NOTHING, run_tests

PAIRS, LATENTS = 400, 60


def planted(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Differences [P, F] and lengths [P, 2]: latent 0 shifts by itself, latent 1 with length alone, the rest are noise."""
    random = np.random.default_rng(seed)
    lengths = np.stack([random.integers(20, 60, PAIRS), random.integers(28, 80, PAIRS)], 1)
    longer = lengths[:, 1] - lengths[:, 0]
    d = random.normal(size=(PAIRS, LATENTS)) * (random.random((PAIRS, LATENTS)) < 0.4)
    d[:, 0] = 0.5 + random.normal(size=PAIRS)
    d[:, 1] = 0.06 * longer + random.normal(size=PAIRS)
    return d, lengths


def results(d: np.ndarray, lengths: np.ndarray, **settings: Any) -> Any:
    sparse = csr_array(d)
    return run_tests(Differences(sparse, sparse, sparse, lengths, np.arange(len(d))), AlignConfig(**settings))


@pytest.mark.parametrize("seed", range(5))
def test_a_concept_shift_is_found_and_a_length_shift_attributed_to_length(seed: int) -> None:
    found = results(*planted(seed))
    assert found.q[0] < 0.01
    assert found.q[1] < 0.01
    assert found.label(0, 0.05) == CONCEPT
    assert found.label(1, 0.05) == LENGTH
    assert [found.label(latent, 0.05) for latent in range(2, LATENTS)].count(NOTHING) >= LATENTS - 4
    assert abs(found.length.intercept[0] - 0.5) < 0.25
    assert abs(found.length.intercept[1]) < 0.25
    assert found.length.correlation[1] > 0.5 > abs(found.length.correlation[0])


def test_the_matched_subset_agrees_with_the_regression() -> None:
    d, lengths = planted()
    found = results(d, lengths, matched_tokens=4)
    near = np.abs(lengths[:, 1] - lengths[:, 0]) <= 4
    assert found.matched_pairs == near.sum()
    assert found.matched.mean == pytest.approx(d[near].mean(0))


def test_latents_active_in_few_pairs_are_not_tested() -> None:
    d, lengths = planted()
    d[5:, 3] = 0.0
    d[:, 4] = 0.0
    found = results(d, lengths)
    assert not found.tested[[3, 4]].any()
    assert np.isnan(found.q[[3, 4]]).all()


def test_the_paired_test_is_the_textbooks() -> None:
    d, _ = planted()
    found, expected = paired_test(csr_array(d)), stats.ttest_1samp(d, 0)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.effect == pytest.approx(d.mean(0) / d.std(0, ddof=1))


def test_the_length_regression_is_the_textbooks_in_blocks_of_any_size() -> None:
    d, lengths = planted()
    longer = (lengths[:, 1] - lengths[:, 0]).astype(float)
    found = length_test(csr_array(d), longer, block=7)
    design = np.stack([np.ones(PAIRS), longer, longer**2], 1)
    expected = np.linalg.lstsq(design, d, rcond=None)[0]
    assert found.intercept == pytest.approx(expected[0])
    assert found.correlation[1] == pytest.approx(stats.pearsonr(longer, d[:, 1])[0])
    assert found.correlation_p[1] == pytest.approx(stats.pearsonr(longer, d[:, 1])[1])


def test_pairs_of_one_length_leave_the_mean_as_it_is() -> None:
    d, _ = planted()
    found = length_test(csr_array(d), np.zeros(PAIRS))
    assert found.intercept == pytest.approx(d.mean(0))
    assert np.isnan(found.correlation).all()


def test_false_discoveries_are_counted_over_tested_latents_alone() -> None:
    p = np.array([0.001, 0.02, 0.03, np.nan, 0.5])
    found = false_discovery(p, np.array([True, True, False, True, True]))
    assert found[[0, 1, 4]] == pytest.approx([0.003, 0.03, 0.5])
    assert np.isnan(found[[2, 3]]).all()


def test_bootstrap_intervals_cover_the_mean() -> None:
    d, _ = planted()
    low, high = bootstrap_means(d[:, :2], 500, 0)
    half = 1.96 * d[:, :2].std(0) / np.sqrt(PAIRS)
    assert (high - low) / 2 == pytest.approx(half, rel=0.15)


def test_pairs_without_a_length_difference_to_speak_of_are_still_tested() -> None:
    d, lengths = planted()
    same = SimpleNamespace(lengths=np.full_like(lengths, 30)).lengths
    found = results(d, same)
    assert found.label(0, 0.05) == CONCEPT
    assert found.matched_pairs == PAIRS
