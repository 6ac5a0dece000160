"""The screen's kernels: nothing above the guess is missed, no rounded value is kept; `test_kernels.py` runs this file."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.interpreter import quicken
from tests.sae.screen_inputs import KINDS, encoder_inputs
from tsae.sae import kernels
from tsae.sae.dictionary import top_k
from tsae.sae.kernels import Candidates, screen
from tsae.sae.selection import screens
from tsae.sae.selection.screens import Screen
from tsae.sae.selection.top_k import Encoder, Selection, batch_top_k_codes, top_k_codes

quicken()
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
Select = Callable[..., list[Selection]]


@pytest.fixture(autouse=True)
def several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screens, "CUDA_BLOCK_ROWS", 7)
    monkeypatch.setattr(screens, "CUDA_BLOCK_BYTES", 0)
    if DEVICE == "cpu":  # tensor cores have tiles of 16 at least
        monkeypatch.setattr(screen, "TILE", {"BLOCK_N": 4, "BLOCK_F": 64, "BLOCK_D": 32})
        monkeypatch.setattr(screen, "BAND", 2)
        screen._tile.cache_clear()


shapes = st.tuples(st.integers(1, 10), st.integers(1, 90), st.integers(1, 70), st.integers(0, 2**16))


def on_device(shape: tuple[int, int, int, int], kind: str) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = encoder_inputs(shape, kind)
    return x.to(DEVICE), weight.to(DEVICE), bias.to(DEVICE)


@given(shapes, st.sampled_from(KINDS), st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_no_entry_above_the_guess_is_missed(shape: tuple[int, int, int, int], kind: str, quantile: float) -> None:
    x, weight, bias = on_device(shape, kind)
    true = x.double() @ weight.double() + bias.double()
    guess = max(0.0, float(true.flatten().quantile(quantile)))
    # Float32 itself cannot tell values closer than this.
    unsure = 1e-6 * (x.double().norm(dim=1, keepdim=True) * weight.double().norm(dim=0) + bias.abs() + guess)

    rows, latents, values = Screen(weight, bias).entries_above(x, guess, Candidates())
    found = torch.zeros_like(true, dtype=torch.bool)
    found[rows, latents] = True
    assert found[true > guess + unsure].all()
    assert not found[true < guess - unsure].any()
    assert ((values - true[rows, latents]).abs() <= unsure[rows, latents]).all()
    assert torch.equal(rows * len(bias) + latents, found.flatten().nonzero()[:, 0])


def rounded_to_nearest(matrix: Tensor, factor: float = 1.0, of_norm: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    low = matrix.bfloat16()
    norms = torch.maximum(matrix.norm(dim=1), low.float().norm(dim=1))
    return low, norms * factor, ((matrix - low.float()).norm(dim=1) + of_norm * norms) * factor


def test_few_candidates_are_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screens, "CUDA_BLOCK_ROWS", 64)
    if DEVICE == "cpu":
        monkeypatch.setattr(screen, "TILE", {"BLOCK_N": 64, "BLOCK_F": 512, "BLOCK_D": 64})
        screen._tile.cache_clear()
        # The interpreter rounds towards zero, which errs twice as much.
        monkeypatch.setattr(kernels, "round_rows", rounded_to_nearest)
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 256, generator=generator), torch.randn(2048, 256, generator=generator).T
    bias = torch.zeros(2048)
    cut = float((x @ weight).flatten().topk(20 * 64).values.min())
    built = Screen(weight, bias)
    rows, _ = built.candidates(x, cut, None, Candidates())
    assert 20 * 64 <= len(rows) <= 1.25 * 20 * 64
    rows, _ = built.candidates(x, 0.0, 20, Candidates())
    assert 20 * 64 <= len(rows) <= 2.5 * 20 * 64


@given(
    shapes, st.integers(1, 5), st.sampled_from([None, 0.0, 1.0, 1e4]), st.sampled_from([batch_top_k_codes, top_k_codes])
)
@settings(max_examples=60, deadline=None)
def test_screened_selection_is_that_of_float32(
    shape: tuple[int, int, int, int], k: int, guess: float | None, select_codes: Select
) -> None:
    x, weight, bias = on_device(shape, "random")
    (screened,) = select_codes(Encoder("exact"), [x], weight, bias, k, [guess])
    (plain,) = select_codes(Encoder("float32"), [x], weight, bias, k, [guess])
    torch.testing.assert_close(screened.code.dense(), plain.code.dense(), rtol=1e-5, atol=1e-5)
    assert screened.cut == pytest.approx(plain.cut, rel=1e-5, abs=1e-5)


@given(shapes, st.integers(1, 5), st.sampled_from(["worst", "ties"]))
@settings(max_examples=40, deadline=None)
def test_screened_top_k_keeps_the_largest_values_of_each_row(
    shape: tuple[int, int, int, int], k: int, kind: str
) -> None:
    x, weight, bias = on_device(shape, kind)
    bias += 0.5 * shape[2]
    rows, latents, values = Screen(weight, bias).largest_of_rows(x, k, Candidates())
    found = torch.zeros(len(x), len(bias))
    found[rows, latents] = values
    expected = top_k(torch.relu(x @ weight + bias), k)
    torch.testing.assert_close(found.sort(dim=1).values, expected.sort(dim=1).values, rtol=1e-5, atol=1e-4)
