"""The chunked update against the plain sequence of whole-matrix operations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tsae.config.sections import SaeConfig
from tsae.sae.dictionary import normalise_rows
from tsae.sae.init import new_dictionary
from tsae.sae.sparse import ByLatent
from tsae.training import update
from tsae.training.update import (
    Adam,
    DenseRows,
    RowSums,
    WholeGradient,
    lay_out_by_latent,
    project_and_measure,
    whole_gradients,
)


def plain_update(dictionary: torch.nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float) -> torch.Tensor:
    weights = dictionary.W_dec.data
    direction = weights / (weights.norm(dim=1, keepdim=True) + 1e-6)
    gradient = dictionary.W_dec.grad
    gradient -= (gradient * direction).sum(dim=1, keepdim=True) * direction
    norm = torch.nn.utils.clip_grad_norm_(dictionary.parameters(), clip_norm)
    optimizer.step()
    normalise_rows(weights)
    return norm


@pytest.mark.parametrize("clip_norm", [1e-3, 1e6])
def test_is_clipping_adam_and_normalising_in_turn(clip_norm: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # Five latents at a time of 37.
    monkeypatch.setattr(update, "CHUNK_BYTES", 5 * 8 * 12)
    plain, chunked = (new_dictionary(SaeConfig(dict_size=37, k=3), 12, seed=0).double() for _ in range(2))
    optimizers = (torch.optim.Adam(plain.parameters(), lr=0.01), Adam(chunked.parameters(), lr=0.01, fused=True))
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for one, other in zip(plain.parameters(), chunked.parameters(), strict=True):
            one.grad = torch.randn(one.shape, dtype=torch.float64, generator=generator)
            other.grad = torch.empty_like(other).copy_(one.grad)
        expected = plain_update(plain, optimizers[0], clip_norm)
        own = whole_gradients(chunked, Tensor.detach)
        norm = project_and_measure(chunked, own, unit_rows=True)
        optimizers[1].update(own, norm, clip_norm, chunked.W_dec)
        assert float(norm) == pytest.approx(float(expected), rel=1e-9)
        for one, other in zip(plain.parameters(), chunked.parameters(), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)


def test_state_is_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update, "CHUNK_BYTES", 100)
    parameter = torch.nn.Parameter(torch.randn(9, 4))
    parameter.grad = torch.randn(9, 4)
    own = Adam([parameter], lr=0.1, fused=True)
    own.update({parameter: WholeGradient(parameter.grad)}, torch.ones(()), 1e6, None)
    theirs = torch.optim.Adam([parameter], lr=0.1, fused=True)
    theirs.load_state_dict(own.state_dict())
    assert float(theirs.state[parameter]["step"]) == 1
    assert set(theirs.state[parameter]) == {"step", "exp_avg", "exp_avg_sq"}


def test_rows_that_should_stay_free_do() -> None:
    dictionary = new_dictionary(SaeConfig(dict_size=20, k=3), 6, seed=0)
    dictionary.W_dec.data *= 3
    for parameter in dictionary.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = dictionary.W_dec.grad.clone()
    own = whole_gradients(dictionary, Tensor.detach)
    norm = project_and_measure(dictionary, own, unit_rows=False)
    Adam(dictionary.parameters(), lr=1e-3, fused=True).update(own, norm, 1.0, None)
    assert torch.equal(dictionary.W_dec.grad, before)
    assert (dictionary.W_dec.norm(dim=1) > 2.5).all()


def test_matrices_from_files_are_laid_out_by_latent() -> None:
    dictionary = new_dictionary(SaeConfig(dict_size=20, k=3), 6, seed=0)
    weights = dictionary.W_enc.detach().clone(), dictionary.W_dec.detach().clone()
    dictionary.W_enc.data = dictionary.W_enc.data.contiguous()
    dictionary.W_dec.data = dictionary.W_dec.data.T.contiguous().T
    lay_out_by_latent(dictionary)
    assert dictionary.W_enc.T.is_contiguous()
    assert dictionary.W_dec.is_contiguous()
    assert torch.equal(dictionary.W_enc, weights[0])
    assert torch.equal(dictionary.W_dec, weights[1])


@pytest.mark.parametrize("unit_rows", [True, False])
@pytest.mark.parametrize("added", [True, False])
def test_sums_made_when_they_are_needed_equal_the_whole_gradient(
    unit_rows: bool, added: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Five latents at a time of 37, of which some have no entries.
    monkeypatch.setattr(update, "CHUNK_BYTES", 5 * 8 * 12)
    generator = torch.Generator().manual_seed(0)
    rows, latents = torch.randint(20, (60,), generator=generator), 3 * torch.randint(12, (60,), generator=generator)
    values = torch.randn(60, dtype=torch.float64, generator=generator)
    x, weights = (torch.randn(n, 12, dtype=torch.float64, generator=generator) for n in (20, 37))
    dense = DenseRows(torch.tensor([0, 1, 9, 33, 36]), torch.randn(5, 12, dtype=torch.float64, generator=generator))
    matrix = torch.zeros(37, 12, dtype=torch.float64).index_add_(0, latents, values[:, None] * x[rows])
    if added:
        matrix[dense.latents] += dense.rows
    whole = WholeGradient(matrix)
    sums = RowSums(ByLatent.of(rows, latents, 37), values, x, dense if added else None)
    norms = [torch.stack(one.measure(weights if unit_rows else None)).norm() for one in (whole, sums)]
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-12, atol=0)
    factor = torch.tensor(0.3, dtype=torch.float64)
    for first in range(0, 37, 5):
        piece = weights[first : first + 5]
        torch.testing.assert_close(
            sums.chunk(first, piece, factor), 0.3 * matrix[first : first + 5], rtol=1e-12, atol=1e-14
        )
    assert (matrix == 0).all(dim=1).any()


def test_no_entries_make_no_gradient() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    sums = RowSums(ByLatent.of(nothing, nothing, 37), torch.zeros(0), torch.randn(20, 12), None)
    weights = torch.randn(37, 12)
    assert sums.measure(weights) == []
    assert torch.equal(sums.chunk(30, weights[30:], torch.ones(())), torch.zeros(7, 12))
