"""The gradients of the sparse engine: sums over the entries of codes.

Shapes: B rows, D activation_dim, F dict_size, n entries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tsae.runtime.phases import phase
from tsae.sae.dictionary import ThresholdDictionary
from tsae.sae.kernels import kernels_for
from tsae.sae.sparse import ByLatent, add_rows
from tsae.training.gradients import DenseRows, Gradient, Gradients, RowSums, WholeGradient, by_latent, chunk_rows
from tsae.training.sharding import Shard
from tsae.training.update import DECODER, OTHERS


class Entries(NamedTuple):
    """Entries that carry a gradient into a matrix; rows index what they are multiplied with there."""

    rows: Tensor
    latents: Tensor
    gradient: Tensor


class Revived(NamedTuple):
    """What aux-k asks of dead latents."""

    latents: Tensor
    """The dead ones [m], ascending."""
    decoder: Tensor
    """Their rows in the decoder's gradient [m, D]."""
    gradient: Tensor
    """That of their pre-activations [B, m]."""


class SparseGradients:
    """Gathers the gradients of one step; sums over processes are begun as soon as they can be.

    One process on a CPU makes those of matrices a few rows at a time. Several processes have to sum whole ones, and on
    CUDA it has not been measured; whole ones are in the parameters' `.grad`, which are made once, then overwritten.
    """

    def __init__(self, dictionary: ThresholdDictionary, deterministic: bool, alone: bool, shard: Shard) -> None:
        W_dec = dictionary.W_dec
        self._dictionary, self._shard, self._made = dictionary, shard, dict[Tensor, Gradient]()
        self._whole = not alone or W_dec.is_cuda or kernels_for(W_dec) is not None
        # Atomic additions pay only on CUDA.
        self._in_order = deterministic or not W_dec.is_cuda

    @phase("weight gradients")
    def decoder(self, entries: list[Entries], back: Tensor, total: Tensor, revived: Revived | None) -> None:
        """W_dec's, from entries that index the outputs' gradients `back` [N, D], and b_dec's `total` [D]."""
        W_dec, b_dec = self._dictionary.W_dec, self._dictionary.b_dec
        dense = None if revived is None else DenseRows(revived.latents, revived.decoder)
        self._matrix(W_dec, _joined(entries), back, dense)
        self._vector(b_dec).copy_(total)
        if self._whole:
            self._shard.start_sum(DECODER, _buffer(W_dec))

    @phase("weight gradients")
    def encoder(self, entries: list[Entries], centred: Tensor, revived: Revived | None) -> None:
        """W_enc's and b_enc's, from entries that index the centred inputs [N, D], and b_dec's through the encoder.

        Aux-k looks at the first of the inputs alone.
        """
        dictionary, joined, dense = self._dictionary, _joined(entries), None
        b_enc, b_dec = self._vector(dictionary.b_enc), self._vector(dictionary.b_dec)
        if revived is not None:
            with phase("aux-k"):
                dense = DenseRows(revived.latents, revived.gradient.T @ centred[: len(revived.gradient)])
        by_latents = self._matrix(dictionary.W_enc, joined, centred, dense)
        if by_latents is not None:
            by_latents.sum_values(joined.gradient, b_enc)
        else:
            b_enc.zero_().index_add_(0, joined.latents, joined.gradient)
        if revived is not None:
            b_enc.index_add_(0, revived.latents, revived.gradient.sum(dim=0))
        # Both halves are centred by b_dec before they are encoded.
        b_dec.addmv_(dictionary.W_enc, b_enc, alpha=-1)
        if self._whole:
            self._shard.start_sum(OTHERS, by_latent(_buffer(dictionary.W_enc)), b_enc, b_dec)

    def all(self) -> Gradients:
        """The gradients of all four parameters; whole ones have to be waited for."""
        return self._made

    def _matrix(self, parameter: Tensor, entries: Entries, x: Tensor, dense: DenseRows | None) -> ByLatent | None:
        """Take in the gradient of a matrix; returns the order of its entries if they were sorted."""
        in_order = ByLatent.of(entries.rows, entries.latents, self._dictionary.dict_size) if self._in_order else None
        if in_order is not None and not self._whole:
            self._made[parameter] = RowSums(in_order, entries.gradient, x, dense)
            return in_order
        buffer = _buffer(parameter)
        rows = by_latent(buffer)
        if in_order is not None:
            in_order.sum_rows(entries.gradient, x, rows, chunk_rows(rows))
        else:
            add_rows(entries.rows, entries.latents, entries.gradient, x, rows)
        if dense is not None:
            rows.index_add_(0, dense.latents, dense.rows)
        self._made[parameter] = WholeGradient(self._shard.own(buffer))
        return in_order

    def _vector(self, parameter: Tensor) -> Tensor:
        buffer = _buffer(parameter)
        self._made[parameter] = WholeGradient(buffer)
        return buffer


def _joined(entries: list[Entries]) -> Entries:
    return Entries(*(torch.cat(parts) for parts in zip(*entries, strict=True)))


def _buffer(parameter: Tensor) -> Tensor:
    """The gradient of `parameter`, made (not filled) where there is none; it keeps the [F, D] memory order of W_enc."""
    if parameter.grad is None:
        parameter.grad = torch.empty_like(parameter)
    return parameter.grad
