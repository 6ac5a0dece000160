"""What is pooled over contexts, its intervals, and what is refused."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from tsae.config.sections import SaeConfig
from tsae.evaluation.held_out import runs
from tsae.evaluation.results import summarise
from tsae.evaluation.scores import Scores
from tsae.evaluation.smoothness import active_code, in_reference, latents_of
from tsae.evaluation.statistics import mean_interval, ratio_interval
from tsae.runtime.errors import TsaeError
from tsae.sae.dictionary import Dictionary
from tsae.sae.init import new_dictionary
from tsae.sae.kinds import GatedAutoEncoder

LENGTHS = [9, 30, 17, 24]


def small_dictionary(threshold: float = 0.5, **settings: object) -> Dictionary:
    dictionary = new_dictionary(SaeConfig(dict_size=40, k=4, **settings), 12, seed=0)  # type: ignore[arg-type]
    dictionary.threshold.fill_(threshold)
    dictionary.b_dec.data = torch.linspace(-1, 1, 12)
    return dictionary


def activations() -> torch.Tensor:
    return torch.randn(sum(LENGTHS), 12, generator=torch.Generator().manual_seed(1)) + 3


def scored(dictionary: Dictionary, x: torch.Tensor) -> Scores:
    scores = Scores(dictionary)
    scores.add(x, LENGTHS, [0, 0, 1, 2])
    return scores


@torch.no_grad()
def test_pooled_variance_explained_is_that_of_all_tokens_together() -> None:
    dictionary, x = small_dictionary(), activations()
    results = summarise(scored(dictionary, x))
    f, total = dictionary.encode(x), (x - x.mean(0)).square().sum()
    expected = {
        "frac_variance_explained_pooled": dictionary.decode(f),
        "frac_variance_explained_pooled_high": dictionary.decode_groups(f, [0]) + dictionary.b_dec,
        "frac_variance_explained_pooled_low": dictionary.decode_groups(f, [1]) + dictionary.b_dec,
    }
    for name, x_hat in expected.items():
        assert results[name] == pytest.approx(float(1 - (x - x_hat).square().sum() / total), abs=1e-5)
        assert 0 < results["half_width_95"][name] < 5


def test_counts_and_alive_latents_are_those_of_the_tokens() -> None:
    dictionary, x = small_dictionary(group_fractions=(0.25, 0.25, 0.5)), activations()
    results = summarise(scored(dictionary, x))
    fired = (dictionary.encode(x) > 0).any(0)

    assert (results["contexts"], results["documents"], results["tokens"]) == (4, 3, 80)
    assert results["frac_alive"] == pytest.approx(fired.double().mean().item())
    assert results["frac_alive_group"] == pytest.approx(
        [fired[part].double().mean().item() for part in dictionary.group_slices]
    )
    assert sum(map(sum, results["firing_rates"]["latents_group"])) == fired.sum()
    assert results["l0"] == pytest.approx(sum(results["l0_group"]))
    assert len(results["lipschitz_cont_group"]) == 3


def test_context_with_a_silent_split_is_left_out_of_its_mean_only() -> None:
    dictionary = small_dictionary()
    dictionary.b_enc.data[: dictionary.group_sizes[0]] = -100.0
    results = summarise(scored(dictionary, activations()))
    assert results["fft_h"] is None
    assert results["fft_tot"] == results["fft_l"]
    assert results["smoothness_tv_h"] == 0
    assert results["frac_alive_high"] == 0
    json.dumps(results, allow_nan=False)


def free_rows(kind: str) -> Dictionary:
    """A dictionary whose decoder rows have any norm."""
    dictionary = new_dictionary(SaeConfig(kind=kind, dict_size=40, k=4), 12, seed=0)  # type: ignore[arg-type]
    dictionary.W_dec.data *= torch.linspace(0.2, 3, 40)[:, None]
    dictionary.b_enc.data = torch.linspace(-1, 0.5, 40)
    return dictionary


def with_other_scales(dictionary: Dictionary, factors: torch.Tensor) -> Dictionary:
    """The same function, whose latents' activations are `factors` times as large."""
    made = copy.deepcopy(dictionary)
    made.W_dec.data = dictionary.W_dec / factors[:, None]
    if isinstance(made, GatedAutoEncoder):
        made.r_mag.data += factors.log()
        made.mag_bias.data *= factors
        return made
    made.W_enc.data = dictionary.W_enc * factors
    made.b_enc.data *= factors
    if hasattr(made, "threshold"):
        made.threshold.data *= factors if made.threshold.ndim else factors[0]
    return made


@torch.no_grad()
@pytest.mark.parametrize("kind", ["standard_april", "jump_relu", "gated", "batch_topk"])
def test_measures_do_not_depend_on_how_encoder_and_decoder_share_a_scale(kind: str) -> None:
    dictionary, x = free_rows(kind), activations()
    factors = torch.full((40,), 10.0) if kind == "batch_topk" else torch.logspace(-3, 3, 40)
    if kind == "batch_topk":
        dictionary.threshold.fill_(0.5)
    other = with_other_scales(dictionary, factors)
    torch.testing.assert_close(other(x), dictionary(x), rtol=1e-4, atol=1e-4)
    own, rescaled = (summarise(scored(each, x)) for each in (dictionary, other))
    assert own["l1_loss"] > 0
    theirs = own.pop("reference"), rescaled.pop("reference")
    for name, value in own.items():
        if isinstance(value, float):
            assert rescaled[name] == pytest.approx(value, rel=2e-4), name
    assert own["left_out"] == rescaled["left_out"]
    assert own["firing_rates"] == rescaled["firing_rates"]
    # The reference's evaluate() takes activations by their rows' norms for one class alone.
    for name in ("l1_loss", "lipschitz_cont_tot", "smoothness_tv_h"):
        same = theirs[1][name] == pytest.approx(theirs[0][name], rel=1e-3)
        assert same == (kind == "standard_april"), name


