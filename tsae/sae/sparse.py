"""Sparse codes and the three products a dictionary needs of them. None builds a dense [N, F] tensor.

On CUDA with Triton, float32 tensors go through the kernels of `tsae.sae.kernels`; `kernels_for` decides that, here and
nowhere else. Without Triton, or for float64, torch's operations work on CUDA too, more slowly. On a CPU the kernels run
in Triton's interpreter if the environment says `TRITON_INTERPRET=1`, which is how they are tested without a GPU.

Shapes: N rows (tokens), F dict_size, D activation_dim, n nonzero entries.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

logger = logging.getLogger(__name__)

# Said once per process by torch for every CSR tensor; what is used of them here is tested against dense products.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")


def interpreted() -> bool:
    """Whether Triton's interpreter was asked for."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def kernels_for(tensor: Tensor) -> ModuleType | None:
    """The module of kernels where they compute on tensors like this one; else None: torch's operations do.

    They have no backward pass, so a tensor that wants a gradient is left to torch.
    """
    if not (tensor.is_cuda or interpreted()) or tensor.dtype != torch.float32:
        return None
    if tensor.requires_grad and torch.is_grad_enabled():
        return None
    return _kernels()


def kernels_that_run(tensor: Tensor) -> ModuleType:
    """The same where they are known to: a code with spare entries, or a screen, has been made by them."""
    kernels = kernels_for(tensor)
    assert kernels is not None
    return kernels


@functools.cache
def _kernels() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        logger.warning("Triton is not installed: sparse operations on CUDA are torch's, which are slower")
        return None
    from tsae.sae import kernels

    return kernels


class SparseCode(NamedTuple):
    """Nonzero feature activations of N tokens, row by row (CSR); latents ascend within a row."""

    offsets: Tensor
    """Where each row's entries begin [N + 1], int64."""
    latents: Tensor
    """Latent of each entry [n], int64."""
    values: Tensor
    """Feature activation of each entry [n]."""
    dict_size: int
    """F."""
    spare: bool = False
    """Whether entries may be empty: latent −1 and value 0, between others or after the last row's.

    Then nothing about the code has a size that the host would have to ask for. Only the kernels understand it.
    """
    known_rows: Tensor | None = None
    """Row of each entry [n], of an empty one some row; given where there may be such."""
    known_order: ByLatent | None = None
    """The entries by latent, where they have been sorted."""

    @property
    def by_latent(self) -> ByLatent:
        """The entries by latent."""
        return self.known_order or ByLatent.of(self.rows, self.latents, self.dict_size)

    @property
    def rows(self) -> Tensor:
        """Row of each entry [n]; of an empty one some row."""
        if self.known_rows is not None:
            return self.known_rows
        counts = self.offsets.diff()
        rows = torch.arange(len(counts), device=counts.device)
        return torch.repeat_interleave(rows, counts, output_size=len(self.latents))

    def dense(self) -> Tensor:
        """The [N, F] tensor."""
        # Latent −1 is the last column, which is not returned.
        full = self.values.new_zeros(len(self.offsets) - 1, self.dict_size + self.spare)
        full[self.rows, self.latents] = self.values
        return full[:, : self.dict_size]

    def dense_by_latent(self) -> Tensor:
        """The [F, N] tensor, so that one latent's values are one run of memory."""
        full = self.values.new_zeros(self.dict_size + self.spare, len(self.offsets) - 1)
        full[self.latents, self.rows] = self.values
        return full[: self.dict_size]

    def within(self, latents: slice) -> Part:
        """The entries of a run of latents, which are counted from 0 again."""
        size = latents.stop - latents.start
        if self.spare:
            # As many entries, those of other latents empty.
            outside, own = self.latents >= latents.stop, self.latents
            if latents.start > 0:
                outside, own = outside | (own < latents.start), own - latents.start
            own, values = own.masked_fill(outside, -1), self.values.masked_fill(outside, 0)
            return Part(self._replace(latents=own, values=values, dict_size=size, known_order=None), slice(None))
        chosen = self.inside(latents).nonzero()[:, 0]
        offsets = torch.searchsorted(chosen, self.offsets)
        return Part(SparseCode(offsets, self.latents[chosen] - latents.start, self.values[chosen], size), chosen)

    def block(self, start: int, stop: int) -> Part:
        """The entries of some rows, which are counted from 0 again; of a code without spare ones."""
        offsets = self.offsets[start : stop + 1]
        places = slice(int(offsets[0]), int(offsets[-1]))
        part = SparseCode(offsets - places.start, self.latents[places], self.values[places], self.dict_size)
        return Part(part, places)

    def at(self, rows: Tensor, latents: Tensor) -> Tensor:
        """The values at some places [m]; 0 where there is no entry, or the latent is −1."""
        return self.dense_by_latent()[latents, rows].where(latents >= 0, 0)

    def of_groups(self, groups: Sequence[slice]) -> tuple[Tensor, Tensor]:
        """Sum of the entries of each group of latents, which follow each other, and how many they are [G]."""
        if self.spare:
            return kernels_that_run(self.values).of_groups(self.offsets, self.latents, self.values, groups)
        inside = [self.inside(group) for group in groups]
        return torch.stack([self.values.where(each, 0).sum() for each in inside]), torch.stack(
            [each.sum() for each in inside]
        )

    def inside(self, latents: slice) -> Tensor:
        """Which entries are of a run of latents [n], bool."""
        return (self.latents >= latents.start) & (self.latents < latents.stop)

    def smallest(self) -> Tensor:
        """The smallest value of each row [N]; infinite where there is none."""
        smallest = self.values.new_full((len(self.offsets) - 1,), torch.inf)
        return smallest.scatter_reduce_(0, self.rows, self.values, "amin")

    def fired(self) -> Tensor:
        """Which latents have an entry [F], bool."""
        fired = torch.zeros(self.dict_size + self.spare, dtype=torch.bool, device=self.latents.device)
        fired.index_fill_(0, self.latents, True)  # fired[...] = True would wait for a GPU
        return fired[: self.dict_size]

    def sum_values(self, values: Tensor) -> Tensor:
        """Sum of each row's entries of `values` [n] → [N]."""
        return segment_sums(values, self.offsets)

    def with_values(self, values: Tensor) -> SparseCode:
        """The same entries with other values [n]."""
        return self._replace(values=values)


