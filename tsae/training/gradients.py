"""The gradients of the sparse engine: four buffers, filled with sums over the entries of codes.

Shapes: B rows, D activation_dim, F dict_size, n entries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tsae.phases import phase
from tsae.sae.dictionary import ThresholdDictionary
from tsae.sae.sparse import ByLatent, SparseCode, add_rows
from tsae.training.update import chunk_rows


class Entries(NamedTuple):
    """Entries that carry a gradient into the encoder; rows index the centred inputs."""

    rows: Tensor
    latents: Tensor
    gradient: Tensor


class Revived(NamedTuple):
    """What aux-k asks of the encoder."""

    latents: Tensor
    """The dead ones [n]."""
    gradient: Tensor
    """Of their pre-activations [B, n]."""


class Gradients:
    """The four gradient buffers, both matrices latent by latent [F, D]; made once, then overwritten."""

    def __init__(self, dictionary: ThresholdDictionary, deterministic: bool) -> None:
        # Atomic additions pay only on CUDA.
        self._in_order = deterministic or not dictionary.W_dec.is_cuda
        self.W_enc, self.b_enc = _buffer(dictionary.W_enc).T, _buffer(dictionary.b_enc)
        self.W_dec, self.b_dec = _buffer(dictionary.W_dec), _buffer(dictionary.b_dec)
        self._dictionary = dictionary
        self._chunk = chunk_rows(self.W_dec)

    @phase("weight gradients")
    def decoder(self, part: SparseCode, back: Tensor, group: slice) -> None:
        """Rows of W_dec's gradient for one group: Σ value · back[row], with `back` [B, D] the output's gradient."""
        self._sum(part.rows, part.latents, part.values, back, self.W_dec[group])

    @phase("weight gradients")
    def encoder(self, entries: list[Entries], centred: Tensor) -> None:
        """W_enc's and b_enc's gradients from all entries."""
        rows, latents, gradient = (torch.cat(parts) for parts in zip(*entries, strict=True))
        self._sum(rows, latents, gradient, centred, self.W_enc, self.b_enc)

    @phase("aux-k")
    def add_encoder(self, revived: Revived, centred: Tensor) -> None:
        """Adds to W_enc's and b_enc's gradients what aux-k asks of dead latents."""
        self.W_enc.index_add_(0, revived.latents, revived.gradient.T @ centred)
        self.b_enc.index_add_(0, revived.latents, revived.gradient.sum(dim=0))

    def _sum(
        self, rows: Tensor, latents: Tensor, values: Tensor, x: Tensor, out: Tensor, totals: Tensor | None = None
    ) -> None:
        """Sums over each latent's entries: value · x[row] into `out` [F, D], the values into `totals` [F]."""
        if self._in_order:
            by_latent = ByLatent.of(rows, latents, len(out))
            by_latent.sum_rows(values, x, out, self._chunk)
            if totals is not None:
                by_latent.sum_values(values, totals)
            return
        add_rows(rows, latents, values, x, out)
        if totals is not None:
            totals.zero_().index_add_(0, latents, values)

    @phase("weight gradients")
    def finish(self) -> None:
        """b_dec's part through the encoder, −W_enc · ∂b_enc: both halves are centred by it before they are encoded."""
        self.b_dec.addmv_(self._dictionary.W_enc, self.b_enc, alpha=-1)


def _buffer(parameter: Tensor) -> Tensor:
    """The gradient of `parameter`, made (not filled) where there is none; it keeps the [F, D] memory order of W_enc."""
    if parameter.grad is None:
        parameter.grad = torch.empty_like(parameter)
    return parameter.grad
