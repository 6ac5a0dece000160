"""Codes at inference without a dense [N, F] tensor: what evaluation and experiments read."""

from __future__ import annotations

import torch
from torch import Tensor

from tsae.sae.dictionary import Dictionary, ThresholdDictionary
from tsae.sae.selection.top_k import Encoder, entries_above, top_k_codes
from tsae.sae.sparse import SparseCode, from_dense, from_entries, weighted_rows


@torch.no_grad()
def encode_sparse(dictionary: Dictionary, x: Tensor, encoder: Encoder | None = None) -> SparseCode:
    """The code of activations x [N, D], by the class's own rule; equal to `dictionary.encode`.

    `encoder` keeps its scratch buffer between calls. Raises TsaeError if a threshold is needed and uncalibrated.
    """
    if not isinstance(dictionary, ThresholdDictionary):
        return from_dense(dictionary.encode(x))
    dictionary.require_calibrated(type(dictionary).__name__)
    encoder, centred = encoder or Encoder(), x - dictionary.b_dec if dictionary.centre_input else x
    weight, bias = dictionary.W_enc, dictionary.b_enc
    if dictionary.encode_rule == "top_k":
        return top_k_codes(encoder, [centred], weight, bias, int(dictionary.k), [None])[0].code
    rows, latents, values = entries_above(encoder, centred, weight, bias, float(dictionary.threshold))
    return from_entries(rows, latents, values, len(x), dictionary.dict_size)


def in_units_written(code: SparseCode, row_norms: Tensor) -> SparseCode:
    """The code in units that may be compared between latents and dictionaries: see `Dictionary.row_norms` [F]."""
    return code._replace(values=code.values * row_norms[code.latents])


@torch.no_grad()
def decode_latents(dictionary: Dictionary, code: SparseCode, latents: slice) -> Tensor:
    """What a run of latents alone writes, [N, D]; without the bias."""
    return weighted_rows(code.within(latents).code, dictionary.W_dec[latents])


@torch.no_grad()
def reconstruct(dictionary: Dictionary, x: Tensor) -> Tensor:
    """The reconstruction [N, D] of activations x [N, D]."""
    return weighted_rows(encode_sparse(dictionary, x), dictionary.W_dec) + dictionary.b_dec