class Part(NamedTuple):
    """Some entries of a code, and where they are among all of them."""

    code: SparseCode
    places: Tensor | slice

    def add(self, values: Tensor, out: Tensor) -> None:
        """Add to `out` [n of the whole] what belongs to the part's entries; 0 to empty ones."""
        if isinstance(self.places, slice):
            out[self.places].add_(values)
        else:
            out[self.places] += values


def from_entries(rows: Tensor, latents: Tensor, values: Tensor, n_rows: int, dict_size: int) -> SparseCode:
    """A code of entries that already ascend by row and, within it, by latent."""
    bounds = torch.arange(n_rows + 1, device=rows.device)
    return SparseCode(torch.searchsorted(rows, bounds), latents, values, dict_size)


def side_by_side(codes: Sequence[SparseCode]) -> SparseCode:
    """One code of the latents of several, in their order, for the same rows; none has spare entries."""
    first, *others = codes
    if not others:
        return first
    size = sum(code.dict_size for code in codes)
    offsets = torch.stack([code.offsets for code in codes]).sum(dim=0)
    entries = sum(len(code.latents) for code in codes)
    latents, values = offsets.new_empty(entries), first.values.new_empty(entries)
    begins, before = offsets[:-1].clone(), 0
    for code in codes:
        rows = code.rows
        places = begins[rows] + torch.arange(len(rows), device=rows.device) - code.offsets[rows]
        latents[places], values[places] = code.latents + before, code.values
        begins += code.offsets.diff()
        before += code.dict_size
    return SparseCode(offsets, latents, values, size)


def from_dense(f: Tensor) -> SparseCode:
    """The positive entries of dense codes [N, F]."""
    rows, latents = f.nonzero(as_tuple=True)
    return from_entries(rows, latents, f[rows, latents], len(f), f.shape[1])


def weighted_rows(code: SparseCode, matrix: Tensor) -> Tensor:
    """code [N, F] @ matrix [F, D] → [N, D]: each row sums its latents' rows of the matrix."""
    kernels = kernels_for(matrix)
    if kernels is not None:
        return kernels.weighted_rows((code.offsets[:-1], code.offsets[1:]), code.latents, code.values, matrix)
    return embedding_bag(
        code.latents, matrix, code.offsets, mode="sum", per_sample_weights=code.values, include_last_offset=True
    )


def sampled_products(code: SparseCode, x: Tensor, matrix: Tensor) -> Tensor:
    """x [N, D] @ matrix [F, D].T at the entries of `code` only → [n]."""
    kernels = kernels_for(x)
    if kernels is not None:
        return kernels.sampled_products(code.rows, code.latents, x, matrix)
    pattern = torch.sparse_csr_tensor(
        code.offsets, code.latents, torch.zeros_like(code.values), (len(x), len(matrix)), check_invariants=False
    )
    return torch.sparse.sampled_addmm(pattern, x, matrix.T, beta=0.0).values()


def segment_sums(values: Tensor, offsets: Tensor) -> Tensor:
    """Sum of values [n] between successive `offsets` [R + 1] → [R], always in the same order."""
    kernels = kernels_for(values)
    if kernels is not None:
        return kernels.segment_sums(values, (offsets[:-1], offsets[1:]))
    return torch.segment_reduce(values, "sum", offsets=offsets, initial=0)


def row_squares(x: Tensor, shift: Tensor | None = None) -> Tensor:
    """Sum of the squares of each row of x [N, D], less `shift` [D] if given → [N]."""
    kernels = kernels_for(x)
    if kernels is not None:
        return kernels.row_squares(x, shift)
    return (x if shift is None else x - shift).square().sum(dim=1)


