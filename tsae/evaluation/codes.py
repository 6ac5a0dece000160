"""The codes of one context, reduced to the latents that are active in it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from tsae.sae.sparse import SparseCode

Ranges = Sequence[tuple[int, int]]
"""R pairs (first, end) of latent indices."""


class ActiveCode(NamedTuple):
    """The feature activations of one context of T positions.

    latents: [A] ascending indices of the latents that are active somewhere; values: [A, T] their activations.
    """

    latents: Tensor
    values: Tensor

    def slices(self, ranges: Ranges) -> list[slice]:
        """Where the latents of each range lie among the A; a range is contiguous and `latents` ascends."""
        edges = torch.tensor(ranges, device=self.latents.device)
        return [slice(first, end) for first, end in torch.searchsorted(self.latents, edges).tolist()]


def active_code(f: Tensor) -> ActiveCode:
    """The active part of dense codes f [T, F], none of them negative."""
    latents = f.amax(0).nonzero()[:, 0]
    return ActiveCode(latents, f.index_select(1, latents).T.contiguous().float())


def context_code(code: SparseCode, rows: slice) -> ActiveCode:
    """The code of one context, the tokens `rows` of a batch's sparse code."""
    first, end = (int(code.offsets[edge]) for edge in (rows.start, rows.stop))
    latents, place = torch.unique(code.latents[first:end], return_inverse=True)
    values = code.values.new_zeros(len(latents), rows.stop - rows.start, dtype=torch.float32)
    counts = code.offsets[rows.start : rows.stop + 1].diff()
    position = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    values[place, position] = code.values[first:end].float()
    return ActiveCode(latents, values)


def split_ranges(group_sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges of latents that are reported: all, high-level (group 0), low-level (the rest), then each group."""
    ends = list(accumulate(group_sizes))
    groups = list(zip([0, *ends], ends, strict=False))
    return [(0, ends[-1]), groups[0], (ends[0], ends[-1]), *groups]


def reduce_ranges(per_latent: Tensor, slices: Sequence[slice], mean: bool = False) -> Tensor:
    """Sum, or mean, of per-latent values [A] over each of R slices, float64 [R] on the CPU."""
    values = per_latent.double().cpu()
    return torch.stack([values[part].mean() if mean else values[part].sum() for part in slices])
