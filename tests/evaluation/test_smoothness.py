"""Smoothness on codes whose values can be worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from tsae.evaluation.smoothness import active_code, in_reference, latents_of, smoothness, split_ranges


def measure(f: torch.Tensor, x: torch.Tensor | None = None, groups: tuple[int, ...] | None = None) -> dict[str, list]:
    x = torch.arange(len(f), dtype=torch.float32)[:, None] if x is None else x
    measured = smoothness(active_code(f), x, split_ranges(groups or (f.shape[1],)))
    return {name: values.tolist() for name, values in measured._asdict().items()}


def test_ranges_are_all_high_low_and_each_group() -> None:
    assert split_ranges((2, 3, 4)) == [(0, 9), (0, 2), (2, 9), (0, 2), (2, 5), (5, 9)]
    assert split_ranges((5,)) == [(0, 5), (0, 5), (5, 5), (0, 5)]


def test_constant_latent_is_perfectly_smooth() -> None:
    values = measure(torch.full((16, 1), 3.0))
    for name in ("total_variation", "lipschitz", "fft", "wavelet", "relative_variation"):
        assert values[name][0] == pytest.approx(0, abs=1e-9), name


def test_isolated_spike_has_relative_variation_one_at_any_scale() -> None:
    for height in (0.01, 100.0):
        f = torch.zeros(16, 1)
        f[7] = height
        values = measure(f)
        assert values["total_variation"][0] == pytest.approx(2 * height)
        assert values["relative_variation"][0] == pytest.approx(1)


def test_alternating_latent_has_its_power_in_the_upper_half() -> None:
    f = torch.zeros(16, 1)
    f[::2] = 2.0
    # mean 1 and amplitude 1 at the highest frequency: equal power at both ends of the spectrum.
    assert measure(f)["fft"][0] == pytest.approx(1)
    # pairs (2, 0): details and first approximation 1 each; the approximation is constant, so nothing more is lost.
    assert measure(f)["wavelet"][0] == pytest.approx(8 * 1 / (2 * 1))


@pytest.mark.parametrize("height", [1e-6, 1.0, 1e6])
def test_a_ratio_without_a_denominator_is_undefined_and_the_references_number_stays(height: float) -> None:
    dropped = torch.zeros(15, 2)  # 15 → 7 pairs → 3 → 1: the last samples of each level are in no pair
    dropped[13] = height
    faint = dropped.clone()
    faint[2] = 1e-4 * height
    period = torch.zeros(32, 1)
    period[::2] = height
    ramp = height * (1 + torch.arange(32.0)[:, None] / 7)
    cases = {"wavelet": [dropped, faint], "multiscale": [period, ramp, torch.full((32, 1), height)]}
    for name, codes in cases.items():
        for f in codes:
            assert math.isnan(measure(f)[name][0]), name
            code = active_code(f)
            theirs = in_reference(latents_of(code, torch.rand(len(f), 2)), code.slices([(0, f.shape[1])]))
            assert math.isfinite(getattr(theirs, name)[0])
    if height == 1:
        code = active_code(dropped)
        theirs = in_reference(latents_of(code, torch.rand(15, 2)), code.slices([(0, 2)]))
        assert float(theirs.wavelet[0]) > 1e9


def test_ratios_do_not_depend_on_the_scale_of_activations() -> None:
    f = torch.relu(torch.randn(64, 5, generator=torch.Generator().manual_seed(0)))
    for name in ("fft", "wavelet", "multiscale", "relative_variation"):
        assert measure(f * 1e-7)[name][0] == pytest.approx(measure(f)[name][0], rel=1e-4), name


def test_lipschitz_is_the_steepest_step_over_the_distance_of_the_activations() -> None:
    f = torch.tensor([[0.0, 1.0], [4.0, 1.0], [5.0, 1.5]])
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 5.0]])
    assert measure(f, x)["lipschitz"][0] == pytest.approx((1 / 1 + 0.5 / 1) / 2)


def test_positions_where_the_activation_stands_still_do_not_count() -> None:
    f = torch.tensor([[1.0], [1.0], [2.0]])
    x = torch.tensor([[0.0], [0.0], [4.0]])
    assert measure(f, x)["lipschitz"][0] == pytest.approx(0.25)
    assert math.isnan(measure(f, torch.zeros(3, 1))["lipschitz"][0])


def test_context_without_any_active_latent_is_undefined_but_no_error() -> None:
    values = measure(torch.zeros(12, 6), groups=(2, 4))
    assert values.pop("total_variation") == [0, 0, 0, 0, 0]
    assert all(math.isnan(value) for column in values.values() for value in column)


@pytest.mark.parametrize(("length", "defined"), [(2, False), (3, False), (4, True), (5, False), (9, False), (10, True)])
def test_multiscale_needs_two_differences_at_its_largest_scale(length: int, defined: bool) -> None:
    f = torch.rand(length, 3, generator=torch.Generator().manual_seed(length)) + 0.1
    assert math.isfinite(measure(f)["multiscale"][0]) == defined


def test_parts_do_not_depend_on_the_other_latents() -> None:
    generator = torch.Generator().manual_seed(0)
    f = torch.relu(torch.randn(40, 30, generator=generator) - 1)
    x = torch.randn(40, 8, generator=generator)
    together = measure(f, x, groups=(7, 11, 12))
    low, last = measure(f[:, 7:], x), measure(f[:, 18:], x)
    for name, values in together.items():
        assert values[2] == pytest.approx(low[name][0]), name
        assert values[5] == pytest.approx(last[name][0]), name


def test_codes_in_half_precision_are_accumulated_in_full() -> None:
    generator = torch.Generator().manual_seed(0)
    f = torch.relu(torch.randn(128, 60, generator=generator)).bfloat16()
    exact = f.double().diff(dim=0).abs().sum().item()
    assert measure(f)["total_variation"][0] == pytest.approx(exact, rel=1e-6)