def sum_of_squares(x: Tensor, shift: Tensor | None = None) -> Tensor:
    """The same of all rows, a scalar."""
    kernels = kernels_for(x)
    if kernels is not None:
        return kernels.row_squares(x, shift).sum()
    return (x if shift is None else x - shift).square().sum()


def add_rows(rows: Tensor, latents: Tensor, values: Tensor, x: Tensor, out: Tensor) -> None:
    """Set out[latent] [F, D] to the sum of value · x[row] over its entries, which need no order.

    On CUDA the additions are atomic: faster for few entries, and the last bits may differ from run to run.
    """
    kernels = kernels_for(x)
    out.zero_()
    if kernels is not None:
        kernels.add_rows(rows, latents, values, x, out)
    else:
        out.index_add_(0, latents, values[:, None] * x[rows])


class ByLatent(NamedTuple):
    """The entries of a code in order of their latents: what sums over tokens need."""

    order: Tensor
    """Places of the entries [n]; for what lies outside of all latents' bounds, some place."""
    rows: Tensor
    """Row of each entry in that order [n]."""
    offsets: Tensor
    """Where each latent's entries begin [F + 1], or [F] if `stops` are given."""
    stops: Tensor | None = None
    """Where they end [F], if not where the next latent's begin."""

    @classmethod
    def of(cls, rows: Tensor, latents: Tensor, dict_size: int) -> ByLatent:
        """Sort entries stably, so that every sum has a fixed order."""
        # Half as wide numbers are sorted in half of the passes.
        ascending, order = latents.int().sort(stable=True)
        bounds = torch.arange(dict_size + 1, dtype=torch.int32, device=latents.device)
        return cls(order, rows[order], torch.searchsorted(ascending, bounds))

    @classmethod
    def of_two(cls, one: SparseCode, other: SparseCode) -> tuple[ByLatent, ByLatent, ByLatent]:
        """Those of two codes with spare entries, of as many rows, by one sort; and that of both together.

        In the latter the second's entries, and their rows, are counted on from the first's, and of each latent the first's
        come first.
        """
        count, n_rows, size = len(one.latents), len(one.offsets) - 1, max(one.dict_size, other.dict_size)
        # An empty entry, of latent −1, becomes −2 or −1.
        ascending, order = torch.cat([2 * one.latents, 2 * other.latents + 1]).int().sort(stable=True)
        places = torch.arange(2 * size + 1, dtype=torch.int32, device=ascending.device)
        bounds = torch.searchsorted(ascending, places)
        own, others = order.clamp_max(count - 1), (order - count).clamp_min_(0)
        begin, middle, end = bounds[:-1:2], bounds[1::2], bounds[2::2]
        rows = torch.cat([one.rows, other.rows + n_rows])
        return (
            cls(own, one.rows[own], begin, middle),
            cls(others, other.rows[others], middle, end),
            cls(order, rows[order], begin, end),
        )

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Where each latent's entries begin and end; two of [F]."""
        return (self.offsets[:-1], self.offsets[1:]) if self.stops is None else (self.offsets, self.stops)

    def of_other_rows(self, rows: Tensor) -> ByLatent:
        """Entries of the same latents in the same order, but of these rows [n]."""
        return self._replace(rows=rows[self.order])

    def sum_rows(self, values: Tensor, x: Tensor, out: Tensor, chunk: int) -> None:
        """Σ over a latent's entries of value · x[row], into `out` [F, D]; `values` [n] in the code's own order.

        Goes through `chunk` latents at a time, so that the sums are still in the cache when they are copied.
        """
        weights = values[self.order]
        if x.is_cuda or kernels_for(x) is not None:
            self._sum_rows_at_once(weights, x, out)
            return
        bounds = [int(bound) for bound in self.offsets[::chunk]]
        last = int(self.offsets[-1])
        for index, start in enumerate(bounds):
            first = index * chunk
            stop = bounds[index + 1] if index + 1 < len(bounds) else last
            size = min(chunk, len(out) - first)
            if size <= 0:
                break
            offsets = self.offsets[first : first + size + 1] - start
            out[first : first + size] = embedding_bag(
                self.rows[start:stop],
                x,
                offsets,
                mode="sum",
                per_sample_weights=weights[start:stop],
                include_last_offset=True,
            )

    def sum_values(self, values: Tensor, out: Tensor) -> None:
        """Σ of a latent's values into `out` [F]; `values` [n] in the code's own order."""
        kernels = kernels_for(values)
        if kernels is not None:
            kernels.segment_sums(values[self.order], self.bounds, out)
        else:
            out.copy_(segment_sums(values[self.order], self.offsets))

    def _sum_rows_at_once(self, weights: Tensor, x: Tensor, out: Tensor) -> None:
        """Without chunks: on CUDA each of them would wait for the GPU to know its bounds."""
        kernels = kernels_for(x)
        if kernels is not None:
            kernels.weighted_rows(self.bounds, self.rows, weights, x, out)
        else:
            code = SparseCode(self.offsets, self.rows, weights, len(x))
            out.copy_(weighted_rows(code, x))
