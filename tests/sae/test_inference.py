"""Sparse codes at inference equal the dense ones."""

from __future__ import annotations

import pytest
import torch

from tsae.config.sections import SaeConfig
from tsae.runtime.errors import TsaeError
from tsae.sae.inference import decode_latents, encode_sparse, reconstruct
from tsae.sae.init import new_dictionary


@pytest.mark.parametrize("kind", ["temporal", "batch_topk", "topk"])
def test_sparse_codes_equal_dense_ones(kind: str) -> None:
    dictionary = new_dictionary(SaeConfig(kind=kind, dict_size=150, k=5), 16, seed=0)
    dictionary.b_dec.data = torch.randn(16)
    dictionary.threshold.fill_(0.7)
    x = torch.randn(30, 16)
    f = dictionary.encode(x)
    code = encode_sparse(dictionary, x)
    assert 0 < len(code.values) < f.numel()
    torch.testing.assert_close(code.dense(), f)
    torch.testing.assert_close(reconstruct(dictionary, x), dictionary.decode(f))
    for group, latents in enumerate(dictionary.group_slices):
        torch.testing.assert_close(decode_latents(dictionary, code, latents), dictionary.decode_groups(f, [group]))


def test_silent_tokens_have_empty_rows() -> None:
    dictionary = new_dictionary(SaeConfig(dict_size=64, k=2), 8, seed=0)
    dictionary.threshold.fill_(100.0)
    code = encode_sparse(dictionary, torch.randn(5, 8))
    assert code.offsets.tolist() == [0] * 6
    assert torch.equal(reconstruct(dictionary, torch.randn(5, 8)), torch.zeros(5, 8))


def test_an_uncalibrated_threshold_is_refused() -> None:
    with pytest.raises(TsaeError, match="never calibrated"):
        encode_sparse(new_dictionary(SaeConfig(dict_size=64, k=2), 8, seed=0), torch.randn(5, 8))
