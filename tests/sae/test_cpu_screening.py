"""The bfloat16 screen on a CPU: the same entries as the float32 product, whatever the numbers look like."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sae.screen_inputs import KINDS, encoder_inputs
from tsae.sae.selection import screens as cpu_screening
from tsae.sae.selection import top_k as select
from tsae.sae.selection.screens import CpuScreen, Memory, screens_on_cpu
from tsae.sae.selection.top_k import Encoder, batch_top_k_codes, top_k_codes

shapes = st.tuples(st.integers(1, 40), st.integers(1, 200), st.integers(1, 70), st.integers(0, 2**16))


@given(shapes, st.sampled_from(KINDS), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_no_entry_above_the_guess_is_missed(shape: tuple[int, int, int, int], kind: str, quantile: float) -> None:
    x, weight, bias = encoder_inputs(shape, kind)
    true = x.double() @ weight.double() + bias.double()
    guess = max(0.0, float(true.flatten().quantile(quantile)))
    # Float32 itself cannot tell values closer than this.
    unsure = 1e-6 * (x.double().norm(dim=1, keepdim=True) * weight.double().norm(dim=0) + bias.abs() + guess)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_screening, "BLOCK_BYTES", 7 * 2 * 256)
        patch.setattr(cpu_screening, "BLOCK_ROWS", 1)
        rows, latents, values = CpuScreen(weight, bias, Memory()).entries_above(x, guess)
    found = torch.zeros_like(true, dtype=torch.bool)
    found[rows, latents] = True
    assert found[true > guess + unsure].all()
    assert not found[true < guess - unsure].any()
    assert ((values - true[rows, latents]).abs() <= unsure[rows, latents]).all()
    assert torch.equal(rows * len(bias) + latents, found.flatten().nonzero()[:, 0])


@given(shapes, st.integers(1, 5), st.sampled_from([None, 0.0, 1.0, 1e4]))
@settings(max_examples=40, deadline=None)
def test_screened_selection_is_that_of_float32(shape: tuple[int, int, int, int], k: int, guess: float | None) -> None:
    x, weight, bias = encoder_inputs(shape, "random")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "screens_on_cpu", lambda *_: True)
        (screened,) = batch_top_k_codes(Encoder("exact"), [x], weight, bias, k, [guess])
    (plain,) = batch_top_k_codes(Encoder("float32"), [x], weight, bias, k, [guess])
    torch.testing.assert_close(screened.code.dense(), plain.code.dense(), rtol=1e-5, atol=1e-5)
    assert screened.cut == pytest.approx(plain.cut, rel=1e-5, abs=1e-5)


@given(shapes, st.sampled_from(KINDS), st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_the_largest_of_every_row_are_those_of_float32(shape: tuple[int, int, int, int], kind: str, k: int) -> None:
    x, weight, bias = encoder_inputs(shape, kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_screening, "BLOCK_BYTES", 7 * 2 * 256)
        patch.setattr(cpu_screening, "BLOCK_ROWS", 1)
        patch.setattr(select, "screens_on_cpu", lambda *_: True)
        (screened,) = top_k_codes(Encoder("exact"), [x], weight, bias, k, [None])
    (plain,) = top_k_codes(Encoder("float32"), [x], weight, bias, k, [None])
    unsure = 1e-5 * (x.norm(dim=1, keepdim=True) * weight.norm(dim=0).max() + bias.abs().max())
    # Float32 numbers that differ by rounding may change places; what was chosen is as large either way.
    largest, expected = (code.code.dense().sort(dim=1, descending=True).values for code in (screened, plain))
    assert ((largest - expected).abs() <= unsure).all()


def test_a_value_does_not_depend_on_the_guess_that_let_it_through() -> None:
    x, weight, bias = encoder_inputs((40, 200, 70, 0), "random")
    few, many = (CpuScreen(weight, bias, Memory()).entries_above(x, guess) for guess in (8.0, 1.0))
    kept = many[2] > 8.0
    assert 0 < len(few[2]) < len(many[2])
    for one, other in zip(few, many, strict=True):
        assert torch.equal(one, other[kept])


def test_few_candidates_are_computed_twice() -> None:
    x, weight, bias = encoder_inputs((64, 2048, 256, 0), "random")
    bias.zero_()
    cut = float((x @ weight).flatten().topk(20 * 64).values.min())
    screen = CpuScreen(weight, bias, Memory())
    for most, (rows, _) in ((1.4, screen.candidates(x, cut)), (2.5, screen.candidates(x, 0.0, k=20))):
        assert 20 * 64 <= len(rows) <= most * 20 * 64


def test_memory_serves_again_and_grows() -> None:
    memory = Memory()
    first = memory.take("a", 4, 5)
    assert memory.take("a", 2, 3).data_ptr() == first.data_ptr()
    assert memory.take("b", 4, 5).data_ptr() != first.data_ptr()
    assert memory.take("a", 6, 5).shape == (6, 5)


def test_only_large_float32_encoders_are_screened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_screening, "has_matrix_units", lambda: True)
    large = torch.empty(512, 4096)
    assert screens_on_cpu(large, 1024)
    assert not screens_on_cpu(large.double(), 1024)
    assert not screens_on_cpu(large, 4)
    assert not screens_on_cpu(large[:4], 1024)
    monkeypatch.setattr(cpu_screening, "has_matrix_units", lambda: False)
    assert not screens_on_cpu(large, 1024)
