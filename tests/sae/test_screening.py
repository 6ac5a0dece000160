"""The encoder product in bfloat16, refined in float32: nothing above the guess is missed, no rounded value is kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tsae.sae.dictionary import top_k
from tsae.sae.selection import screens
from tsae.sae.selection import top_k as select
from tsae.sae.selection.screens import Screen, round_rows
from tsae.sae.selection.top_k import Encoder, Selection, batch_top_k_codes, top_k_codes

Select = Callable[..., list[Selection]]


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screens, "CUDA_BLOCK_ROWS", 7)
    monkeypatch.setattr(screens, "CUDA_BLOCK_BYTES", 0)


shapes = st.tuples(st.integers(1, 30), st.integers(1, 90), st.integers(1, 70), st.integers(0, 2**16))


def encoder_inputs(shape: tuple[int, int, int, int], kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, D], weight [D, F] in the memory order [F, D], bias [F]."""
    rows, width, dim, seed = shape
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(rows, dim, generator=generator), torch.randn(width, dim, generator=generator)
    bias = torch.randn(width, generator=generator)
    if kind == "worst":
        # Just below the middle of two bfloat16 numbers, all of one sign: every rounding errs most, and the same way.
        x, weight = (torch.full_like(tensor, 1 + 2.0**-8 - 2.0**-20) for tensor in (x, weight))
        bias = -0.999 * dim * (1 + torch.rand(width, generator=generator) * 0.01)
    elif kind == "scaled":
        x *= 10 ** torch.empty(rows, 1).uniform_(-4, 4, generator=generator)
        weight *= 10 ** torch.empty(width, 1).uniform_(-4, 4, generator=generator)
    elif kind == "ties":
        x, weight, bias = x.round(), weight.round(), bias.round()
    return x, weight.T, bias


@given(shapes, st.sampled_from(["random", "worst", "scaled", "ties"]), st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_no_entry_above_the_guess_is_missed(shape: tuple[int, int, int, int], kind: str, quantile: float) -> None:
    x, weight, bias = encoder_inputs(shape, kind)
    true = x.double() @ weight.double() + bias.double()
    guess = max(0.0, float(true.flatten().quantile(quantile)))
    # Float32 itself cannot tell values closer than this.
    unsure = 1e-6 * (x.double().norm(dim=1, keepdim=True) * weight.double().norm(dim=0) + bias.abs() + guess)

    rows, latents, values = Screen(weight, bias).entries_above(x, guess, listing=None)
    found = torch.zeros_like(true, dtype=torch.bool)
    found[rows, latents] = True
    assert found[true > guess + unsure].all()
    assert not found[true < guess - unsure].any()
    assert ((values - true[rows, latents]).abs() <= unsure[rows, latents]).all()
    assert torch.equal(rows * len(bias) + latents, found.flatten().nonzero()[:, 0])


def test_few_candidates_are_computed_twice() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 256, generator=generator), torch.randn(2048, 256, generator=generator).T
    bias = torch.zeros(2048)
    cut = float((x @ weight).flatten().topk(20 * 64).values.min())
    screen = Screen(weight, bias)
    rows, _ = screen.candidates(x, cut, None, listing=None)
    assert 20 * 64 <= len(rows) <= 1.25 * 20 * 64
    rows, _ = screen.candidates(x, 0.0, 20, listing=None)
    assert 20 * 64 <= len(rows) <= 2.5 * 20 * 64


@given(
    shapes, st.integers(1, 5), st.sampled_from([None, 0.0, 1.0, 1e4]), st.sampled_from([batch_top_k_codes, top_k_codes])
)
@settings(max_examples=60, deadline=None)
def test_screened_selection_is_that_of_float32(
    shape: tuple[int, int, int, int], k: int, guess: float | None, select_codes: Select
) -> None:
    x, weight, bias = encoder_inputs(shape, "random")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "screens", lambda _: True)
        (screened,) = select_codes(Encoder("exact"), [x], weight, bias, k, [guess])
    (plain,) = select_codes(Encoder("float32"), [x], weight, bias, k, [guess])
    torch.testing.assert_close(screened.code.dense(), plain.code.dense(), rtol=1e-5, atol=1e-5)
    assert screened.cut == pytest.approx(plain.cut, rel=1e-5, abs=1e-5)


@given(shapes, st.integers(1, 5), st.sampled_from(["worst", "ties"]))
@settings(max_examples=40, deadline=None)
def test_screened_top_k_keeps_the_largest_values_of_each_row(
    shape: tuple[int, int, int, int], k: int, kind: str
) -> None:
    x, weight, bias = encoder_inputs(shape, kind)
    bias += 0.5 * shape[2]
    rows, latents, values = Screen(weight, bias).largest_of_rows(x, k, listing=None)
    found = torch.zeros(len(x), len(bias))
    found[rows, latents] = values
    expected = top_k(torch.relu(x @ weight + bias), k)
    torch.testing.assert_close(found.sort(dim=1).values, expected.sort(dim=1).values, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("select_codes", [batch_top_k_codes, top_k_codes])
def test_bf16_keeps_the_values_of_the_rounded_product(select_codes: Select) -> None:
    x, weight, bias = encoder_inputs((50, 300, 64, 0), "random")
    codes = {
        precision: select_codes(Encoder(precision), [x], weight, bias, 10, [None])[0].code
        for precision in ("bf16", "float32")
    }
    low = codes["bf16"]
    rounded = torch.mm(x.bfloat16(), weight.bfloat16()).float() + bias
    assert torch.equal(low.values, rounded[low.rows, low.latents])
    shared = ((low.dense() > 0) & (codes["float32"].dense() > 0)).sum()
    assert 0.9 * len(low.values) < int(shared) <= len(low.values) == 500


def test_rounding_is_measured() -> None:
    matrix = torch.randn(9, 33, generator=torch.Generator().manual_seed(0))
    rounded = round_rows(matrix)
    assert torch.equal(rounded.rows, matrix.bfloat16())
    torch.testing.assert_close(rounded.errors, (matrix - matrix.bfloat16().float()).norm(dim=1))
    assert (rounded.norms >= matrix.norm(dim=1)).all()