@torch.no_grad()
@pytest.mark.parametrize("kind", ["standard_april", "jump_relu", "gated"])
def test_the_reference_block_takes_the_activations_that_each_class_hands_out(kind: str) -> None:
    dictionary, x = free_rows(kind), activations()
    f = dictionary.encode(x)
    if kind == "standard_april":
        f = f * dictionary.W_dec.norm(dim=1)
    contexts, places = list(zip(f.split(LENGTHS), x.split(LENGTHS), strict=True)), [slice(0, None)]
    expected = [in_reference(latents_of(active_code(code), there), places) for code, there in contexts]
    found = summarise(scored(dictionary, x))["reference"]
    assert found["l1_loss"] == pytest.approx(np.mean([code.sum(1).mean() for code, _ in contexts]), rel=1e-5)
    for name, measure in (("lipschitz_cont", "lipschitz"), ("wavelet", "wavelet"), ("multiscale", "multiscale")):
        values = [float(getattr(one, measure)[0]) for one in expected]
        value = None if np.isnan(values).any() else pytest.approx(np.mean(values), rel=1e-5)
        assert found[f"{name}_tot"] == value, name


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_context_of_zeros_is_left_out_and_counted_and_voids_no_mean() -> None:
    dictionary, x = small_dictionary(), activations()
    dictionary.b_dec.data.zero_()
    whole = summarise(scored(dictionary, x))
    x[: LENGTHS[0]] = 0
    results = summarise(scored(dictionary, x))
    for name in ("l2_ratio", "relative_reconstruction_bias", "cossim", "frac_variance_explained", "lipschitz_cont_tot"):
        assert isinstance(results[name], float), name
        assert isinstance(results["half_width_95"][name], float), name
        assert results["left_out"][name] == 1
        assert name not in whole["left_out"]
        assert results["reference"][name] is None  # as the reference's mean is
    assert "l2_loss" not in results["left_out"]
    json.dumps(results, allow_nan=False)
    x[0], dictionary.b_dec.data[0] = 0, 1.0  # what is decoded there is not zero
    assert summarise(scored(dictionary, x))["left_out"]["l2_ratio"] == 1


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(TsaeError, match="no held-out context"):
        summarise(Scores(small_dictionary()))


def test_contexts_are_runs_of_valid_positions_of_one_document() -> None:
    document = np.array([-1, 4, 4, 4, -1, 5, 5, 6, -1, 7, 7, 7])
    valid = document >= 0
    valid[:2] = False
    assert runs(document, valid) == [(slice(2, 4), 4), (slice(5, 7), 5), (slice(9, 12), 7)]
    assert runs(document, np.zeros(12, bool)) == []
    assert runs(np.zeros(5, int), np.ones(5, bool)) == [(slice(0, 5), 0)]


@pytest.mark.parametrize(("count", "quantile"), [(2, 12.7062), (15, 2.14479), (50, 2.00958)])
def test_interval_is_students_where_each_context_is_its_own_document(count: int, quantile: float) -> None:
    values = np.random.default_rng(0).normal(3, 2, count)
    mean, half_width = mean_interval(values, np.arange(count))
    assert mean == pytest.approx(values.mean())
    assert half_width == pytest.approx(quantile * values.std(ddof=1) / np.sqrt(count), rel=1e-4)


def test_repeating_a_documents_contexts_does_not_narrow_the_interval() -> None:
    values, documents = np.random.default_rng(0).normal(3, 2, 50), np.arange(50)
    once = mean_interval(values, documents)
    assert mean_interval(np.tile(values, 4), np.tile(documents, 4)) == pytest.approx(once)


def test_interval_covers_the_true_ratio_in_95_of_100_cases() -> None:
    generator, covered = np.random.default_rng(0), 0
    documents = np.repeat(np.arange(60), 3)
    for _ in range(400):
        weight = generator.uniform(1, 3, 180)
        level = 0.7 + 0.2 * np.repeat(generator.normal(size=60), 3)
        ratio, half_width = ratio_interval(weight * (level + 0.1 * generator.normal(size=180)), weight, documents)
        covered += abs(ratio - 0.7) < half_width
    assert 0.91 < covered / 400 < 0.98


@pytest.mark.parametrize("undefined", [np.nan, np.inf, -np.inf])
def test_undefined_contexts_are_ignored_and_nothing_defined_is_undefined(undefined: float) -> None:
    assert mean_interval(np.array([1.0, undefined, 3.0]), np.arange(3)) == mean_interval(
        np.array([1.0, 3.0]), np.arange(2)
    )
    assert np.isnan(mean_interval(np.array([np.nan, np.nan]), np.arange(2))).all()
