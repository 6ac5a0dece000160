"""Gradients of parameters, whole or made a few rows at a time.

Shapes: F dict_size, D activation_dim, N rows of inputs, n entries. Matrices are latent by latent: [F, D].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from tsae.runtime.phases import phase
from tsae.sae.sparse import ByLatent

CHUNK_BYTES, CUDA_CHUNK_BYTES = 4 * 2**20, 256 * 2**20


class Gradient(Protocol):
    """The gradient of a vector, or of a matrix latent by latent."""

    def measure(self, unit_rows: Tensor | None) -> list[Tensor]:
        """Norms of its pieces. With the matrix `unit_rows` [F, D], whose gradient this is, first takes out of each row
        what would only change the norm of the matrix's row.
        """

    def chunk(self, first: int, weights: Tensor, factor: Tensor) -> Tensor:
        """`factor` times its rows from `first` on, as many as in this piece of the parameter; new ones.

        The piece must be as it was in `measure`.
        """


Gradients = Mapping[Tensor, Gradient]
"""The gradient of each parameter that has one."""


class WholeGradient:
    """A gradient in memory, in which `measure` does its work."""

    def __init__(self, gradient: Tensor) -> None:
        self._gradient = by_latent(gradient)

    def measure(self, unit_rows: Tensor | None) -> list[Tensor]:
        if unit_rows is None:
            return [torch.linalg.vector_norm(self._gradient)]
        norms = []
        for gradient, weights in zip(chunks(self._gradient), chunks(unit_rows), strict=True):
            gradient.addcmul_(weights, _along(gradient, weights)[:, None], value=-1)
            norms.append(torch.linalg.vector_norm(gradient))
        return norms

    def chunk(self, first: int, weights: Tensor, factor: Tensor) -> Tensor:
        return self._gradient[first : first + len(weights)] * factor


class DenseRows(NamedTuple):
    """Some rows of a matrix."""

    latents: Tensor
    """Which ones [m], ascending."""
    rows: Tensor
    """[m, D]"""


class RowSums:
    """The gradient of a matrix as what it is: each latent's sum over its entries of value · x[row].

    The sums are made twice, for the norm and for the update, and never stored: they take less time than a matrix of
    their size takes to be written and read, and few latents have entries at all.
    """

    def __init__(self, entries: ByLatent, values: Tensor, x: Tensor, added: DenseRows | None) -> None:
        """Of `values` [n], in the order in which they were before they were sorted by latent, and x [N, D].

        `added` is a part of the gradient that is no such sum.
        """
        self._entries, self._values, self._x, self._added = entries, values[entries.order], x, added
        self._along: Tensor | None = None

    def measure(self, unit_rows: Tensor | None) -> list[Tensor]:
        live = self._entries.offsets.diff() > 0
        if self._added is not None:
            live[self._added.latents] = True
        if unit_rows is not None:
            self._along = self._x.new_zeros(len(live))
        places = live.nonzero()[:, 0]
        norms = []
        for start in range(0, len(places), chunk_rows(self._x)):
            latents = places[start : start + chunk_rows(self._x)]
            gradient = self._rows(latents)
            if unit_rows is not None and self._along is not None:
                weights = unit_rows[latents]
                self._along[latents] = _along(gradient, weights)
                gradient.addcmul_(weights, self._along[latents, None], value=-1)
            norms.append(torch.linalg.vector_norm(gradient))
        return norms

    def chunk(self, first: int, weights: Tensor, factor: Tensor) -> Tensor:
        stop = first + len(weights)
        gradient = self._rows(torch.arange(first, stop), factor)
        if self._along is not None:
            gradient.addcmul_(weights, (self._along[first:stop] * factor)[:, None], value=-1)
        return gradient

    @phase("weight gradients")
    def _rows(self, latents: Tensor, factor: Tensor | float = 1.0) -> Tensor:
        """`factor` times the rows of some latents [m], which ascend and leave out none between them that has entries."""
        first, last = int(latents[0]), int(latents[-1])
        entries = slice(int(self._entries.offsets[first]), int(self._entries.offsets[last + 1]))
        rows = embedding_bag(
            self._entries.rows[entries],
            self._x,
            self._entries.offsets[latents] - entries.start,
            mode="sum",
            per_sample_weights=self._values[entries] * factor,
        )
        if self._added is not None:
            start, stop = torch.searchsorted(self._added.latents, latents.new_tensor([first, last + 1])).tolist()
            places = torch.searchsorted(latents, self._added.latents[start:stop])
            rows.index_add_(0, places, self._added.rows[start:stop] * factor)
        return rows


def whole_gradients(module: nn.Module, own: Callable[[Tensor], Tensor]) -> Gradients:
    """What autograd left in the parameters' `.grad`; of each the part that `own` makes of it."""
    return {
        parameter: WholeGradient(own(parameter.grad)) for parameter in module.parameters() if parameter.grad is not None
    }


def _along(gradient: Tensor, weights: Tensor) -> Tensor:
    """How much of the row of the weights [n, D] there is in each row of the gradient [n, D] → [n]."""
    return (gradient * weights).sum(dim=1) / (weights.norm(dim=1) + 1e-6).square()


def by_latent(parameter: Tensor) -> Tensor:
    """A vector as it is; a matrix, or its like, that is laid out by latent as [F, D]."""
    if parameter.ndim < 2:
        return parameter
    rows = parameter if parameter.is_contiguous() else parameter.T
    assert rows.is_contiguous()
    return rows


def chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    """Views of a vector, whole, or of a matrix, a few latents each."""
    return (tensor,) if tensor.ndim < 2 else by_latent(tensor).split(chunk_rows(by_latent(tensor)))


def chunk_rows(matrix: Tensor) -> int:
    """Rows of a matrix to work on at a time: what a core's cache holds; on CUDA so many that launches are few."""
    limit = CUDA_CHUNK_BYTES if matrix.is_cuda else CHUNK_BYTES
    return max(1, limit // (matrix.shape[1] * matrix.element_size()))
