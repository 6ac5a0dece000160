"""Who updates which latents: every process all of them, or (`training.shard: optimizer`) each its own share.

With shares, a process keeps Adam's moments of its own latents alone. Gradients are summed where they are needed, and
after the update every process gets everybody's rows: ZeRO, stage 1 (Rajbhandari et al. 2020, section 5.1).
torch's ZeroRedundancyOptimizer deals out whole parameters, of which a dictionary has only two that count.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from tsae.parallel.group import ALONE, Group, Wait


class Shard:
    """All latents: every process makes the same update, from the sums of all gradients.

    Matrices are kept latent by latent: contiguous [F, D], or [D, F] as the transpose of that.
    """

    def __init__(self, group: Group = ALONE) -> None:
        self._group = group
        self._waits: defaultdict[str, list[Wait]] = defaultdict(list)

    def start_sum(self, key: str, *gradients: Tensor) -> None:
        """Begin to sum gradients, matrices as [F, D], over processes; they may be used after `wait(key)`."""
        self._waits[key].append(self._group.start_sum(*gradients))

    def wait(self, key: str) -> None:
        """Return when the sums that were begun under this name, if any, are there."""
        for wait in self._waits.pop(key, []):
            wait()

    def own(self, tensor: Tensor) -> Tensor:
        """The part of a parameter, or of its like, that this process updates."""
        return tensor

    def whole(self, own: Tensor, parameter: Tensor) -> Tensor | None:
        """All processes' parts of the like of a parameter, in the first process; elsewhere they may be missing."""
        del parameter
        return own

    def start_spread(self, parameter: Tensor) -> Wait:
        """Begin to give every process the parameter as the owners of its parts updated it."""
        del parameter
        return _nothing

    def norm(self, matrices: Sequence[Tensor], vectors: Sequence[Tensor]) -> Tensor:
        """The norm of everything, from norms of this process's parts of the matrices and of the vectors."""
        return torch.linalg.vector_norm(torch.stack([*matrices, *vectors]))


class OwnLatents(Shard):
    """This process's share of `dict_size` latents; vectors, which are small, are everybody's."""

    def __init__(self, group: Group, dict_size: int) -> None:
        super().__init__(group)
        bounds = [dict_size * rank // group.world for rank in range(group.world + 1)]
        self._dict_size = dict_size
        self._lengths = [stop - start for start, stop in pairwise(bounds)]
        self._own = slice(bounds[group.rank], bounds[group.rank + 1])

    def start_sum(self, key: str, *gradients: Tensor) -> None:
        waits = self._waits[key]
        waits.append(self._group.start_sum(*(gradient for gradient in gradients if gradient.ndim < 2)))
        for matrix in gradients:
            if matrix.ndim > 1:
                waits.append(self._group.start_sum_at_owners(matrix.split(self._lengths)))

    def own(self, tensor: Tensor) -> Tensor:
        if tensor.ndim < 2:
            return tensor
        return tensor[self._own] if self._rows_first(tensor) else tensor[:, self._own]

    def whole(self, own: Tensor, parameter: Tensor) -> Tensor | None:
        if own.ndim < 2:
            return own
        first = self._rows_first(parameter)
        rows = self._group.collect_rows(own if first else own.T, self._lengths)
        return rows if first or rows is None else rows.T

    def start_spread(self, parameter: Tensor) -> Wait:
        if parameter.ndim < 2:
            return _nothing
        rows = parameter if self._rows_first(parameter) else parameter.T
        return self._group.start_spread(rows.split(self._lengths))

    def norm(self, matrices: Sequence[Tensor], vectors: Sequence[Tensor]) -> Tensor:
        own, shared = (torch.stack(list(norms)).double().square().sum() for norms in (matrices, vectors))
        return (self._group.sum(own) + shared).sqrt().to(matrices[0].dtype)

    def _rows_first(self, matrix: Tensor) -> bool:
        return len(matrix) == self._dict_size and matrix.is_contiguous()


EVERYTHING = Shard()
"""What one process updates."""


def _nothing() -> None:
    """There is nothing to wait for."""
