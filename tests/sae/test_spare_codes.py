"""Codes with empty entries say the same as those without."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tsae.sae.sparse import SparseCode, from_dense

ROWS, WIDTH = 5, 9


def dense(seed: int) -> Tensor:
    f = torch.relu(torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed)))
    f[1] = 0
    return f


def with_spare(f: Tensor, spare: int) -> SparseCode:
    """As a selection makes it: what is empty comes last."""
    code = from_dense(f)
    latents = torch.cat([code.latents, torch.full((spare,), -1)])
    rows = torch.cat([code.rows, torch.full((spare,), ROWS - 1)])
    return SparseCode(code.offsets, latents, torch.cat([code.values, torch.zeros(spare)]), WIDTH, True, rows)


@pytest.mark.parametrize("spare", [0, 4])
def test_parts_and_blocks_of_a_code_with_empty_entries(spare: int) -> None:
    f, full = dense(0), with_spare(dense(0), spare)
    assert torch.equal(full.dense(), f)
    assert torch.equal(full.dense_by_latent(), f.T)
    assert torch.equal(full.fired(), (f > 0).any(dim=0))
    assert torch.equal(from_dense(f).smallest(), torch.where(f > 0, f, torch.inf).amin(dim=1))
    for latents in (slice(0, 4), slice(4, WIDTH)):
        part = full.within(latents)
        assert torch.equal(part.code.dense(), f[:, latents])
        back = torch.zeros_like(full.values)
        part.add(part.code.values, back)
        assert torch.equal(full.with_values(back).dense()[:, latents], f[:, latents])
        assert back.count_nonzero() == (f[:, latents] > 0).sum()
    assert torch.equal(from_dense(f).block(1, 4).code.dense(), f[1:4])
    rows, columns = torch.tensor([0, 1, 4, 2]), torch.tensor([3, 8, 0, -1])
    assert torch.equal(full.at(rows, columns), f[rows, columns].where(columns >= 0, 0))
