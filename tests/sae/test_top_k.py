"""Top-k of every token: the dense definition, and the selection that searches only the best segments."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsae.sae.dictionary import top_k
from tsae.sae.selection.top_k import Encoder, top_k_codes

shapes = st.tuples(st.integers(1, 40), st.integers(1, 400), st.integers(1, 9), st.integers(0, 2**16))


def test_each_token_keeps_its_k_largest() -> None:
    activations = torch.rand(3, 5, 64)
    kept = top_k(activations, 4)
    assert torch.all((kept > 0).sum(dim=-1) == 4)
    assert torch.all((kept == 0) | (kept == activations))
    assert torch.all(kept.amax(dim=-1) == activations.amax(dim=-1))
    dropped = torch.where(kept > 0, 0, activations).amax(dim=-1)
    assert torch.all(torch.where(kept > 0, kept, 1).amin(dim=-1) >= dropped)


@given(shapes, st.sampled_from(["random", "ties", "negative"]))
@settings(max_examples=60, deadline=None)
def test_selection_equals_the_dense_definition(shape: tuple[int, int, int, int], kind: str) -> None:
    rows, width, k, seed = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(width, 8, generator=generator, dtype=torch.float64).T
    bias = torch.randn(width, generator=generator, dtype=torch.float64)
    if kind == "ties":
        x, weight, bias = x.round(), weight.round(), bias.round()
    elif kind == "negative":
        bias -= 8
    (selection,) = top_k_codes(Encoder(), [x], weight, bias, k, [None])
    activations = torch.relu(x @ weight + bias)
    dense, found = top_k(activations, k), selection.code.dense()
    # Ties may go to other entries; the kept values of each row are the same.
    torch.testing.assert_close(found.sort(dim=1).values, dense.sort(dim=1).values, rtol=1e-12, atol=1e-12)
    if kind == "random":
        torch.testing.assert_close(found, dense, rtol=1e-12, atol=1e-12)
    offsets, latents = selection.code.offsets.tolist(), selection.code.latents
    for first, last in itertools.pairwise(offsets):
        assert torch.all(latents[first:last].diff() > 0)


def test_halves_and_blocks_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Encoder, "block_rows", lambda *_: 7)
    x, weight, bias = torch.randn(2, 30, 8), torch.randn(500, 8).T, torch.randn(500)
    codes = [selection.code.dense() for selection in top_k_codes(Encoder(), list(x), weight, bias, 3, [None, None])]
    torch.testing.assert_close(torch.stack(codes), top_k(torch.relu(x @ weight + bias), 3))
