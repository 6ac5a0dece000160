"""Encoder products in bfloat16; what screens by them is tested in `screen_cases.py` and `test_cpu_screening.py`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tsae.sae.selection.screens import round_rows
from tsae.sae.selection.top_k import Encoder, Selection, batch_top_k_codes, top_k_codes

Select = Callable[..., list[Selection]]


@pytest.mark.parametrize("select_codes", [batch_top_k_codes, top_k_codes])
def test_bf16_keeps_the_values_of_the_rounded_product(select_codes: Select) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((50, 64), (64, 300), (300,)))
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
