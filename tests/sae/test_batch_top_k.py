"""Batch-top-k: the dense definition, and the selection that never sorts or keeps N·F numbers."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsae.sae.dictionary import batch_top_k
from tsae.sae.selection.top_k import Encoder, batch_top_k_codes

shapes = st.tuples(st.integers(1, 40), st.integers(1, 150), st.integers(1, 6), st.integers(0, 2**16))


@given(shapes, st.booleans())
@settings(max_examples=30, deadline=None)
def test_exactly_kn_entries_survive_unless_fewer_are_positive(shape: tuple[int, int, int, int], ties: bool) -> None:
    rows, width, k, seed = shape
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    activations = torch.relu(x.mul(2).round() if ties else x)
    kept = batch_top_k(activations, k)
    wanted = min(k * rows, activations.numel(), int((activations > 0).sum()))
    assert int((kept > 0).sum()) == wanted
    assert torch.all((kept == 0) | (kept == activations))
    if wanted and wanted < int((activations > 0).sum()):
        assert kept[kept > 0].min() >= activations[(activations > 0) & (kept == 0)].max()


def test_any_leading_shape_counts_its_rows() -> None:
    activations = torch.rand(3, 5, 7, 64)
    kept = batch_top_k(activations, 4)
    assert kept.shape == activations.shape
    assert torch.equal(kept.reshape(-1, 64), batch_top_k(activations.reshape(-1, 64), 4))
    assert int((kept > 0).sum()) == 4 * 3 * 5 * 7


def test_rows_may_be_permuted() -> None:
    activations = torch.rand(20, 30)
    order = torch.randperm(20)
    assert torch.equal(batch_top_k(activations, 3)[order], batch_top_k(activations[order], 3))


@given(shapes, st.sampled_from(["random", "ties", "negative"]), st.sampled_from([None, 0.0, 0.5, 5.0]))
@settings(max_examples=50, deadline=None)
def test_selection_equals_the_dense_definition_whatever_the_guess(
    shape: tuple[int, int, int, int], kind: str, guess: float | None
) -> None:
    rows, width, k, seed = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(width, 8, generator=generator, dtype=torch.float64).T
    bias = torch.randn(width, generator=generator, dtype=torch.float64)
    if kind == "ties":
        x, weight, bias = x.round(), weight.round(), bias.round()
    elif kind == "negative":
        bias -= 8
    (selection,) = batch_top_k_codes(Encoder(), [x], weight, bias, k, [guess])
    # The same product in the same blocks: a differently shaped one may differ in the last bit.
    activations = torch.relu(Encoder().block(x, weight, bias)[:, :width])
    dense = batch_top_k(activations, k)
    found = selection.code.dense()
    assert torch.all((found == 0) | (found == activations))
    # Ties at the cut may go to other entries; the multiset of kept values is the same.
    assert torch.equal(found[found > 0].sort().values, dense[dense > 0].sort().values)
    if kind == "random":
        assert torch.equal(found, dense)


def test_choice_among_ties_does_not_depend_on_the_guess() -> None:
    x, weight, bias = torch.ones(6, 2), torch.ones(2, 70), torch.zeros(70)
    codes = [batch_top_k_codes(Encoder(), [x], weight, bias, 3, [guess])[0].code for guess in (None, 0.0, 1.0, 1.99)]
    assert all(torch.equal(code.dense(), codes[0].dense()) for code in codes)
    assert len(codes[0].values) == 18
